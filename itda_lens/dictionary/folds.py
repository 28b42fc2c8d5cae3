"""Folds of the texts: what codes of other text are like shows without the atoms of a row's own text."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from itda_lens.records import Label

FOLDS = 8
"""Parts into which texts are dealt. With fewer, a row is coded without more of the atoms than a row of
other text will be; with more, there is more to compute."""

RUNS = 64
"""Neighbouring texts are dealt together, in so many runs: they are often alike, and where rows came
without labels each counts as a text, though neighbours often are from one."""

LARGEST = 0.25
"""Share of the rows, or of the atoms, that one text may have at most for texts to be dealt whole."""

Place = tuple[int, ...]

_LEVELS: tuple[Callable[[Label], Place], ...] = (
    lambda label: (label.row,),
    lambda label: (label.row, label.chunk),
    lambda label: label.key,
)
"""What stays together: a text, where there are enough; or a context; or nothing."""


def assign_folds(
    rows: Sequence[Label], atoms: Sequence[Label]
) -> tuple[Int[Tensor, " m"], Int[Tensor, " d_sae"]]:
    """The folds of rows and of atoms, by their labels: what comes from one text is in one fold.

    Folds have about as many rows and atoms each. Where one text has most of all, its contexts are dealt
    instead; where there are too few activations even to be dealt one by one, no atom is in a fold (-1).
    """
    for place in _LEVELS:
        of_rows, of_atoms = [place(a) for a in rows], [place(a) for a in atoms]
        shares = [_shares(places) for places in (of_rows, of_atoms)]
        if all(max(share.values(), default=1) <= LARGEST for share in shares):
            fold_of = _deal(*shares)
            return (
                torch.tensor([fold_of[place] for place in of_rows]),
                torch.tensor([fold_of[place] for place in of_atoms]),
            )
    return torch.zeros(len(rows), dtype=torch.long), torch.full((len(atoms),), -1)


def _shares(places: list[Place]) -> dict[Place, float]:
    return {place: count / len(places) for place, count in Counter(places).items()}


def _deal(rows: dict[Place, float], atoms: dict[Place, float]) -> dict[Place, int]:
    """The fold of each place: runs of neighbours, the largest first, each to the fold that has least."""
    runs: list[list[Place]] = [[] for _ in range(RUNS)]
    weights, before = [0.0] * RUNS, 0.0
    for place in sorted(rows | atoms):
        weight = (rows.get(place, 0) + atoms.get(place, 0)) / 2
        run = min(int(RUNS * (before + weight / 2)), RUNS - 1)
        runs[run].append(place)
        weights[run] += weight
        before += weight
    folds = [(0.0, fold) for fold in range(FOLDS)]
    fold_of = {}
    for run in sorted(range(RUNS), key=lambda run: -weights[run]):
        load, fold = folds[0]
        heapq.heapreplace(folds, (load + weights[run], fold))
        fold_of |= dict.fromkeys(runs[run], fold)
    return fold_of

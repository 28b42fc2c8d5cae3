"""Folds of texts: coded without the atoms of its own text, a row shows how other text is coded."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from itda_lens.records import Label

FOLDS = 8
"""How many folds there are. With fewer, a row is coded without more of the atoms than a row of new text
would be. With more, there is more to compute."""

RUNS = 64
"""How many runs of neighbouring texts there are. A run goes into one fold as a whole, since neighbouring
texts are often alike. Rows without labels count as a text each, though neighbouring ones often come from
one text."""

LARGEST = 0.25
"""Whole texts go into folds only if no text has a larger share of the rows, or of the atoms."""

Place = tuple[int, ...]

_LEVELS: tuple[Callable[[Label], Place], ...] = (
    lambda label: (label.row,),
    lambda label: (label.row, label.chunk),
    lambda label: label.key,
)
"""The units that are put into folds, the largest first: texts, contexts, single activations."""


def assign_folds(
    rows: Sequence[Label], atoms: Sequence[Label]
) -> tuple[Int[Tensor, " m"], Int[Tensor, " d_sae"]]:
    """Put rows and atoms into folds by their labels, so that one fold has everything from one text.

    All folds get about equal numbers of rows, and of atoms. If one text has more than the share
    `LARGEST` of either, contexts are put into folds one by one; if one context has, single activations
    are. If there are too few activations even for that, all rows are in fold 0 and no atom is in a fold
    (-1).

    Args:
        rows: where each row came from.
        atoms: where each atom came from.

    Returns:
        The fold of each row, and the fold of each atom.
    """
    for place in _LEVELS:
        of_rows, of_atoms = [place(a) for a in rows], [place(a) for a in atoms]
        shares = [_shares(places) for places in (of_rows, of_atoms)]
        if all(max(share.values(), default=1) <= LARGEST for share in shares):
            fold_of = _deal(*shares)
            return (
                torch.tensor([fold_of[place] for place in of_rows], device="cpu"),
                torch.tensor([fold_of[place] for place in of_atoms], device="cpu"),
            )
    return torch.zeros(len(rows), dtype=torch.long, device="cpu"), torch.full(
        (len(atoms),), -1, device="cpu"
    )


def _shares(places: list[Place]) -> dict[Place, float]:
    return {place: count / len(places) for place, count in Counter(places).items()}


def _deal(rows: dict[Place, float], atoms: dict[Place, float]) -> dict[Place, int]:
    """Choose the fold of each place. The largest runs go first, each into the fold that has least."""
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

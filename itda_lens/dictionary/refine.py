"""Atoms moved by least squares, then replaced by the activations nearest to them: pure, and better."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itda_lens.dictionary.selection import SAME_DIRECTION, first_of_direction, nearest
from itda_lens.dictionary.update import update_atoms

BLOCK = 128
"""Atoms compared with all activations at once."""


def refine_atoms(
    parts: Iterable[Float[Tensor, "_ d"]],
    atoms: Float[Tensor, "n d"],
    activations: Float[Tensor, "m d"],
    k: int,
    *,
    signed: bool,
    progress: bool,
) -> Int[Tensor, " n"]:
    """Where in `activations` the atoms are that take the place of `atoms`, each the nearest to where
    rounds of least squares would move one.

    The more activations there are to choose from, the nearer one is, and the more of what the update
    gains is kept.

    Args:
        parts, k, signed, progress: as in `update_atoms`, a round a part; atoms may move any distance.
        atoms: rows of unit norm.
        activations: rows of unit norm, at least `n` of different directions; `atoms` may be among them.
    """
    moved = update_atoms(parts, atoms, k, least_cosine=0.0, signed=signed, progress=progress)
    return nearest_rows(moved, activations, signed)


def nearest_rows(
    atoms: Float[Tensor, "n d"], rows: Float[Tensor, "m d"], signed: bool
) -> Int[Tensor, " n"]:
    """The index of the row nearest to each atom (to it or to minus it, if `signed`), all of different
    directions.

    Where two atoms are nearest to one direction, the first has it, and the other the nearest that is
    left once all those are given away.
    """
    found = torch.cat([_similarity(part, rows, signed).argmax(dim=-1) for part in atoms.split(BLOCK)])
    first = first_of_direction(rows[found], SAME_DIRECTION, signed)
    if first.all():
        return found
    free = torch.cat(
        [nearest(part, rows[found[first]], signed) < SAME_DIRECTION for part in rows.split(4096)]
    )
    for i in (~first).nonzero().flatten().tolist():
        found[i] = _similarity(atoms[i : i + 1], rows, signed).masked_fill(~free, -torch.inf).argmax()
        free &= _similarity(rows, rows[found[i]][None], signed)[:, 0] < SAME_DIRECTION
    return found


def _similarity(a: Tensor, b: Tensor, signed: bool) -> Float[Tensor, "n m"]:
    cosines = a @ b.T
    return cosines.abs() if signed else cosines

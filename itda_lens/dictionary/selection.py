"""Building blocks of the rules for choosing atoms."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.pursuit import Coding, PreparedAtoms, SparseCodes

SAME_DIRECTION = 1 - 1e-6
"""From this cosine on, two float32 directions count as one: rounding allows nothing finer."""

FEW = 64
"""Number of atoms that need no pruning to be put in order: even a few codes use them all."""


def normalize_rows(
    x: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, "n d"], Bool[Tensor, " n"]]:
    """Rows scaled to unit norm, and which rows had a norm to scale (the others are zero)."""
    norm = x.norm(dim=-1)
    # A row a million times smaller than the largest one is what rounding left of a mean.
    usable = norm > 1e-6 * norm.max() if len(x) else norm > 0
    return x / norm.masked_fill(~usable, 1)[:, None] * usable[:, None], usable


def nearest(
    rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"], signed: bool
) -> Float[Tensor, " n"]:
    """The largest cosine of each unit row with any of `others`; -1 if there are none.

    If codes are signed, d and -d count alike.
    """
    if not len(others):
        return rows.new_full((len(rows),), -1.0)
    similarity = rows @ others.T
    most = similarity.amax(dim=-1)
    return torch.maximum(most, -similarity.amin(dim=-1)) if signed else most


def nearest_rows(
    atoms: Float[Tensor, "n d"], rows: Float[Tensor, "m d"], signed: bool, block: int = 128
) -> Int[Tensor, " n"]:
    """For each atom, the index of the nearest row; no row is given to two atoms.

    If several atoms are nearest to one direction, the first of them gets its row. Once all such rows are
    given away, each of the other atoms gets the nearest row that is left.

    Args:
        atoms, rows: of unit norm. There must be no fewer rows than atoms, of different directions.
        signed: whether a row may stand for its negative, as it may in signed codes.
        block: atoms compared with all rows at once.
    """

    def similarity(a: Tensor, b: Tensor) -> Float[Tensor, "i j"]:
        cosines = a @ b.T
        return cosines.abs() if signed else cosines

    found = torch.cat([similarity(part, rows).argmax(dim=-1) for part in atoms.split(block)])
    first = first_of_direction(rows[found], SAME_DIRECTION, signed)
    if first.all():
        return found
    given = rows[found[first]]
    free = torch.cat([nearest(part, given, signed) < SAME_DIRECTION for part in rows.split(4096)])
    taken = torch.zeros_like(free)
    taken[found[first]] = True
    for i in (~first).nonzero().flatten().tolist():
        # Rows go by index, too: the cosine of a row to itself may be rounded to less.
        left = free & ~taken
        left = left if left.any() else ~taken
        found[i] = similarity(atoms[i : i + 1], rows).masked_fill(~left, -torch.inf).argmax()
        taken[found[i]] = True
        free &= similarity(rows, rows[found[i]][None])[:, 0] < SAME_DIRECTION
    return found


def first_of_direction(
    unit: Float[Tensor, "n d"],
    cosine: float | Float[Tensor, " n"],
    signed: bool,
    known: Float[Tensor, "m d"] | None = None,
    block: int = 512,
) -> Bool[Tensor, " n"]:
    """Mark rows whose cosine to every earlier marked row, and to `known` ones, is below `cosine`.

    Args:
        unit: rows of unit norm.
        cosine: rows at least this similar to an earlier one count as duplicates; one number, or one
            for each row.
        signed: whether d and -d are duplicates too, as they are for signed codes.
        known: unit rows that count as marked before the first.
        block: rows compared at once; does not change the result.
    """
    limits = cosine if isinstance(cosine, Tensor) else unit.new_full((len(unit),), cosine)
    kept, n_kept = torch.empty_like(unit), 0
    marks = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)

    for start in range(0, len(unit), block):
        rows = unit[start : start + block]
        limit = limits[start : start + block]
        keep = nearest(rows, kept[:n_kept], signed) < limit
        if known is not None:
            keep &= nearest(rows, known, signed) < limit
        similarity = rows @ rows.T
        clashes = (similarity.abs() if signed else similarity) >= limit[:, None]
        clashes = clashes.tril(diagonal=-1)
        # In numpy, since steps on small arrays are nearly all overhead in torch.
        clashing, kept_here = clashes.cpu().numpy(), keep.cpu().numpy()
        for i in clashing.any(axis=-1).nonzero()[0]:
            kept_here[i] &= not (clashing[i] & kept_here).any()
        keep = torch.from_numpy(kept_here).to(unit.device)
        marks[start : start + block] = keep
        new = rows[keep]
        kept[n_kept : n_kept + len(new)] = new
        n_kept += len(new)
    return marks


def energy_by_atom(codes: SparseCodes, n_atoms: int) -> Float[Tensor, " n"]:
    """Sum of squared coefficients of each atom over all rows of `codes`, in float64."""
    energy = torch.zeros(n_atoms, dtype=torch.float64, device=codes.values.device)
    squares = codes.values.double().square().flatten()
    return energy.index_add_(0, codes.indices.flatten(), squares)


def _by_energy(codes: SparseCodes, n_atoms: int) -> Int[Tensor, " n"]:
    """Indices of the atoms by falling energy; equal ones by index."""
    return energy_by_atom(codes, n_atoms).argsort(descending=True, stable=True)


def prune_by_energy(
    x: Float[Tensor, "n d"],
    candidates: Float[Tensor, "m d"],
    n_keep: int,
    coding: Coding,
    *,
    drop: float,
    progress: bool,
) -> Int[Tensor, " n_keep"]:
    """Indices, ascending, of the candidates that carry the most energy in the codes of `x`.

    Each round codes `x` by the pursuit of `coding` and drops the fraction `drop` of the candidates that
    carry least, until `n_keep` are left. Neighbours take over the energy of a dropped atom, so several
    small rounds choose better than one large one.
    """
    kept, _ = _prune(x, PreparedAtoms(candidates, coding), n_keep, drop, progress)
    return kept


def order_by_energy(
    x: Float[Tensor, "n d"], atoms: Float[Tensor, "m d"], coding: Coding, *, drop: float
) -> Int[Tensor, " m"]:
    """Indices of `atoms`, the most important first: a prefix holds the atoms that pruning would leave.

    The first `FEW` of them are in the order of their energy.
    """
    prepared = PreparedAtoms(atoms, coding)
    few, dropped = _prune(x, prepared, min(FEW, len(atoms)), drop, progress=False)
    codes = prepared.keeping(few).encode(x)
    order = _by_energy(codes, len(few))
    return torch.cat([few[order], *reversed(dropped)])


def _prune(
    x: Tensor, candidates: PreparedAtoms, n_keep: int, drop: float, progress: bool
) -> tuple[Tensor, list[Tensor]]:
    """The indices that are left, ascending, and those that each round dropped, by falling energy."""
    kept = torch.arange(len(candidates), device=candidates.atoms.device)
    dropped = []
    with tqdm(
        total=len(candidates) - n_keep, desc="selecting", unit="atom", disable=not progress, leave=False
    ) as bar:
        while len(kept) > n_keep:
            order = _by_energy(candidates.encode(x), len(kept))
            size = max(n_keep, int(len(kept) * (1 - drop)))
            dropped.append(kept[order[size:]])
            best = order[:size].sort().values
            bar.update(len(kept) - size)
            kept = kept[best]
            if size == n_keep:
                break
            candidates = candidates.keeping(best)
    return kept, dropped

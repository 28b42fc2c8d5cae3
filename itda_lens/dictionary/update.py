"""Least-squares update of atoms: they stay near real activations, and reconstruct better."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.pursuit import Coding, PreparedAtoms, SparseCodes

PAST_WEIGHT = 0.5
"""Weight of one round's codes in the next round. They belong to atoms that have moved since, but cost
nothing. Earlier rounds get no weight: a third sample gains nothing."""

CG_STEPS = 2
"""Steps of conjugate gradients per round. More steps gain nothing, since codes change with the atoms."""

COLUMNS = 192
"""Columns of the atoms that are solved for at once. Their rows are read in any order, so they should fit
a cache: for 4,096 atoms these columns take 3 MB. With fewer columns, codes would be read more often."""

RIDGE = 0.03
"""Strength of the pull towards the atoms as they are, in multiples of an average atom's energy. With it,
rare atoms move less."""

DEFAULT_LEAST_COSINE = 0.9
"""Least cosine of a moved atom to the activation that its label names; docs/quality.md has its price."""


def update_atoms(
    parts: Iterable[Float[Tensor, "_ d"]],
    atoms: Float[Tensor, "n d"],
    coding: Coding,
    *,
    least_cosine: float,
    progress: bool,
) -> Float[Tensor, "n d"]:
    """Move unit atoms so that they reconstruct activations better.

    Each round codes one part of the activations with the atoms as they are, then solves for new atoms by
    least squares: the method of optimal directions (Engan, Aase & Husoy, 1999), on codes of matching
    pursuit. Conjugate gradients begin at the atoms as they are. Memory holds two parts, their codes and
    a few copies of the atoms, but no matrix of atoms by atoms.

    Codes of the round before still count, with weight `PAST_WEIGHT`, as in online dictionary learning
    (Mairal et al., 2009). So rare atoms are fitted to more activations. An atom that no code uses stays
    as it is, bit for bit.

    Args:
        parts: centred activations, one part for each round. Different parts keep the atoms from fitting
            one of them too closely.
        atoms: rows of unit norm.
        coding: how activations are coded in each round.
        least_cosine: the least cosine that a moved atom may have to the atom as it was, 0 to 1. With 1,
            no atom moves.

    Returns:
        The moved atoms, of unit norm.
    """
    if least_cosine == 1:
        return atoms
    origin = atoms
    last: tuple[Tensor, SparseCodes] | None = None
    for x in tqdm(parts, desc="updating", unit="round", disable=not progress, leave=False):
        codes = PreparedAtoms(atoms, coding).encode(x)
        found = least_squares_atoms(*((x, codes) if last is None else _joined(*last, x, codes)), atoms)
        last = x, codes
        moved = (found != atoms).any(dim=-1, keepdim=True)
        atoms = torch.where(moved, torch.nn.functional.normalize(found, dim=-1), atoms)
        atoms = hold_near(atoms, origin, least_cosine)
    return atoms


def _joined(
    past: Tensor, past_codes: SparseCodes, x: Tensor, codes: SparseCodes
) -> tuple[Tensor, SparseCodes]:
    """Rows and codes of two rounds; those of the past are scaled to the weight `PAST_WEIGHT`."""
    fading = PAST_WEIGHT**0.5
    values = torch.cat([fading * past_codes.values, codes.values])
    return (
        torch.cat([fading * past, x]),
        SparseCodes(torch.cat([past_codes.indices, codes.indices]), values),
    )


def hold_near(
    atoms: Float[Tensor, "n d"], origin: Float[Tensor, "n d"], least_cosine: float
) -> Float[Tensor, "n d"]:
    """Move atoms with too small a cosine to their origin to the nearest point where it is enough."""
    # In float64, since float32 cannot tell the cosine of an atom that has hardly moved from 1.
    start, end = origin.double(), atoms.double()
    cosine = (start * end).sum(dim=-1, keepdim=True) / start.norm(dim=-1, keepdim=True)
    away = torch.nn.functional.normalize(end - cosine * start, dim=-1)
    held = least_cosine * start + (1 - least_cosine**2) ** 0.5 * away
    far = (cosine < least_cosine) & (atoms != origin).any(dim=-1, keepdim=True)
    return torch.where(far, torch.nn.functional.normalize(held, dim=-1).to(atoms.dtype), atoms)


def least_squares_atoms(
    x: Float[Tensor, "m d"], codes: SparseCodes, atoms: Float[Tensor, "n d"], steps: int = CG_STEPS
) -> Float[Tensor, "n d"]:
    """Take `steps` steps from `atoms` to the D that minimises |x - C D|^2 + ridge |D - atoms|^2.

    C is the sparse matrix of `codes`. Columns of D do not depend on each other, and groups of them that
    fit a cache are solved for at once. The diagonal of the normal equations is the preconditioner.
    """
    transposed = _Transposed(codes, len(atoms))
    energy = transposed.energy()
    ridge = RIDGE * energy.mean()
    diagonal = (energy + ridge).clamp(min=torch.finfo(x.dtype).tiny)[:, None]
    width = COLUMNS if x.device.type == "cpu" else x.shape[1]
    parts = zip(x.split(width, dim=1), atoms.split(width, dim=1), strict=True)
    changes = [
        _conjugate_gradients(
            transposed.times(rows - codes.decode(part.contiguous())),
            lambda direction: transposed.times(codes.decode(direction)) + ridge * direction,
            diagonal,
            steps,
        )
        for rows, part in parts
    ]
    return atoms + torch.cat(changes, dim=1)


def _conjugate_gradients(
    residual: Float[Tensor, "n c"],
    apply: Callable[[Float[Tensor, "n c"]], Float[Tensor, "n c"]],
    diagonal: Float[Tensor, "n 1"],
    steps: int,
) -> Float[Tensor, "n c"]:
    """Take `steps` steps from zero to the solution of `apply(z) = residual`, each column by itself."""
    change = torch.zeros_like(residual)
    direction = residual / diagonal
    size = (residual * direction).sum(dim=0)
    for _ in range(steps):
        image = apply(direction)
        curvature = (direction * image).sum(dim=0)
        step = torch.where(curvature > 0, size / curvature, 0)
        change += step * direction
        residual = residual - step * image
        conditioned = residual / diagonal
        old, size = size, (residual * conditioned).sum(dim=0)
        direction = conditioned + torch.where(old > 0, size / old, 0) * direction
    return change


class _Transposed:
    """The sparse matrix of codes, read by atoms instead of by rows."""

    def __init__(self, codes: SparseCodes, n_atoms: int) -> None:
        k = codes.indices.shape[-1]
        used = (codes.values != 0).flatten().nonzero().flatten()
        atom = codes.indices.flatten()[used]
        order = atom.argsort(stable=True)
        self._rows = (used // k)[order]
        self._values = codes.values.flatten()[used][order]
        count = torch.bincount(atom, minlength=n_atoms)
        self._starts = count.cumsum(dim=0) - count

    def times(self, rows: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
        return torch.nn.functional.embedding_bag(
            self._rows, rows, self._starts, per_sample_weights=self._values, mode="sum"
        )

    def energy(self) -> Float[Tensor, " n"]:
        """Sum of each atom's squared coefficients."""
        ones = self._values.new_ones(int(self._rows.max()) + 1 if len(self._rows) else 1, 1)
        return torch.nn.functional.embedding_bag(
            self._rows, ones, self._starts, per_sample_weights=self._values.square(), mode="sum"
        ).squeeze(-1)

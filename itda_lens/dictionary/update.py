"""Least-squares update of chosen atoms: no longer real activations, but near them and better."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.pursuit import Coding, PreparedAtoms, SparseCodes

PAST_WEIGHT = 0.5
"""What the codes of one round weigh in the next: they are of atoms that have moved, but cost nothing.
Those of earlier rounds count no more: a third part gains nothing."""

CG_STEPS = 2
"""Steps of conjugate gradients per round; more gain nothing, since codes change with the atoms."""

COLUMNS = 192
"""Columns of the atoms solved for at once: rows of their table are read in any order, and so many of
4,096 atoms are 3 MB. Fewer columns cost more in reading codes."""

RIDGE = 0.03
"""Pull towards the atoms as they are, in multiples of an average atom's energy: rare atoms move less."""

DEFAULT_LEAST_COSINE = 0.9
"""How near atoms stay to the activations that their labels name; docs/quality.md has its price."""


def update_atoms(
    parts: Iterable[Float[Tensor, "_ d"]],
    atoms: Float[Tensor, "n d"],
    coding: Coding,
    *,
    least_cosine: float,
    progress: bool,
) -> Float[Tensor, "n d"]:
    """Unit atoms that reconstruct activations better: for each part, code it, then solve for the atoms.

    The method of optimal directions (Engan, Aase & Husoy, 1999) on codes of matching pursuit, a round a
    part, by conjugate gradients from the atoms as they are: memory for two parts, their codes and a few
    copies of the atoms, none for atoms by atoms. As in online dictionary learning (Mairal et al., 2009)
    codes of the round before still count, by `PAST_WEIGHT`: rare atoms are fitted to more activations.
    An atom that no code uses stays as it is, bit for bit; none gets farther from where it began than
    `least_cosine`.

    Args:
        parts: activations, centred; other ones in each round fit the atoms to none of them too closely.
        atoms: rows of unit norm.
        coding: how activations are coded in each round.
        least_cosine: of each atom to the atom as it was, 0 to 1; 1 lets none move.
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
    """All rows and their codes, those of the past scaled so that their squares weigh `PAST_WEIGHT`."""
    fading = PAST_WEIGHT**0.5
    values = torch.cat([fading * past_codes.values, codes.values])
    return (
        torch.cat([fading * past, x]),
        SparseCodes(torch.cat([past_codes.indices, codes.indices]), values),
    )


def hold_near(
    atoms: Float[Tensor, "n d"], origin: Float[Tensor, "n d"], least_cosine: float
) -> Float[Tensor, "n d"]:
    """Unit atoms, those of a smaller cosine to their origin moved to the nearest point that has it."""
    # In float64: the cosine of what has hardly moved differs from 1 by less than float32 can tell.
    start, end = origin.double(), atoms.double()
    cosine = (start * end).sum(dim=-1, keepdim=True) / start.norm(dim=-1, keepdim=True)
    away = torch.nn.functional.normalize(end - cosine * start, dim=-1)
    held = least_cosine * start + (1 - least_cosine**2) ** 0.5 * away
    far = (cosine < least_cosine) & (atoms != origin).any(dim=-1, keepdim=True)
    return torch.where(far, torch.nn.functional.normalize(held, dim=-1).to(atoms.dtype), atoms)


def least_squares_atoms(
    x: Float[Tensor, "m d"], codes: SparseCodes, atoms: Float[Tensor, "n d"], steps: int = CG_STEPS
) -> Float[Tensor, "n d"]:
    """`steps` steps from `atoms` to the D that minimises |x - C D|^2 + ridge |D - atoms|^2.

    C is the sparse matrix of `codes`; columns of D are solved for side by side, as many as stay in a
    cache, with the diagonal of the normal equations as preconditioner.
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
    """`steps` steps from zero to the solution of `apply(z) = residual`, each column by itself."""
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

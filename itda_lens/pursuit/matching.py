"""Matching pursuit on one chunk of rows (Mallat & Zhang, 1993)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itda_lens.pursuit.codes import checked_energy


def search(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    gram: Float[Tensor, "n n"] | None,
    k: int,
    signed: bool,
    rtol: float,
    threshold: float,
) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Pick up to `k` atoms per row, greedily; an atom may be picked again.

    Each step takes j = argmax |<r, d_j>| (without the modulus, and only while positive, if not
    `signed`), c = <r, d_j>, r -= c d_j. With `gram` the correlations <r, d_j> are updated by its rows
    and the residual is never formed. A row stops before it takes a step with |c| below `threshold`.

    Returns:
        picks: the atom of each step, -1 once the row has stopped.
        coefficients: c of each step, 0 once the row has stopped.
    """
    b = x.shape[0]
    picks = torch.full((b, k), -1, dtype=torch.long, device=x.device)
    coefficients = x.new_zeros(b, k)
    correlations = x @ atoms.T
    residual = x.clone() if gram is None else None
    start = energy = x.double().square().sum(dim=-1)
    active = energy > 0
    for step in range(k):
        score = correlations.abs() if signed else correlations
        best, j = score.max(dim=-1)  # the first of equal maxima
        active = active & (best > 0) & (best >= threshold)
        c = correlations.gather(-1, j[:, None]).squeeze(-1).masked_fill(~active, 0)
        picks[:, step] = j.masked_fill(~active, -1)
        coefficients[:, step] = c
        if residual is None:
            assert gram is not None
            correlations.addcmul_(gram[j], c[:, None], value=-1)
            energy = energy - c.double().square()
            energy = checked_energy(
                energy, start, x, atoms, picks[:, : step + 1], coefficients[:, : step + 1]
            )
        else:
            residual.addcmul_(atoms[j], c[:, None], value=-1)
            energy = residual.double().square().sum(dim=-1)
            correlations = residual @ atoms.T
        active = active & (energy > rtol**2 * start)
        if not active.any():
            break
    return picks, coefficients


def replay(
    x: Float[Tensor, "b d"], atoms: Float[Tensor, "n d"], picks: Int[Tensor, "b k"]
) -> Float[Tensor, "b k"]:
    """Coefficients of the pursuit that made `picks`, as a differentiable function of x and atoms.

    Atoms may be of any norm: a change of norm is made up for by the coefficient.
    """
    residual = x
    coefficients = []
    for step in range(picks.shape[1]):
        j = picks[:, step]
        atom = atoms[j.clamp(min=0)] * (j >= 0)[:, None]
        c = (residual * atom).sum(dim=-1) / (atom.square().sum(dim=-1) + (j < 0))
        residual = residual - c[:, None] * atom
        coefficients.append(c)
    return torch.stack(coefficients, dim=-1)

"""Orthogonal least squares with a backward pass, on one chunk of rows."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itda_lens.pursuit.codes import checked_energy, gather_sum
from itda_lens.pursuit.orthogonal import cross_gram

SURPLUS = 0.25
"""Atoms that the forward pass holds beyond k, as a share of k; the backward pass drops them again."""

AHEAD = 0.85
"""Threshold of the forward pass, as a share of that of the backward pass."""

LEAST_DISTANCE = 1e-2
"""Least squared distance from the span of the support at which an atom may be picked. An atom with a
cosine of 0.995 to a held one is at this distance. Nearer atoms explain much only by huge coefficients
that cancel. They also leave bounds on rounding errors so wide that the compiled form slows down."""


def most_held(k: int, n: int, d: int) -> int:
    """Atoms held at once, at most, for codes of `k` nonzeros over `n` atoms of width `d`."""
    return max(k, min(k + math.ceil(SURPLUS * k), n, d))


def search(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    gram: Float[Tensor, "n n"] | None,
    k: int,
    signed: bool,
    rtol: float,
    threshold: float,
) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Pick atoms forward, each the one that leaves the least error; then drop those that matter least.

    Forward: orthogonal least squares (Chen, Billings & Luo, 1989). All coefficients are solved for again
    after each pick, and the pick is the atom that then leaves the least error. It is the one of largest
    <r, d>^2 / p, where p is the squared distance of d from the span of the atoms held; OMP looks at <r,
    d> alone. A row stops before it picks an atom that explains less than `AHEAD * threshold`, squared,
    or when it holds `most_held` atoms.

    Backward: dropping an atom costs c^2 / P, for its coefficient c and its entry P on the diagonal of
    the inverse of the inner products held. The cheapest atom is dropped while there are more than `k`,
    or while it explains less than `threshold` squared. `signed` must be set.

    Returns:
        picks: the atom of each slot, -1 where the slot is unused.
        coefficients: least-squares coefficients on the picks.
    """
    b, (n, d) = len(x), atoms.shape
    most = most_held(k, n, d)
    picks = torch.full((b, most), -1, dtype=torch.long, device=x.device)
    inverse = x.new_zeros(b, most, most)  # of the Cholesky factor of the inner products held
    coefficients = x.new_zeros(b, most)
    correlations = x @ atoms.T
    distances = torch.ones_like(correlations)
    start = energy = x.double().square().sum(dim=-1)
    active = energy > 0
    scale = _scale(start.sqrt()).to(x.dtype)[:, None]
    for t in range(most):
        scores = (correlations * scale).square() / distances
        scores = scores.masked_fill(distances <= LEAST_DISTANCE, 0)
        best, j = scores.max(dim=-1)
        cross = cross_gram(atoms, gram, picks[:, :t], j)
        w = (inverse[:, :t, :t] @ cross[..., None]).squeeze(-1)
        distance = 1 - w.square().sum(dim=-1)
        step = (
            correlations.gather(-1, j[:, None]).squeeze(-1) / distance.clamp(min=LEAST_DISTANCE).sqrt()
        )
        active = active & (best > 0) & (step.abs() >= AHEAD * threshold) & (distance > LEAST_DISTANCE)
        m = torch.nn.functional.pad(-(w[:, None] @ inverse[:, :t, :t]).squeeze(1), (0, 1), value=1.0)
        m = (m / distance.clamp(min=LEAST_DISTANCE).sqrt()[:, None]).masked_fill(~active[:, None], 0)
        step = step.masked_fill(~active, 0)
        inverse[:, t, : t + 1] = m
        picks[:, t] = j.masked_fill(~active, -1)
        coefficients[:, : t + 1] += step[:, None] * m
        energy = energy - step.double().square()
        held = picks[:, : t + 1]
        energy = checked_energy(energy, start, x, atoms, held, coefficients[:, : t + 1])
        active = active & (energy > rtol**2 * start)
        if not active.any():
            break
        if gram is None:
            products = gather_sum(held.clamp(min=0), m, atoms) @ atoms.T
        else:
            products = gather_sum(held.clamp(min=0), m, gram)
        correlations = correlations - step[:, None] * products
        distances = distances - products.square()
        distances.scatter_(-1, j[:, None], 0)
    kept, coefficients = _drop_least(picks >= 0, inverse, coefficients, k, threshold, scale)
    order = (~kept).byte().argsort(dim=-1, stable=True)[:, :k]
    picks = picks.masked_fill(~kept, -1).gather(-1, order)
    return picks, coefficients.masked_fill(~kept, 0).gather(-1, order)


def _drop_least(
    held: Bool[Tensor, "b m"],
    inverse: Float[Tensor, "b m m"],
    coefficients: Float[Tensor, "b m"],
    k: int,
    threshold: float,
    scale: Float[Tensor, "b 1"],
) -> tuple[Bool[Tensor, "b m"], Float[Tensor, "b m"]]:
    """Which held atoms stay, and their coefficients."""
    enough = (threshold**2 * scale.squeeze(-1).double().square()).to(scale.dtype)
    products = inverse.transpose(-1, -2) @ inverse
    for _ in range(held.shape[1]):
        diagonal = products.diagonal(dim1=-2, dim2=-1)
        loss = torch.where(held, (coefficients * scale).square() / diagonal, torch.inf)
        least, worst = loss.min(dim=-1)
        drops = held.any(dim=-1) & ((held.sum(dim=-1) > k) | (least < enough))
        if not drops.any():
            break
        column = products.gather(-1, worst[:, None, None].expand(-1, held.shape[1], 1)).squeeze(-1)
        share = column / column.gather(-1, worst[:, None])
        share = share.masked_fill(~drops[:, None], 0)
        coefficients = coefficients - share * coefficients.gather(-1, worst[:, None])
        products = products - share[..., None] * column[:, None]
        held = held & ~(torch.nn.functional.one_hot(worst, held.shape[1]).bool() & drops[:, None])
    return held, coefficients


def _scale(norms: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Powers of two near the inverses of these norms, in float64.

    Squares of numbers scaled by them neither overflow nor vanish in float32. Beyond that, the scale does
    not change a bit of any result.
    """
    mantissa, _ = torch.frexp(norms)
    exact = torch.where(norms > 0, mantissa / norms, 1.0)
    return exact.clamp(2.0**-126, 2.0**126)

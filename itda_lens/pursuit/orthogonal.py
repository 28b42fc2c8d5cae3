"""Orthogonal matching pursuit on one chunk of rows, signed and non-negative."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itda_lens.pursuit.codes import checked_energy, gather_sum


def dependence_tolerance(dtype: torch.dtype) -> float:
    """Squared distance from the span of the support under which an atom counts as inside it.

    The distance is a difference of numbers near 1 that carry some tens of rounding errors; below
    64 of them it is noise, and dividing by it would make huge coefficients.
    """
    return 64 * torch.finfo(dtype).eps


def search(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    gram: Float[Tensor, "n n"] | None,
    k: int,
    signed: bool,
    rtol: float,
    threshold: float,
) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Pick up to `k` atoms per row, re-solving for all coefficients after each pick.

    A row stops before it picks an atom whose correlation with the residual is below `threshold`.

    Returns:
        picks: the atom of each slot, -1 where the slot is unused.
        coefficients: least-squares coefficients on the picks (non-negative ones if not `signed`).
    """
    run = _signed if signed else _non_negative
    return run(x, atoms, gram, k, rtol, threshold)


def replay(
    x: Float[Tensor, "b d"], atoms: Float[Tensor, "n d"], picks: Int[Tensor, "b k"]
) -> Float[Tensor, "b k"]:
    """Least-squares coefficients on `picks` (-1: none), as a differentiable function of x and atoms."""
    used = picks >= 0
    support = atoms[picks.clamp(min=0)] * used[..., None]
    inner = support @ support.transpose(-1, -2) + torch.diag_embed((~used).to(x.dtype))
    # Not torch.linalg.solve, whose derivative has a wrong derivative in forward mode (torch 2.13).
    factors = torch.linalg.lu_factor(inner)
    return torch.linalg.lu_solve(*factors, support @ x[..., None]).squeeze(-1)


def _signed(
    x: Tensor, atoms: Tensor, gram: Tensor | None, k: int, rtol: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Batch OMP by progressive Cholesky (Rubinstein, Zibulevsky & Elad, 2008).

    L is the Cholesky factor of the support's Gram matrix; L y = D_S x is solved by one more row a
    step, so |r|^2 = |x|^2 - |y|^2 and L^T coefficients = y.
    """
    b = x.shape[0]
    picks = torch.full((b, k), -1, dtype=torch.long, device=x.device)
    y = x.new_zeros(b, k)
    factor = torch.eye(k, dtype=x.dtype, device=x.device).repeat(b, 1, 1)
    coefficients = x.new_zeros(b, k)
    initial = x @ atoms.T
    correlations = initial
    start = energy = x.double().square().sum(dim=-1)
    active = energy > 0
    tolerance = dependence_tolerance(x.dtype)
    for t in range(k):
        j, best = _best_new(correlations.abs(), picks[:, :t])
        cross = cross_gram(atoms, gram, picks[:, :t], j)
        w = torch.linalg.solve_triangular(factor[:, :t, :t], cross[..., None], upper=False)
        w = w.squeeze(-1)
        distance = 1 - w.square().sum(dim=-1)
        active = active & (best > 0) & (best >= threshold) & (distance > tolerance)
        diagonal = distance.clamp(min=tolerance).sqrt()
        target = initial.gather(-1, j[:, None]).squeeze(-1) - (w * y[:, :t]).sum(dim=-1)
        y[:, t] = (target / diagonal).masked_fill(~active, 0)
        factor[:, t, :t] = w.masked_fill(~active[:, None], 0)
        factor[:, t, t] = diagonal.masked_fill(~active, 1)
        picks[:, t] = j.masked_fill(~active, -1)
        coefficients = torch.linalg.solve_triangular(
            factor[:, : t + 1, : t + 1].transpose(-1, -2), y[:, : t + 1, None], upper=True
        ).squeeze(-1)
        energy = energy - y[:, t].double().square()
        energy = checked_energy(energy, start, x, atoms, picks[:, : t + 1], coefficients)
        active = active & (energy > rtol**2 * start)
        if not active.any():
            break
        if t + 1 < k:
            correlations = _correlations(x, atoms, gram, initial, picks[:, : t + 1], coefficients)
    return picks, torch.nn.functional.pad(coefficients, (0, k - coefficients.shape[1]))


def _non_negative(
    x: Tensor, atoms: Tensor, gram: Tensor | None, k: int, rtol: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """The first `k` outer steps of non-negative least squares (Lawson & Hanson, 1974).

    A pick whose coefficient the constraint drives to zero gives its slot up for good; the atom itself
    may be picked again.
    """
    b = x.shape[0]
    picks = torch.full((b, k), -1, dtype=torch.long, device=x.device)
    coefficients = x.new_zeros(b, k)
    initial = x @ atoms.T
    correlations = initial
    start = x.double().square().sum(dim=-1)
    active = start > 0
    for t in range(k):
        j, best = _best_new(correlations, picks[:, :t])
        # Rounding leaves correlations of this size on atoms that the optimum does not want.
        active = active & (best > dependence_tolerance(x.dtype) * start.sqrt()) & (best >= threshold)
        picks[:, t] = j.masked_fill(~active, -1)
        passive, solved = _constrained_fit(x, atoms, picks[:, : t + 1], coefficients[:, : t + 1])
        # A row whose new atom lies in the span of the others keeps what it had and stops.
        active = active & solved
        kept = torch.where(active[:, None], passive, coefficients[:, : t + 1])
        coefficients[:, : t + 1] = kept
        picks[:, : t + 1] = picks[:, : t + 1].masked_fill(kept <= 0, -1)
        residual = x - gather_sum(picks[:, : t + 1].clamp(min=0), kept, atoms)
        active = active & (residual.double().square().sum(dim=-1) > rtol**2 * start)
        if not active.any():
            break
        if t + 1 < k:
            correlations = _correlations(x, atoms, gram, initial, picks[:, : t + 1], kept)
    return picks, coefficients


def _constrained_fit(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    picks: Int[Tensor, "b t"],
    start: Float[Tensor, "b t"],
) -> tuple[Float[Tensor, "b t"], Bool[Tensor, " b"]]:
    """Inner loop of Lawson-Hanson: from the feasible `start` to the non-negative fit on `picks`.

    Returns the coefficients, and which rows' supports were independent enough to solve.
    """
    passive = picks >= 0
    support = atoms[picks.clamp(min=0)]
    inner = support @ support.transpose(-1, -2)
    target = (support @ x[..., None]).squeeze(-1)
    current = fit = start
    solved = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(picks.shape[1] + 1):  # each turn drops at least one atom of every open row
        masked = inner * passive[:, :, None] * passive[:, None, :]
        masked = masked + torch.diag_embed((~passive).to(x.dtype))
        factor, info = torch.linalg.cholesky_ex(masked)
        smallest = factor.diagonal(dim1=-2, dim2=-1).square().amin(dim=-1)
        solved = solved & (info == 0) & (smallest > dependence_tolerance(x.dtype))
        fit = torch.cholesky_solve((target * passive)[..., None], factor).squeeze(-1)
        blocked = passive & (fit <= 0)
        open_rows = blocked.any(dim=-1) & solved
        if not open_rows.any():
            break
        # Walk from `current` towards `fit` until the first coefficient reaches zero.
        gap = (current - fit).clamp(min=torch.finfo(x.dtype).tiny)
        ratio = torch.where(blocked, current / gap, torch.inf)
        step = ratio.amin(dim=-1, keepdim=True).clamp(max=1)
        walked = current + step * (fit - current)
        dropped = blocked & ((ratio <= step) | (walked <= 0))
        walked = walked.masked_fill(dropped, 0)
        current = torch.where(open_rows[:, None], walked, fit)
        passive = passive & ~(dropped & open_rows[:, None])
    return (fit * passive).clamp(min=0), solved


def _best_new(
    score: Float[Tensor, "b n"], picks: Int[Tensor, "b t"]
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """The first highest-scoring atom that is not among `picks`, and its score."""
    if picks.shape[1]:
        b, n = score.shape
        # A slot of -1 has nothing to exclude; it points at a spare column instead.
        blocked = torch.where(picks >= 0, picks, n)
        mask = torch.zeros(b, n + 1, dtype=torch.bool, device=score.device)
        mask = mask.scatter_(-1, blocked, True)[:, :n]
        score = score.masked_fill(mask, -torch.inf)
    best, j = score.max(dim=-1)
    return j, best


def cross_gram(
    atoms: Tensor, gram: Tensor | None, picks: Int[Tensor, "b t"], j: Int[Tensor, " b"]
) -> Float[Tensor, "b t"]:
    """Inner products of each row's picks (0 for none) with its new atom `j`."""
    used = picks >= 0
    held = picks.clamp(min=0)
    if gram is not None:
        return gram[held, j[:, None]] * used
    return (atoms[held] @ atoms[j][..., None]).squeeze(-1) * used


def _correlations(
    x: Tensor,
    atoms: Tensor,
    gram: Tensor | None,
    initial: Float[Tensor, "b n"],
    picks: Int[Tensor, "b t"],
    coefficients: Float[Tensor, "b t"],
) -> Float[Tensor, "b n"]:
    """Correlations of all atoms with the residual of the current fit."""
    held = picks.clamp(min=0)
    if gram is not None:
        return initial - gather_sum(held, coefficients, gram)
    return (x - gather_sum(held, coefficients, atoms)) @ atoms.T

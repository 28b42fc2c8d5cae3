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
    """Non-negative OMP (Bruckstein, Elad & Zibulevsky, 2008).

    After each pick, all atoms picked so far are fitted by non-negative least squares. A pick whose
    coefficient is then zero is not picked again, but later fits may use it.
    """
    b = x.shape[0]
    picks = torch.full((b, k), -1, dtype=torch.long, device=x.device)
    coefficients = x.new_zeros(b, k)
    initial = x @ atoms.T
    correlations = initial
    start = x.double().square().sum(dim=-1)
    active = start > 0
    # Rounding leaves correlations of this size on atoms that the optimum does not want.
    floor = dependence_tolerance(x.dtype) * start.sqrt()
    for t in range(k):
        j, best = _best_new(correlations, picks[:, :t])
        active = active & (best > floor) & (best >= threshold)
        picks[:, t] = j.masked_fill(~active, -1)
        held = picks[:, : t + 1]
        fit, solved = _constrained_fit(x, atoms, held, coefficients[:, : t + 1], floor)
        # A row whose new atom lies in the span of the others keeps what it had and stops.
        active = active & solved
        coefficients[:, : t + 1] = torch.where(active[:, None], fit, coefficients[:, : t + 1])
        residual = x - gather_sum(held.clamp(min=0), coefficients[:, : t + 1], atoms)
        active = active & (residual.double().square().sum(dim=-1) > rtol**2 * start)
        if not active.any():
            break
        if t + 1 < k:
            correlations = _correlations(x, atoms, gram, initial, held, coefficients[:, : t + 1])
    return picks.masked_fill(coefficients <= 0, -1), coefficients


def _constrained_fit(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    picks: Int[Tensor, "b t"],
    start: Float[Tensor, "b t"],
    floor: Float[Tensor, " b"],
) -> tuple[Float[Tensor, "b t"], Bool[Tensor, " b"]]:
    """The non-negative least-squares fit on `picks`, by the method of Lawson & Hanson (1974).

    It begins at `start`, the fit on all picks but the last. Each turn drops an atom of a row, or takes
    one back that was dropped and correlates with the residual by more than `floor`.

    Returns the coefficients, and which rows' last picks were independent of the others.
    """
    chosen = picks >= 0
    support = atoms[picks.clamp(min=0)]
    inner = support @ support.transpose(-1, -2)
    target = (support @ x[..., None]).squeeze(-1)
    passive = chosen & (start > 0)
    passive[:, -1] = chosen[:, -1]
    current, done = start, ~chosen[:, -1]
    entered = torch.full_like(picks[:, -1], picks.shape[1] - 1)
    solved = torch.ones_like(done)
    for turn in range(3 * picks.shape[1]):  # a safeguard: rows are done long before
        masked = inner * passive[:, :, None] * passive[:, None, :]
        masked = masked + torch.diag_embed((~passive).to(x.dtype))
        factor, info = torch.linalg.cholesky_ex(masked)
        smallest = factor.diagonal(dim1=-2, dim2=-1).square().amin(dim=-1)
        dependent = ~done & ~((info == 0) & (smallest > dependence_tolerance(x.dtype)))
        if turn == 0:
            solved = ~dependent
        passive = passive & ~(_slot(entered, passive) & dependent[:, None])
        done = done | dependent
        fit = torch.cholesky_solve((target * passive)[..., None], factor).squeeze(-1)
        blocked = passive & (fit <= 0)
        walks = blocked.any(dim=-1) & ~done
        rests = ~blocked.any(dim=-1) & ~done
        current = torch.where(rests[:, None], fit * passive, current)
        # Walk from `current` towards `fit` until the first coefficient reaches zero.
        gap = (current - fit).clamp(min=torch.finfo(x.dtype).tiny)
        ratio = torch.where(blocked, current / gap, torch.inf)
        step = ratio.amin(dim=-1, keepdim=True).clamp(max=1)
        walked = current + step * (fit - current)
        dropped = passive & ((blocked & (ratio <= step)) | (walked <= 0)) & walks[:, None]
        passive = passive & ~dropped
        current = torch.where(walks[:, None], (walked * passive).clamp(min=0), current)
        wanted = target - (inner @ current[..., None]).squeeze(-1)
        best, back = wanted.masked_fill(~chosen | passive, -torch.inf).max(dim=-1)
        enters = rests & (best > floor)
        entered = torch.where(enters, back, entered)
        passive = passive | (_slot(back, passive) & enters[:, None])
        done = done | (rests & ~enters)
        if done.all():
            break
    return current, solved


def _slot(index: Int[Tensor, " b"], like: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Marks the slot of each row's index."""
    return torch.zeros_like(like).scatter_(-1, index[:, None], True)


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

"""How many atoms a code has on average, by the threshold at which pursuits stop."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.encode import DEFAULT_RTOL, Method, encode
from itda_lens.pursuit.gram import GramMatrix

CLOSE_ENOUGH = 0.002
"""Relative distance from the mean L0 asked for at which calibration stops."""

MOST_TRIALS = 40
"""Thresholds tried at most: mean L0 is a step function, which may jump over what was asked for."""


@torch.no_grad()
def calibrate_threshold(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "n_atoms d"],
    l0: float,
    k: int,
    *,
    method: Method = "mp",
    signed: bool = True,
    rtol: float = DEFAULT_RTOL,
    gram: GramMatrix | None = None,
) -> float:
    """The threshold of `encode` at which codes of `x` have `l0` nonzeros on average.

    One threshold for all rows spends nonzeros where they remove most error: the rule of Mutual Choice
    SAEs (Ayonrinde, 2024) and of BatchTopK (Bussmann et al., 2024), in a form in which a row's code
    does not depend on the rows beside it.

    Args:
        x: activations, centred as they will be encoded; some thousands that are no atoms themselves.
        l0: mean number of nonzeros wanted, 0 < l0 <= k.
        k: most nonzeros per code; three or four times `l0` loses little.
        atoms, method, signed, rtol, gram: as in `encode`.

    Returns:
        The threshold, in the units of x; 0 where codes of at most `k` nonzeros have no more than `l0`
        on average anyway.

    Raises:
        ValueError: `x` is empty or zero, `l0` or `k` is out of range; what `encode` raises.
    """
    if not 0 < l0 <= k:
        raise ValueError(f"l0 must be above 0 and at most k={k}, got {l0}")
    if not len(x):
        raise ValueError("x must have at least one row, got none")
    scale = x.double().square().sum(dim=-1).mean().sqrt().item()
    if not math.isfinite(scale):
        raise ValueError("x has NaN or infinite values")
    if scale == 0:
        raise ValueError("x must have a row that is not zero")

    def mean_l0(threshold: float) -> float:
        codes = encode(
            x, atoms, k, method=method, signed=signed, rtol=rtol, threshold=threshold, gram=gram
        )
        return codes.l0().double().mean().item()

    # From above, where codes are short and cheap, down to a threshold that gives too many nonzeros.
    high = low = scale
    while (found := mean_l0(low)) < l0:
        high, low = low, low / 2
        if low < 1e-6 * scale:
            return 0.0
    best = (abs(found - l0), low)
    for _ in range(MOST_TRIALS):
        if best[0] <= CLOSE_ENOUGH * l0 or high <= low * (1 + 1e-9):
            break
        middle = math.sqrt(low * high)
        found = mean_l0(middle)
        best = min(best, (abs(found - l0), middle))
        low, high = (middle, high) if found > l0 else (low, middle)
    return best[1]

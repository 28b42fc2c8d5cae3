"""How many atoms a code has on average, by the threshold at which pursuits stop."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.coding import DEFAULT_RTOL, Coding, Method
from itda_lens.pursuit.gram import GRAM_BUDGET_BYTES, GramMatrix, gram_dtype, gram_fits
from itda_lens.pursuit.prepared import PreparedAtoms

CLOSE_ENOUGH = 0.005
"""Relative distance from the mean L0 asked for, about, at which calibration stops: of some thousands of
rows the mean is not known better."""

FIRST_ROWS = 256
"""Rows, about, on which the search begins."""

FIRST_CLOSE = 0.03
"""What `CLOSE_ENOUGH` is for so few."""

NEAR = 0.025
"""Relative distance from which one more step is trusted to be close enough: a steepness that is off by a
fifth then misses by half a per cent."""

ORDINARY = 1.5
"""Factor from `STEEPNESS` up to which a measured steepness is one to trust."""

MANY_ROWS = 1000
"""Rows from which it is: with few, mean L0 moves in steps."""

STEPS = 3
"""Steps tried at most before the threshold is enclosed."""

FIRST_FACTOR = 1.05
"""By which thresholds are enclosed first."""

FASTER = 1.5
"""Exponent by which the factor grows: an L0 that cannot be had is recognised after a dozen trials."""

STEEPNESS = 2.0
"""Power of the threshold with which mean L0 is taken to fall, for a first guess; SmolLM2 has 1.8."""

MOST_TRIALS = 60
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
        x: activations, centred as they will be encoded; some thousands of text that atoms are not from.
        l0: mean number of nonzeros wanted, 0 < l0 <= k.
        k: most nonzeros per code; three or four times `l0` loses little.
        atoms, method, signed, rtol, gram: as in `encode`.

    Returns:
        The threshold, in the units of x; 0 where `l0` is `k`, or where no threshold, however small,
        gives codes of `l0` nonzeros on average.

    Raises:
        ValueError: `x` is empty or zero, `l0` or `k` is out of range; what `encode` raises.
    """
    coding = Coding(k, method, signed, rtol)
    return threshold_for_l0(x, PreparedAtoms.with_gram(atoms, coding, gram), l0)


@torch.no_grad()
def threshold_for_l0(x: Float[Tensor, "n d"], prepared: PreparedAtoms, l0: float) -> float:
    """`calibrate_threshold` for atoms that are prepared; the threshold of their coding is not looked at.

    Raises:
        ValueError: as `calibrate_threshold`.
    """
    return _calibrate([_Part(x, prepared)], l0, prepared.coding.k)


@torch.no_grad()
def calibrate_out_of_fold(
    x: Float[Tensor, "n d"],
    folds: Int[Tensor, " n"],
    atoms: Float[Tensor, "n_atoms d"],
    atom_folds: Int[Tensor, " n_atoms"],
    l0: float,
    k: int,
    *,
    method: Method = "mp",
    signed: bool = True,
    rtol: float = DEFAULT_RTOL,
) -> float:
    """The threshold of `calibrate_threshold`, with each row coded without the atoms of its own fold.

    So `x` may be of the text that atoms are from. Codes of such text have fewer nonzeros than codes of
    other text; not so where folds are of whole texts, by cross-validation (Stone, 1974).

    Args:
        x, atoms, l0, k, method, signed, rtol: as in `calibrate_threshold`.
        folds: of each row; any integers.
        atom_folds: of each atom. An atom in a fold without rows serves every row.

    Raises:
        ValueError: a fold has all atoms; what `calibrate_threshold` raises.
    """
    coding = Coding(k, method, signed, rtol)
    coding.check_atoms(len(atoms))
    order = atom_folds.argsort(stable=True)
    atoms, atom_folds = atoms[order], atom_folds[order]
    used = folds.unique().tolist()
    budget = GRAM_BUDGET_BYTES // max(1, len(used))
    if gram_fits(len(atoms), gram_dtype(atoms, method, signed), budget):
        prepared = PreparedAtoms(atoms, coding)
    else:
        prepared = PreparedAtoms.with_gram(atoms, coding, None)  # one for each fold is too large too
    parts = []
    for fold in used:
        start, stop = torch.searchsorted(atom_folds, atom_folds.new_tensor([fold, fold + 1])).tolist()
        if stop - start == len(atoms):
            raise ValueError(f"atom_folds must leave atoms for the rows of fold {fold}, got all in it")
        parts.append(_Part(x[folds == fold], prepared.without(start, stop, budget)))
    return _calibrate(parts, l0, k)


class _Part(NamedTuple):
    """Rows, and the atoms that they are coded with."""

    x: Float[Tensor, "n d"]
    atoms: PreparedAtoms


def _calibrate(parts: list[_Part], l0: float, k: int) -> float:
    check_l0(l0, k)
    n = sum(len(part.x) for part in parts)
    if not n:
        raise ValueError("x must have at least one row, got none")
    scale = math.sqrt(sum(part.x.double().square().sum().item() for part in parts) / n)
    if not math.isfinite(scale):
        raise ValueError("x has NaN or infinite values")
    if scale == 0:
        raise ValueError("x must have a row that is not zero")
    if l0 == k:
        return 0.0

    def codes(step: int, most: int, threshold: float = 0.0) -> list[SparseCodes]:
        def coded(x: Tensor, atoms: PreparedAtoms) -> SparseCodes:
            coding = replace(atoms.coding, k=min(most, len(atoms)), threshold=threshold)
            return atoms.with_coding(coding).encode(x)

        return [coded(x[::step], atoms) for x, atoms in parts]

    def mean_l0(step: int, threshold: float) -> float:
        return torch.cat([part.l0() for part in codes(step, k, threshold)]).double().mean().item()

    def find(step: int, start: float, enough: float) -> float:
        trust = n / step >= MANY_ROWS
        return _find(partial(mean_l0, step), l0, start, least, enough, trust)

    # First on few rows, then near what they say.
    step = max(1, n // FIRST_ROWS)
    least = 1e-6 * scale
    start = min(max(least, _guess(codes(step, math.ceil(l0)))), scale)
    return find(1, max(least, find(step, start, FIRST_CLOSE)), CLOSE_ENOUGH)


def check_l0(l0: float, k: int) -> None:
    """Raise ValueError unless codes of at most `k` nonzeros can have `l0` on average."""
    if not 0 < l0 <= k:
        raise ValueError(f"l0 must be above 0 and at most k={k}, got {l0}")


def _guess(codes: list[SparseCodes]) -> float:
    """From codes of a fixed length: the least coefficient of an ordinary row."""
    sizes = [part.values.abs() for part in codes]
    least = [size.masked_fill(size == 0, torch.inf).amin(dim=-1) for size in sizes]
    return torch.cat(least).median().item()


def _find(
    mean_l0: Callable[[float], float],
    l0: float,
    start: float,
    least: float,
    enough: float,
    trust: bool,
) -> float:
    """Where `mean_l0`, which falls with the threshold, is `l0`, looked for from `start`; 0 if it is
    lower at `least` still.

    A few steps first: near l0 mean L0 falls about as a power of the threshold. With `trust`, once that
    power is known from two thresholds, and an ordinary one, the last step is not tried; where L0 jumps,
    or falls no more, `_enclose` goes on.
    """
    threshold, before = start, math.nan
    steepness, ordinary = STEEPNESS, False
    trials: dict[float, float] = {}
    for _ in range(STEPS):
        trials[threshold] = found = mean_l0(threshold)
        if _close(trials, l0, enough):
            return threshold
        if 0 < found != trials.get(before, 0) > 0:
            measured = math.log(trials[before] / found) / math.log(threshold / before)
            steepness = min(max(measured, STEEPNESS / 2), STEEPNESS * 2)
            ordinary = STEEPNESS / ORDINARY <= measured <= STEEPNESS * ORDINARY
        before = threshold
        threshold *= min(max((found / l0) ** (1 / steepness), 0.5), 2.0)
        if trust and ordinary and abs(found - l0) <= NEAR * l0:
            return threshold
        if threshold < least:
            break
    return _enclose(mean_l0, l0, trials, least, enough)


def _close(trials: dict[float, float], l0: float, enough: float) -> bool:
    return min(abs(found - l0) for found in trials.values()) <= enough * l0


def _enclose(
    mean_l0: Callable[[float], float],
    l0: float,
    trials: dict[float, float],
    least: float,
    enough: float,
) -> float:
    """The same, surely: thresholds from those of `trials` (which holds the mean L0 of some) outwards, in
    growing steps, until two of them enclose it; then by interpolation of logarithms."""
    low = max((tried for tried, found in trials.items() if found >= l0), default=min(trials))
    high = min((tried for tried in trials if tried > low), default=low)
    factor = FIRST_FACTOR
    while trials[low] < l0 and not _close(trials, l0, enough):
        if low < least:
            return 0.0
        high, low, factor = low, low / factor, factor**FASTER
        trials[low] = mean_l0(low)
    while trials[high] > l0 and not _close(trials, l0, enough):
        low, high, factor = high, high * factor, factor**FASTER
        trials[high] = mean_l0(high)
    while len(trials) < MOST_TRIALS and high > low * (1 + 1e-9) and not _close(trials, l0, enough):
        share = (trials[low] - l0) / (trials[low] - trials[high])
        middle = low * (high / low) ** min(max(share, 0.05), 0.95)
        trials[middle] = found = mean_l0(middle)
        low, high = (middle, high) if found > l0 else (low, middle)
    return min(trials, key=lambda threshold: (abs(trials[threshold] - l0), threshold))

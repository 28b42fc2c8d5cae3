"""Calibration: the threshold of pursuits at which codes have a wanted number of nonzeros on average."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.coding import DEFAULT_RTOL, Coding, Method
from itda_lens.pursuit.gram import GRAM_BUDGET_BYTES, GramMatrix, gram_dtype, gram_fits
from itda_lens.pursuit.prepared import PreparedAtoms

CLOSE_ENOUGH = 0.005
"""Calibration stops at about this relative distance between the mean L0 and the `l0` asked for. A few
thousand rows do not tell the mean better."""

FIRST_ROWS = 256
"""About how many rows the search for a threshold begins on."""

FIRST_CLOSE = 0.03
"""The search on the first few rows stops at this relative distance between the mean L0 and `l0`."""

NEAR = 0.025
"""At this relative distance from `l0` or nearer, one more step is trusted without a test. If the
measured steepness is off by a fifth, that step misses `l0` by half a per cent."""

ORDINARY = 1.5
"""A measured steepness is trusted if it differs from `STEEPNESS` by no more than this factor."""

MANY_ROWS = 1000
"""A measured steepness is trusted only on at least this number of rows: on fewer, mean L0 moves in
steps."""

STEPS = 3
"""Most steps that are tried before the search turns to enclosing the threshold."""

FIRST_FACTOR = 1.05
"""Factor between a threshold that was tried and the first one outwards from it, when the search
encloses."""

FASTER = 1.5
"""Each further step outwards raises its factor to this power, when the search encloses. So a dozen
trials recognise an L0 that cannot be had."""

STEEPNESS = 2.0
"""First guess of a search: mean L0 falls as this power of the threshold. On SmolLM2 it is 1.8."""

MOST_TRIALS = 60
"""Most thresholds that are tried. Mean L0 is a step function, which may jump over the `l0` asked for."""


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

    One threshold for all rows spends nonzeros where they remove most error. This is the rule of Mutual
    Choice SAEs (Ayonrinde, 2024) and of BatchTopK (Bussmann et al., 2024), in a form in which a row's
    code does not depend on the rows beside it.

    Args:
        x: a few thousand activations of texts that no atom comes from, centred as they will be encoded.
        l0: mean number of nonzeros wanted, 0 < l0 <= k.
        k: most nonzeros per code; three or four times `l0` loses little.
        atoms, method, signed, rtol, gram: as in `encode`.

    Returns:
        The threshold, in the units of x. It is 0 where `l0` is `k`, or where no threshold, however
        small, lets codes have `l0` nonzeros on average.

    Raises:
        ValueError: `x` is empty or zero, `l0` or `k` is out of range, or `encode` refuses the input.
    """
    coding = Coding(k, method, signed, rtol)
    return threshold_for_l0(x, PreparedAtoms.with_gram(atoms, coding, gram), l0)


@torch.no_grad()
def threshold_for_l0(x: Float[Tensor, "n d"], prepared: PreparedAtoms, l0: float) -> float:
    """The threshold at which codes of `x` over prepared atoms have `l0` nonzeros on average.

    `calibrate_threshold` prepares atoms and then does this. The threshold of the atoms' own coding is
    ignored.

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
    """The threshold for `l0` nonzeros on average, found without the atoms of each row's own fold.

    Unlike in `calibrate_threshold`, `x` may be of the text that atoms come from. Codes of such text have
    fewer nonzeros than codes of other text. That is put right by cross-validation (Stone, 1974): each
    row is coded with the atoms of other folds only. Each text must lie whole in one fold.

    Args:
        x, atoms, l0, k, method, signed, rtol: as in `calibrate_threshold`.
        folds: the fold of each row; any integers.
        atom_folds: the fold of each atom. An atom in a fold without rows serves every row.

    Raises:
        ValueError: one fold has all atoms; or as `calibrate_threshold`.
    """
    coding = Coding(k, method, signed, rtol)
    return _calibrate([part for _, part in _out_of_fold(x, folds, atoms, atom_folds, coding)], l0, k)


@torch.no_grad()
def unexplained_out_of_fold(
    x: Float[Tensor, "n d"],
    folds: Int[Tensor, " n"],
    atoms: Float[Tensor, "n_atoms d"],
    atom_folds: Int[Tensor, " n_atoms"],
    coding: Coding,
) -> Float[Tensor, " n"]:
    """The share of each row's energy that its code leaves, |x - xhat|^2 / |x|^2, as for other text.

    Each row is coded without the atoms of its own fold.

    Args:
        x: activations, centred as they will be encoded.
        folds, atoms, atom_folds: as in `calibrate_out_of_fold`.
        coding: how the dictionary codes; its `k` is cut to the number of atoms that are left.

    Returns:
        The shares in float64, on the device of `x`; 0 for a row of zeros.

    Raises:
        ValueError: one fold has all atoms; or as `encode`.
    """
    left = x.new_zeros(len(x), dtype=torch.float64)
    for rows, (part, prepared) in _out_of_fold(x, folds, atoms, atom_folds, coding):
        codes = prepared.encode(part)
        error = (part - codes.decode(prepared.atoms)).double().square().sum(dim=-1)
        energy = part.double().square().sum(dim=-1)
        left[rows] = error / energy.clamp(min=torch.finfo(torch.float32).tiny)
    return left


def _out_of_fold(
    x: Float[Tensor, "n d"],
    folds: Int[Tensor, " n"],
    atoms: Float[Tensor, "n_atoms d"],
    atom_folds: Int[Tensor, " n_atoms"],
    coding: Coding,
) -> "Iterator[tuple[Bool[Tensor, ' n'], _Part]]":
    """For each fold, which rows are in it, and these rows with the atoms of all other folds.

    Raises:
        ValueError: one fold has all atoms.
    """
    coding.check_atoms(len(atoms))
    order = atom_folds.argsort(stable=True)
    atoms, atom_folds = atoms[order], atom_folds[order]
    used = folds.unique().tolist()
    budget = GRAM_BUDGET_BYTES // max(1, len(used))
    if gram_fits(len(atoms), gram_dtype(atoms, coding.method, coding.signed), budget):
        prepared = PreparedAtoms(atoms, coding)
    else:
        prepared = PreparedAtoms.with_gram(atoms, coding, None)  # those of the folds are too large too
    for fold in used:
        start, stop = torch.searchsorted(atom_folds, atom_folds.new_tensor([fold, fold + 1])).tolist()
        if stop - start == len(atoms):
            raise ValueError(f"atom_folds must leave atoms for the rows of fold {fold}, got all in it")
        rows = folds == fold
        yield rows, _Part(x[rows], prepared.without(start, stop, budget))


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

    # First on few rows; then on all rows, from the threshold that the few gave.
    step = max(1, n // FIRST_ROWS)
    least = 1e-6 * scale
    start = min(max(least, _guess(codes(step, math.ceil(l0)))), scale)
    return find(1, max(least, find(step, start, FIRST_CLOSE)), CLOSE_ENOUGH)


def check_l0(l0: float, k: int) -> None:
    """Raise ValueError unless codes of at most `k` nonzeros can have `l0` on average."""
    if not 0 < l0 <= k:
        raise ValueError(f"l0 must be above 0 and at most k={k}, got {l0}")


def _guess(codes: list[SparseCodes]) -> float:
    """A first threshold, from codes of a fixed length: the median over rows of the least coefficient."""
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
    """Search from `start` for the threshold at which `mean_l0` is `l0`.

    `mean_l0` falls as the threshold grows; near `l0` it falls about as a power of the threshold. So a
    few steps are tried first. With `trust`, once two thresholds have shown that power and it is an
    ordinary one, the last step is not tested. If L0 jumps or falls no more, `_enclose` goes on.

    Returns:
        The threshold; 0 if even at `least` the mean is lower than `l0`.
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
    """Search for the threshold at which `mean_l0` is `l0`, also where mean L0 jumps.

    The search moves outwards from the thresholds in `trials`, which holds the mean L0 of those tried
    already. It takes growing steps until two thresholds enclose `l0`, then interpolates logarithms.

    Returns:
        The threshold tried whose mean is nearest to `l0`; 0 if even at `least` the mean is lower.
    """
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

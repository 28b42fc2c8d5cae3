"""The rule of presets "best" and "thorough": of a sample of activations, those of the most energy."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.dictionary.folds import FoldedSample, assign_folds
from itda_lens.dictionary.labels import Label
from itda_lens.dictionary.mean import RunningMean
from itda_lens.dictionary.outliers import duplicate_cosines, limit_outliers, robust_centre
from itda_lens.dictionary.sampling import StreamSample
from itda_lens.dictionary.selection import (
    SAME_DIRECTION,
    Dictionary,
    first_of_direction,
    nearest_rows,
    normalize_rows,
    order_by_energy,
    prune_by_energy,
)
from itda_lens.dictionary.update import update_atoms
from itda_lens.dictionary.variance import RunningFVU
from itda_lens.pursuit import encode

CANDIDATES_PER_ATOM = 4
"""Size of the pool that atoms are chosen from, in multiples of the atoms wanted."""

MIN_CANDIDATES = 1024
"""Size of the pool at least: a few atoms are chosen badly from a few times as many."""

SCORED_PER_ATOM = 3
"""Activations on which candidates are scored, in multiples of the atoms wanted."""

MIN_SCORED = 16_384
"""The same, at least; see docs/selection.md for its effect."""

DROP_PER_ROUND = 0.5
"""Fraction of the candidates that one round of pruning drops."""

NEAR_DUPLICATE = 0.85
"""Cosine (after centring) from which a candidate repeats an earlier one."""

RELAXED = (0.9, 0.95, 0.99, SAME_DIRECTION)
"""What counts as a repetition instead, in turn, while fewer candidates than atoms are left."""

ORDERED_ON = 2048
"""Activations, at most, that decide the order of the chosen atoms."""

UPDATE_SAMPLES = 2
"""Samples for rounds of least-squares update, in turn (all of the stream, where it is short)."""

UPDATE_ROUNDS = 2
"""Rounds of an update of preset "best"."""

THOROUGH_ROUNDS = 8
"""Rounds of an update of preset "thorough", and those before it replaces atoms by activations."""

REPLACEMENTS_PER_ATOM = 16
"""Activations that may take the place of an atom of preset "thorough", in multiples of the atoms."""

MIN_REPLACEMENTS = 65_536
"""The same, at least: the more there are, the less is lost by taking the nearest."""

UPDATED_PER_ATOM = 4
"""Activations of one such sample, in multiples of the atoms: more than `SCORED_PER_ATOM`."""

MIN_UPDATED = 24_576
"""The same, at least: more than `MIN_SCORED`."""

THOROUGH_MIN_UPDATED = 49_152
"""The same of preset "thorough"."""

CALIBRATION_ROWS = 2048
"""Activations to calibrate a threshold on: their mean L0 is off by a 45th of its standard deviation."""

GUIDE_ROWS = 64
"""Activations per update on which the progress bar's FVU is measured."""


class EnergySelector:
    """Centre, sample, drop near-duplicates, prune and order by energy; with `update`, least squares.

    One pass over the stream keeps its exact mean and uniform samples of it: candidates, distinct ones,
    and activations to score them on; for least squares the latter is larger, and there is another; with
    `sample` there is a small one, to calibrate a threshold on. Memory is bounded by the samples; neither
    these nor the result depend on how the stream is cut into batches.

    With `thorough` the chosen atoms are refined: least squares moves them, then each is replaced by the
    activation nearest to it, of a sample that holds the candidates and many more.

    An update, with `thorough` of more rounds, begins at the atoms that would be chosen without one, and
    labels keep their cosine to them.
    """

    def __init__(
        self, d_in: int, d_sae: int, k: int, *, signed: bool, thorough: bool, update: bool, sample: bool,
        seed: int, least_cosine: float, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self._d_sae, self._k, self._signed, self._least_cosine = d_sae, k, signed, least_cosine
        self._n_candidates = max(MIN_CANDIDATES, CANDIDATES_PER_ATOM * d_sae)
        self._n_scored = max(MIN_SCORED, SCORED_PER_ATOM * d_sae)
        least = THOROUGH_MIN_UPDATED if thorough else MIN_UPDATED
        n_updated = max(least, UPDATED_PER_ATOM * d_sae)
        n_replacements = max(MIN_REPLACEMENTS, REPLACEMENTS_PER_ATOM * d_sae)
        # A larger sample of the same seed holds the smaller one: neither candidates nor scores change.
        self._activations = StreamSample(
            d_in, n_replacements if thorough else self._n_candidates, seed, dtype, device, distinct=True
        )
        self._samples = [
            StreamSample(d_in, size, seed + 1 + i, dtype, device, distinct=False)
            for i, size in enumerate(
                [n_updated] * UPDATE_SAMPLES if update or thorough else [self._n_scored]
            )
        ]
        self._calibration = (
            StreamSample(
                d_in, CALIBRATION_ROWS, seed + 1 + UPDATE_SAMPLES, dtype, device, distinct=False
            )
            if sample
            else None
        )
        self._thorough, self._update = thorough, update
        self._mean = RunningMean(d_in, dtype, device)

    @property
    def n_atoms(self) -> int:
        return min(self._d_sae, len(self._activations))

    @property
    def done(self) -> bool:
        return False

    def update(self, x: Float[Tensor, "m d"], labels: Sequence[Label]) -> None:
        self._mean.update(x)
        self._activations.update(x, labels)
        for sample in self._samples:
            sample.update(x)
        if self._calibration is not None:
            self._calibration.update(x, labels)

    def running_fvu(self) -> float:
        """FVU of a random dictionary from the candidates so far: what selection starts from.

        NaN until there are more activations than atoms, since each would be its own atom.
        """
        if self._activations.n_seen <= self._d_sae:
            return float("nan")
        mean = self._mean.value()
        atoms, usable = normalize_rows(self._activations.held[: self._d_sae] - mean)
        atoms = atoms[usable]
        # The last rows: while the samples still hold everything, they are not among those atoms.
        x = self._samples[0].held[-GUIDE_ROWS:] - mean
        codes = encode(x, atoms, min(self._k, len(atoms)), signed=self._signed)
        guide = RunningFVU()
        guide.update(x, codes.decode(atoms))
        return guide.value()

    def finish(self, progress: bool) -> Dictionary:
        scored = self._samples[0].rows(self._n_scored)
        mean = robust_centre(scored, self._mean.value())
        x = limit_outliers(scored - mean)
        del scored
        atoms, labels = self._chosen(x, mean, progress)
        parts = self._parts(mean) if self._update or self._thorough else []
        if self._thorough:
            atoms, labels = self._refined(parts, atoms, mean, progress)
        order = order_by_energy(
            _spread(x, ORDERED_ON), atoms, self._k, signed=self._signed, drop=DROP_PER_ROUND
        )
        atoms, labels = atoms[order], [labels[i] for i in order.tolist()]
        del x
        sample = None
        if self._calibration is not None:
            folds = assign_folds(self._calibration.labels(), labels)
            sample = FoldedSample(self._calibration.rows(), *folds)
        if self._update:
            updated = update_atoms(
                parts, atoms, self._k,
                least_cosine=self._least_cosine, signed=self._signed, progress=progress,
            )  # fmt: skip
            cosines = (updated * atoms).sum(dim=-1).tolist()
            # Six digits: a label is text, and an atom that did not move has exactly 1.
            labels = [replace(a, cosine=round(c, 6)) for a, c in zip(labels, cosines, strict=True)]
            atoms = updated
        return Dictionary(atoms, mean, labels, sample)

    def _chosen(self, x: Tensor, mean: Tensor, progress: bool) -> tuple[Tensor, list[Label]]:
        """The candidates that carry the most energy of `x`, in the order of the stream."""
        rows = self._activations.rows(self._n_candidates) - mean
        unit, usable = normalize_rows(rows)
        keep = self._distinct(rows, unit, usable)
        candidates = unit[keep]
        chosen = prune_by_energy(
            x, candidates, self._d_sae, self._k,
            signed=self._signed, drop=DROP_PER_ROUND, progress=progress,
        )  # fmt: skip
        labels = self._activations.labels(self._n_candidates)
        origin = keep.nonzero().flatten()[chosen].tolist()
        return candidates[chosen], [labels[i] for i in origin]

    def _parts(self, mean: Tensor) -> list[Tensor]:
        """A sample for each round of least squares: there are fewer of them, which come in turn."""
        samples = [limit_outliers(sample.rows() - mean) for sample in self._samples]
        return list(islice(cycle(samples), THOROUGH_ROUNDS if self._thorough else UPDATE_ROUNDS))

    def _refined(
        self, parts: list[Tensor], atoms: Tensor, mean: Tensor, progress: bool
    ) -> tuple[Tensor, list[Label]]:
        """The activations that are nearest to the atoms once they have been moved."""
        moved = update_atoms(
            parts, atoms, self._k, least_cosine=0.0, signed=self._signed, progress=progress
        )
        # Cut first: one that is a million times as long would make all others pass for rounding errors.
        unit, usable = normalize_rows(limit_outliers(self._activations.rows() - mean))
        origin = usable.nonzero().flatten()
        if not usable.all():
            unit = unit[usable]
        found = nearest_rows(moved, unit, self._signed)
        labels = self._activations.labels()
        return unit[found], [labels[i] for i in origin[found].tolist()]

    def _distinct(self, rows: Tensor, unit: Tensor, usable: Tensor) -> Tensor:
        """Candidates that repeat no earlier one; where they are few, by a less strict cosine."""
        keep = usable
        for cosine in (NEAR_DUPLICATE, *(c for c in RELAXED if c > NEAR_DUPLICATE)):
            cosines = duplicate_cosines(rows[usable], cosine).clamp(max=SAME_DIRECTION)
            keep = usable.clone()
            keep[usable] = first_of_direction(unit[usable], cosines, self._signed)
            if keep.sum() >= self._d_sae:
                return keep
        raise ValueError(
            f"d_sae must be at most the number of distinct activations: got d_sae={self._d_sae}, but "
            f"{self._activations.n_seen} activations point in only {int(keep.sum())} directions "
            "from their mean"
        )


def _spread(rows: Float[Tensor, "n d"], at_most: int) -> Float[Tensor, "m d"]:
    """All rows, or `at_most` of them in equal distances."""
    if len(rows) <= at_most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, at_most, device=rows.device).round().long()]

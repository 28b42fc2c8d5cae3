"""The rule of presets "best" and "thorough": it keeps the activations that carry most energy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.dictionary.mean import ExactSum
from itda_lens.dictionary.outliers import duplicate_cosines, limit_outliers, robust_centre
from itda_lens.dictionary.rule import Dictionary, Request
from itda_lens.dictionary.sampling import PriorityBound, StreamSample
from itda_lens.dictionary.selection import (
    SAME_DIRECTION,
    first_of_direction,
    nearest_rows,
    normalize_rows,
    order_by_energy,
    prune_by_energy,
)
from itda_lens.dictionary.update import DEFAULT_LEAST_COSINE, update_atoms
from itda_lens.dictionary.variance import RunningFVU
from itda_lens.pursuit import encode
from itda_lens.records import Label, Places, check_fields

GUIDE_ROWS = 64
"""Activations per update on which the progress bar's FVU is measured."""


@dataclass(frozen=True)
class EnergyRule:
    """Centre, sample, drop near-duplicates, keep the candidates that carry the most energy.

    Candidates are a uniform sample of the distinct activations. Rounds of pruning code other activations
    with them and drop those of the least energy (`prune_by_energy`). The chosen atoms are ordered by
    importance, so that a prefix of them is a good dictionary too.

    With `refine`, least squares then moves the atoms, and each is replaced by the activation nearest to
    where it lies. With `update`, least squares moves the atoms for good: they are no longer activations,
    and labels keep their cosine to the activation that they started from.

    The size of a sample is a multiple of the number of atoms wanted (fields `..._per_atom`), but never
    below a least size (fields `min_...`): a handful of atoms would be chosen badly from a small sample.
    docs/selection.md has the effect of each setting.

    Attributes:
        update: whether least squares moves the chosen atoms for good.
        least_cosine: an update leaves no atom with a smaller cosine to its activation; 0 to 1.
        refine: whether atoms are replaced by better activations (preset "thorough").
        rounds: how many rounds of least squares move the atoms, with `update` as with `refine`.
        candidates_per_atom, min_candidates: size of the sample that atoms are chosen from.
        scored_per_atom, min_scored: size of the sample that candidates are scored on.
        updated_per_atom, min_updated: size of each sample that least squares fits atoms to. The first of
            these samples includes the one that candidates are scored on.
        update_samples: how many samples for least squares there are; the rounds use them in turn.
        replacements_per_atom, min_replacements: size of the sample that replacements come from, with
            `refine`. In a larger sample, the nearest activation is nearer.
        drop_per_round: fraction of the candidates that one round of pruning drops.
        near_duplicate: a candidate is dropped if its cosine to an earlier one, after centring, is at
            least this.
        relaxed: larger values of `near_duplicate`. They are tried in order while fewer candidates are
            left than atoms are wanted.
        ordered_on: the most activations on which the order of the chosen atoms is decided.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field is of another type.
    """

    update: bool = False
    least_cosine: float = DEFAULT_LEAST_COSINE
    refine: bool = False
    rounds: int = 2
    candidates_per_atom: int = 4
    min_candidates: int = 1024
    scored_per_atom: int = 3
    min_scored: int = 16_384
    updated_per_atom: int = 4
    min_updated: int = 24_576
    update_samples: int = 2
    replacements_per_atom: int = 16
    min_replacements: int = 65_536
    drop_per_round: float = 0.5
    near_duplicate: float = 0.85
    relaxed: tuple[float, ...] = (0.9, 0.95, 0.99, SAME_DIRECTION)
    ordered_on: int = 2048

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.least_cosine <= 1:
            raise ValueError(f"least_cosine must be between 0 and 1, got {self.least_cosine}")
        if not 0 < self.drop_per_round < 1:
            raise ValueError(
                f"drop_per_round must be between 0 and 1 (both excluded), got {self.drop_per_round}"
            )
        for name in ("candidates_per_atom", "scored_per_atom", "updated_per_atom", "update_samples",
                     "replacements_per_atom", "ordered_on"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def selector(self, request: Request) -> "EnergySelector":
        """A fresh run.

        Raises:
            ValueError: `request.d_sae` is None, since this rule does not choose the number of atoms.
        """
        return EnergySelector(self, request)


class EnergySelector:
    """A run of `EnergyRule`.

    One pass over the stream keeps its exact mean and uniform samples of it. The samples bound the
    memory. Neither they nor the result depend on the order of the stream or on its batches.
    """

    def __init__(self, rule: EnergyRule, request: Request) -> None:
        if request.d_sae is None:
            raise ValueError("d_sae must be given for the rule of most energy, got None")
        d_in, dtype, device, seed = request.d_in, request.dtype, request.device, request.seed
        self._rule, self._d_sae = rule, request.d_sae
        self._coding, self._signed = request.coding, request.signed
        self._n_candidates = max(rule.min_candidates, rule.candidates_per_atom * self._d_sae)
        self._n_scored = max(rule.min_scored, rule.scored_per_atom * self._d_sae)
        n_updated = max(rule.min_updated, rule.updated_per_atom * self._d_sae)
        n_replacements = max(rule.min_replacements, rule.replacements_per_atom * self._d_sae)
        # A larger sample of the same seed holds the smaller one: neither candidates nor scores change.
        self._activations = StreamSample(
            d_in, n_replacements if rule.refine else self._n_candidates, seed, dtype, device,
            distinct=True, labelled=True,
        )  # fmt: skip
        sizes = [n_updated] * rule.update_samples if self._moves else [self._n_scored]
        self._samples = [
            StreamSample(d_in, size, seed + 1 + i, dtype, device, distinct=False, labelled=False)
            for i, size in enumerate(sizes)
        ]
        self._sum = ExactSum(d_in)

    @property
    def _moves(self) -> bool:
        return self._rule.update or self._rule.refine

    @property
    def n_atoms(self) -> int:
        return min(self._d_sae, len(self._activations))

    def update(self, x: Float[Tensor, "m d"], places: Places) -> None:
        self._sum.update(x)
        for sample in (self._activations, *self._samples):
            sample.update(x, places)

    def merge(self, other: "EnergySelector") -> None:
        """Take in a run of the same rule and request on another part of the stream."""
        for mine, theirs in zip(self._parts_of_state(), other._parts_of_state(), strict=True):
            mine.merge(theirs)  # pyright: ignore[reportArgumentType] (each to its like)

    def state(self) -> dict[str, Tensor]:
        """The run so far, as tensors."""
        return {
            f"{i}.{name}": value
            for i, part in enumerate(self._parts_of_state())
            for name, value in part.state().items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the state of a run of the same rule and request; this one must be fresh."""
        for i, part in enumerate(self._parts_of_state()):
            prefix = f"{i}."
            part.load({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def bounds(self, spare: float) -> list[PriorityBound]:
        """Fresh bounds of the samples: which rows can enter them is known from the places."""
        return [sample.bound(spare) for sample in (self._activations, *self._samples)]

    def limit(self, bounds: Sequence[int]) -> None:
        """Pass over the rows beyond these values of `bounds`."""
        for sample, bound in zip((self._activations, *self._samples), bounds, strict=True):
            sample.limit(bound)

    def _parts_of_state(self) -> "list[ExactSum | StreamSample]":
        return [self._sum, self._activations, *self._samples]

    def running_fvu(self) -> float:
        """FVU of a random dictionary, drawn from the candidates so far: selection improves on it.

        It is NaN until more activations than atoms were seen, since each would be its own atom.
        """
        if self._activations.n_seen <= self._d_sae:
            return float("nan")
        mean = self._mean()
        atoms, usable = normalize_rows(self._activations.held[: self._d_sae] - mean)
        atoms = atoms[usable]
        # The last rows held: while samples hold the whole stream, these are not among the atoms.
        x = self._samples[0].held[-GUIDE_ROWS:] - mean
        codes = encode(x, atoms, min(self._coding.k, len(atoms)), signed=self._signed)
        guide = RunningFVU()
        guide.update(x, codes.decode(atoms))
        return guide.value()

    def finish(self, progress: bool) -> Dictionary:
        rule = self._rule
        for sample in (self._activations, *self._samples):
            sample.check_whole()
        scored = self._samples[0].rows(self._n_scored)
        mean = robust_centre(scored, self._mean())
        x = limit_outliers(scored - mean)
        del scored
        atoms, labels = self._chosen(x, mean, progress)
        parts = self._parts(mean) if self._moves else []
        if rule.refine:
            atoms, labels = self._refined(parts, atoms, mean, progress)
        order = order_by_energy(
            _spread(x, rule.ordered_on), atoms, self._coding, drop=rule.drop_per_round
        )
        atoms, labels = atoms[order], [labels[i] for i in order.tolist()]
        del x
        if rule.update:
            updated = update_atoms(
                parts, atoms, self._coding, least_cosine=rule.least_cosine, progress=progress
)  # fmt: skip
            cosines = (updated * atoms).sum(dim=-1).tolist()
            # Six digits: a label is text, and an atom that did not move has exactly 1.
            labels = [replace(a, cosine=round(c, 6)) for a, c in zip(labels, cosines, strict=True)]
            atoms = updated
        return Dictionary(atoms, mean, labels)

    def _mean(self) -> Float[Tensor, " d"]:
        held = self._activations.held
        return self._sum.mean().to(held.device, held.dtype)

    def _chosen(self, x: Tensor, mean: Tensor, progress: bool) -> tuple[Tensor, list[Label]]:
        """The candidates that carry the most energy of `x`, in the order of the stream."""
        rows = self._activations.rows(self._n_candidates) - mean
        unit, usable = normalize_rows(rows)
        keep = self._distinct(rows, unit, usable)
        candidates = unit[keep]
        chosen = prune_by_energy(
            x, candidates, self._d_sae, self._coding, drop=self._rule.drop_per_round, progress=progress,
)  # fmt: skip
        places = self._activations.places(self._n_candidates)
        origin = keep.nonzero().flatten()[chosen].tolist()
        return candidates[chosen], [places[i] for i in origin]

    def _parts(self, mean: Tensor) -> list[Tensor]:
        """The sample for each round of least squares; rounds use the fewer samples in turn."""
        samples = [limit_outliers(sample.rows() - mean) for sample in self._samples]
        return list(islice(cycle(samples), self._rule.rounds))

    def _refined(
        self, parts: list[Tensor], atoms: Tensor, mean: Tensor, progress: bool
    ) -> tuple[Tensor, list[Label]]:
        """The activations that are nearest to the atoms once they have been moved."""
        moved = update_atoms(parts, atoms, self._coding, least_cosine=0.0, progress=progress)
        # Outliers are cut first: next to a row a million times longer, all others look like rounding.
        unit, usable = normalize_rows(limit_outliers(self._activations.rows() - mean))
        origin = usable.nonzero().flatten()
        if not usable.all():
            unit = unit[usable]
        found = nearest_rows(moved, unit, self._signed)
        places = self._activations.places()
        return unit[found], [places[i] for i in origin[found].tolist()]

    def _distinct(self, rows: Tensor, unit: Tensor, usable: Tensor) -> Tensor:
        """Mark candidates that repeat no earlier one; the limit rises while too few are left."""
        keep = usable
        first = self._rule.near_duplicate
        for cosine in (first, *(c for c in self._rule.relaxed if c > first)):
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
    """All rows, or `at_most` of them, evenly spaced."""
    if len(rows) <= at_most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, at_most, device=rows.device).round().long()]

"""Where each atom of a dictionary fires in a text: contexts, figures and neighbours, in one pass."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.analysis.label_scores import STRONG, LabelScore, RuleCounts
from itda_lens.analysis.neighbours import changed_logits, firing_together, nearest_atoms
from itda_lens.analysis.streams import EntryTable, KeptPlaces, SampledCodes
from itda_lens.records import Label, Labels, Places, agreed_cutting, at_least, checked, mix64
from itda_lens.sae import check_codable, coded, hook_name_of, labels_of, provenance_of
from itda_lens.sources import ActivationSource, Loader, ModelSource, ReadableModel, logit_weights

HALVINGS = 8
"""The histogram of coefficients has this number of bins on either side of zero, each twice as wide as
the next one towards zero."""

SAMPLED_TOKENS = 2**15
"""Tokens whose whole codes are kept for counting which atoms fire together."""

SAMPLED_FIRINGS = 4
"""The sample of an atom's firings is this number of times as large as the examples shown from it."""

QUANTILES = 1001
"""Number of quantiles of the unexplained share that are kept: of 0, 0.001, ..., 1."""


class Example(NamedTuple):
    """A token at which an atom fires.

    Attributes:
        label: the token, with some of the text around it.
        coefficient: the atom's coefficient there, signed.
    """

    label: Label
    coefficient: float


class Neighbour(NamedTuple):
    """An atom of a similar direction.

    Attributes:
        atom: its index.
        cosine: of the two directions; negative for opposite ones.
    """

    atom: int
    cosine: float


class CoFiring(NamedTuple):
    """An atom that fires at the same tokens.

    Attributes:
        atom: its index.
        share: of the tokens where the atom at hand fires, the share where this one does too.
        lift: that share divided by the share of all tokens where this one fires; 1 is chance.
    """

    atom: int
    share: float
    lift: float


class LogitChange(NamedTuple):
    """A token whose logit an atom changes through the direct path.

    Attributes:
        token: its text.
        change: of its logit, less the mean over all tokens, for a coefficient of 1. It is comparable
            within an atom only; see `sources.logit_weights`.
    """

    token: str
    change: float


@dataclass(frozen=True)
class AtomExamples:
    """Everything that one pass over a text tells of an atom.

    Attributes:
        atom: its index.
        label: where it came from; None for an SAE without labels.
        tokens: at how many tokens it has a nonzero coefficient.
        density: their share of all tokens.
        mean_size: mean absolute coefficient over these tokens; 0 if there are none.
        max_size: the largest absolute coefficient.
        negative: share of these tokens at which the coefficient is negative.
        energy: its share of the energy (sum of squared coefficients) of all codes.
        histogram: how many of its coefficients are in each bin of `Examples.edges`.
        top, bottom: tokens of the largest positive, and of the largest negative, coefficients.
        quantiles: samples of its firings, in groups of equal size from the lowest coefficients to the
            highest. The firings that are sampled are drawn evenly.
        promoted, suppressed: tokens whose logits it raises and lowers most; empty where the path to the
            logits is not known.
        firing_with: atoms that fire at the same tokens, by falling correlation.
        nearest: atoms of the most similar directions.
        score: how well its label predicts it; None without a label, or where the label's token does not
            occur in the text.
        shuffled: the same figure for the label of another atom, drawn at random.
    """

    atom: int
    label: Label | None
    tokens: int
    density: float
    mean_size: float
    max_size: float
    negative: float
    energy: float
    histogram: tuple[int, ...]
    top: tuple[Example, ...]
    bottom: tuple[Example, ...]
    quantiles: tuple[tuple[Example, ...], ...]
    promoted: tuple[LogitChange, ...]
    suppressed: tuple[LogitChange, ...]
    firing_with: tuple[CoFiring, ...]
    nearest: tuple[Neighbour, ...]
    score: LabelScore | None
    shuffled: LabelScore | None


@dataclass(frozen=True, eq=False)
class Examples(Sequence[AtomExamples]):
    """`AtomExamples` of every atom, each made when it is asked for, and figures of the whole text.

    Attributes:
        hook_name: where the activations came from.
        n_tokens: tokens that were read.
        edges: of the histogram's bins, from the lowest; the outermost are infinite.
        unexplained: quantiles 0, 0.001, ..., 1 of the share of a token's activation that its code
            leaves: |x - xhat|^2 / |x - b_dec|^2.
        tokens, density, mean_size, max_size, negative, energy: columns of `AtomExamples`, one number an
            atom.
        scores: (precision, recall, F1), first of own labels and then of shuffled ones, NaN where there
            is no rule; None for an SAE without labels.
    """

    hook_name: str
    n_tokens: int
    edges: Float[np.ndarray, " bins+1"]
    unexplained: Float[np.ndarray, " quantiles"]
    tokens: Int[np.ndarray, " d_sae"]
    density: Float[np.ndarray, " d_sae"]
    mean_size: Float[np.ndarray, " d_sae"]
    max_size: Float[np.ndarray, " d_sae"]
    negative: Float[np.ndarray, " d_sae"]
    energy: Float[np.ndarray, " d_sae"]
    scores: Float[np.ndarray, "2 d_sae 3"] | None
    _histogram: Int[np.ndarray, "d_sae bins"]
    _labels: Labels | None
    _places: KeptPlaces
    _tables: tuple[EntryTable, EntryTable, EntryTable]
    _groups: int
    _logits: tuple[dict[int, str], NDArray, NDArray] | None
    _firing: tuple[NDArray, NDArray, NDArray, int]
    _nearest: tuple[NDArray, NDArray]

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> AtomExamples: ...
    @overload
    def __getitem__(self, index: slice) -> list[AtomExamples]: ...
    def __getitem__(self, index: int | slice) -> AtomExamples | list[AtomExamples]:
        if isinstance(index, slice):
            return [self._atom(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"atom must be below {len(self)}, got {index}")
        return self._atom(index % len(self))

    def __iter__(self) -> Iterator[AtomExamples]:
        return (self._atom(i) for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Examples({len(self)} atoms at {self.hook_name!r}, {self.n_tokens:,} tokens)"

    def label_f1(self) -> tuple[float, float] | None:
        """Mean F1 of own labels and of shuffled ones, over the atoms whose own label has a score; None
        without labels, or if no label's token occurs in the text."""
        if self.scores is None:
            return None
        own, shuffled = self.scores[:, :, 2]
        scored = ~np.isnan(own)
        if not scored.any():
            return None
        return float(own[scored].mean()), float(np.nan_to_num(shuffled[scored]).mean())

    def _atom(self, i: int) -> AtomExamples:
        top, bottom, sample = (self._entries(table, i) for table in self._tables)
        sample = sorted(sample, key=lambda example: example.coefficient)
        sizes = np.linspace(0, len(sample), self._groups + 1).round().astype(int).tolist()
        groups = [sample[a:b] for a, b in itertools.pairwise(sizes)]
        shown = max(1, self._tables[0].row.shape[1] // 2)
        scores = None if self.scores is None else self.scores[:, i]
        promoted, suppressed = self._changes(i)
        return AtomExamples(
            atom=i,
            label=None if self._labels is None else self._labels[i],
            tokens=int(self.tokens[i]),
            density=float(self.density[i]),
            mean_size=float(self.mean_size[i]),
            max_size=float(self.max_size[i]),
            negative=float(self.negative[i]),
            energy=float(self.energy[i]),
            histogram=tuple(self._histogram[i].tolist()),
            top=tuple(top),
            bottom=tuple(bottom),
            quantiles=tuple(tuple(_spread(group, shown)) for group in groups if group),
            promoted=promoted,
            suppressed=suppressed,
            firing_with=self._firing_with(i),
            nearest=tuple(
                Neighbour(int(atom), float(cosine))
                for atom, cosine in zip(self._nearest[0][i], self._nearest[1][i], strict=True)
            ),
            score=None if scores is None else _score(scores[0]),
            shuffled=None if scores is None else _score(scores[1]),
        )

    def _entries(self, table: EntryTable, i: int) -> list[Example]:
        real = table.row[i] >= 0
        places = self._places.at(table.row[i][real])
        return [Example(*pair) for pair in zip(places, table.value[i][real].tolist(), strict=True)]

    def _changes(self, i: int) -> tuple[tuple[LogitChange, ...], tuple[LogitChange, ...]]:
        if self._logits is None:
            return (), ()
        tokens, ids, changes = self._logits
        n = ids.shape[1] // 2
        found = [
            LogitChange(tokens[token], change)
            for token, change in zip(ids[i].tolist(), changes[i].tolist(), strict=True)
        ]
        return tuple(found[:n]), tuple(found[n:])

    def _firing_with(self, i: int) -> tuple[CoFiring, ...]:
        others, together, count, tokens = self._firing
        return tuple(
            CoFiring(int(atom), float(both / count[i]), float(both * tokens / (count[i] * count[atom])))
            for atom, both in zip(others[i], together[i].tolist(), strict=True)
            if atom >= 0
        )


@checked
def examples(
    model: Any,
    sae: SAE[Any],
    texts: str | Path | Iterable[str],
    *,
    n_examples: int = 8,
    n_quantiles: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    max_tokens: int | None = None,
    text_field: str = "text",
    split: str = "train",
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Examples:
    """Look up where each atom fires in a text, in one pass over it.

    Use text that the dictionary was not built from: on its own text, each atom has an example that it
    is made of. Memory grows with the number of atoms and of examples, not with the text. The same
    arguments give the same result.

    Args:
        model: as in `build`; the model that `sae` belongs to.
        sae: an ITDA, or another SAE of SAELens (see `sae.ARCHITECTURES`) with a hook_name.
        n_examples: contexts of each kind that are kept for an atom.
        n_quantiles: groups of its sampled firings.
        seed: of the samples and of the shuffled labels.
        max_tokens: end after this number of tokens that count; default: after all texts.
        texts, batch_size, text_field, split, tokenizer, loader, device, progress: as in `build`.

    Raises:
        ValueError: a setting is out of range, there are no tokens, the dictionary cannot be measured
            (see `evaluate`) or belongs to another model's width, or its hook does not exist.
    """
    at_least(1, n_examples=n_examples, n_quantiles=n_quantiles)
    at_least(0, seed=seed)
    check_codable([sae])
    source = ModelSource(
        model, texts, hook_name_of(sae), agreed_cutting([provenance_of(sae)]), batch_size=batch_size,
        max_tokens=max_tokens, text_field=text_field, split=split, tokenizer=tokenizer, loader=loader,
        device=device,
    )  # fmt: skip
    return examples_from(
        source, sae, lm=source.model, n_examples=n_examples, n_quantiles=n_quantiles, seed=seed,
        progress=progress,
    )  # fmt: skip


@checked
@torch.no_grad()
def examples_from(
    source: ActivationSource,
    sae: SAE[Any],
    *,
    lm: ReadableModel | None = None,
    n_examples: int = 8,
    n_quantiles: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> Examples:
    """Look up where each atom fires among the rows of any source, images and recordings included.

    Args:
        source: where activations come from; its first hook point is read.
        sae, n_examples, n_quantiles, seed, progress: as in `examples`.
        lm: the model, for the tokens that atoms promote; default: these stay unknown.

    Raises:
        ValueError: as `examples`.
    """
    at_least(1, n_examples=n_examples, n_quantiles=n_quantiles)
    at_least(0, seed=seed)
    check_codable([sae])
    hook = source.hooks[0]
    run = _Run(sae, n_examples, n_quantiles, seed)
    with tqdm(
        total=source.n_rows, unit="tok", unit_scale=True, desc="reading", disable=not progress
    ) as bar:
        for rows in source.rows():
            run.update(rows.values[hook], rows.places)
            bar.update(len(rows.places))
    return run.finish(hook, lm, progress)


class _Run:
    """Running figures and tables of one pass."""

    def __init__(self, sae: SAE[Any], n_examples: int, n_quantiles: int, seed: int) -> None:
        d_sae = sae.cfg.d_sae
        self._sae, self._n, self._groups = sae, n_examples, n_quantiles
        self._seed = np.uint64(seed)
        self._labels = labels_of(sae)
        self._rules = None if self._labels is None else RuleCounts(self._labels, seed)
        self._top, self._bottom = EntryTable(d_sae, n_examples), EntryTable(d_sae, n_examples)
        firings = SAMPLED_FIRINGS * max(1, n_examples // 2) * n_quantiles
        self._sample = EntryTable(d_sae, firings)
        self._places, self._codes = KeptPlaces(), SampledCodes(SAMPLED_TOKENS)
        self._tokens, self._negative = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.int64)
        self._sizes, self._energy = np.zeros(d_sae), np.zeros(d_sae)
        self._largest = np.zeros(d_sae)
        self._histogram = np.zeros((d_sae, 2 * HALVINGS), dtype=np.int64)
        self._edges: NDArray[np.float64] | None = None
        self._n_tokens = 0

    def update(self, x: Float[Tensor, "n d_in"], places: Places) -> None:
        """Take a batch."""
        if x.shape[1] != self._sae.cfg.d_in:
            raise ValueError(
                f"the source gives activations of width {x.shape[1]}, but the sae has "
                f"d_in={self._sae.cfg.d_in}: it belongs to another model or hook"
            )
        uniform = mix64(places.identity + mix64(self._seed + np.uint64(1))) / np.float64(2**64)
        start = 0
        for part, codes, reconstruction in coded(self._sae, x):
            norm = (part - self._sae.b_dec).double().square().sum(dim=-1)
            error = (part.double() - reconstruction.double()).square().sum(dim=-1)
            left = error / norm.clamp(min=torch.finfo(torch.float32).tiny)
            if self._edges is None:
                self._edges = _edges(float(norm.sqrt().median()))
            stop = start + len(part)
            self._add(
                codes.indices.cpu().numpy(), codes.values.float().cpu().numpy(),
                left.cpu().numpy(), uniform[start:stop], places.take(slice(start, stop)),
            )  # fmt: skip
            start = stop

    def _add(
        self, atoms: NDArray, values: NDArray, left: NDArray, uniform: NDArray, places: Places
    ) -> None:
        first = self._n_tokens
        row, slot = np.nonzero(values)
        atom, value = atoms[row, slot], values[row, slot]
        size, d_sae = np.abs(value).astype(np.float64), len(self._tokens)
        energy = np.square(values.astype(np.float64))
        energy /= np.maximum(energy.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        share = energy[row, slot]
        self._tokens += np.bincount(atom, minlength=d_sae)
        self._negative += np.bincount(atom[value < 0], minlength=d_sae)
        self._sizes += np.bincount(atom, size, d_sae)
        self._energy += np.bincount(atom, share, d_sae)
        np.maximum.at(self._largest, atom, size)
        assert self._edges is not None  # set by update
        bins = np.searchsorted(self._edges, value, side="right") - 1
        np.add.at(self._histogram, (atom, bins.clip(0, 2 * HALVINGS - 1)), 1)

        positive = value > 0
        self._top.update(atom[positive], value[positive], first + row[positive], value[positive])
        self._bottom.update(atom[~positive], -value[~positive], first + row[~positive], value[~positive])
        self._sample.update(atom, -uniform[row], first + row, value)
        self._places.add(first, places, self._every_table())
        self._codes.update(uniform, atoms, values, left)
        if self._rules is not None:
            spelt = [place.token for place in places]
            self._rules.update(spelt, row, atom, positive & (share >= STRONG))
        self._n_tokens += len(places)

    def _every_table(self) -> list[EntryTable]:
        return [self._top, self._bottom, self._sample]

    def finish(self, hook: str, lm: ReadableModel | None, progress: bool) -> Examples:
        """Figures that need all tokens, and those that need none."""
        if self._edges is None:
            raise ValueError("the source must give at least one row, got none")
        self._places.compact(self._every_table())
        d_sae = len(self._tokens)
        atoms = self._sae.W_dec.detach().float().cpu()
        weights = None if lm is None else logit_weights(lm, hook)
        if weights is not None and len(weights) != atoms.shape[1]:
            weights = None
        with tqdm(
            total=(2 + (weights is not None)) * d_sae, unit="atom", unit_scale=True,
            desc="comparing atoms", disable=not progress,
        ) as bar:  # fmt: skip
            nearest = nearest_atoms(atoms, self._n, bar)
            firing = firing_together(self._codes.atoms, self._codes.values, d_sae, self._n, bar)
            logits = None
            if weights is not None and lm is not None:
                ids, changes = changed_logits(atoms, weights, self._n, bar)
                spelt = {i: lm.tokenizer.decode([i]) for i in np.unique(ids).tolist()}
                logits = (spelt, ids, changes)
        count = self._tokens.clip(min=1)
        return Examples(
            hook_name=hook,
            n_tokens=self._n_tokens,
            edges=self._edges,
            unexplained=np.quantile(self._codes.unexplained, np.linspace(0, 1, QUANTILES)),
            tokens=self._tokens,
            density=self._tokens / self._n_tokens,
            mean_size=self._sizes / count,
            max_size=self._largest,
            negative=self._negative / count,
            energy=self._energy / self._n_tokens,
            scores=None if self._rules is None else self._rules.scores(),
            _histogram=self._histogram,
            _labels=self._labels,
            _places=self._places,
            _tables=(self._top, self._bottom, self._sample),
            _groups=self._groups,
            _logits=logits,
            _firing=(*firing, len(self._codes.priority)),
            _nearest=nearest,
        )


def _edges(scale: float) -> NDArray[np.float64]:
    """Edges of the histogram: zero, and halves of half the median norm on either side."""
    positive = scale / 2 ** np.arange(HALVINGS - 1, 0, -1)
    return np.concatenate([[-np.inf], -positive[::-1], [0.0], positive, [np.inf]])


def _spread(group: list[Example], n: int) -> list[Example]:
    """At most n of a group, evenly spread over it."""
    if len(group) <= n:
        return group
    return [group[i] for i in np.linspace(0, len(group) - 1, n).round().astype(int)]


def _score(numbers: NDArray) -> LabelScore | None:
    return None if np.isnan(numbers[2]) else LabelScore(*numbers.tolist())

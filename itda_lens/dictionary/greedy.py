"""The "paper" rule: admit activations that the dictionary reconstructs badly (Leask et al. 2025)."""

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itda_lens.dictionary.rows import RowStore
from itda_lens.dictionary.rule import Dictionary, Request
from itda_lens.dictionary.selection import SAME_DIRECTION, first_of_direction, normalize_rows
from itda_lens.dictionary.variance import RunningFVU
from itda_lens.pursuit import Method, encode, gram_dtype, gram_fits, inner_products
from itda_lens.records import Label, Places, check_fields

DEFAULT_LOSS_THRESHOLD = 0.2
"""tau: admit an activation x if matching pursuit leaves |x - xhat|^2 > tau |x|^2.

The authors' script thresholds the mean over d of the squared difference of x/|x| and xhat/|xhat|; since
the residual is nearly orthogonal to xhat, their threshold t is tau = 1 - (1 - t d / 2)^2."""


@dataclass(frozen=True)
class GreedyRule:
    """The paper's greedy rule, batch by batch, without centring (Leask et al. 2025).

    The first `d_in` atoms (or `d_sae`, if fewer) are the most frequent activations of the first batches.
    After that, each batch is reconstructed with the dictionary so far. Activations whose relative loss
    exceeds `loss_threshold` are admitted in their order, each direction once. Once there are `d_sae`
    atoms, the rest of the stream is not looked at. The result depends on the batches.

    In real data all activations are different, so that ties decide which the first atoms are. The
    authors' script leaves that to the order of `torch.unique`, by the activations' coordinates, and to a
    sort that is not stable. So it takes an arbitrary part of the first batch, which depends on the
    model's basis: the labels of two models differ by it. The default here is comparable between models;
    "random" is an arbitrary part too, and can be repeated.

    Attributes:
        loss_threshold: relative squared error over which an activation is admitted (tau), 0 to 1.
        start: which of equally frequent activations of a batch become the first atoms: "first", those at
            the beginning of the text; "random", a draw by the request's seed. Exact repeats within a
            batch are counted in both, and the most frequent activations come first.

    Raises:
        ValueError: `loss_threshold` is not between 0 and 1, or `start` is unknown.
        TypeError: a field is of another type.
    """

    chooses_size: ClassVar[bool] = True
    encoder: ClassVar[Method] = "mp"

    loss_threshold: float = DEFAULT_LOSS_THRESHOLD
    start: Literal["first", "random"] = "first"

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.loss_threshold < 1:
            raise ValueError(
                f"loss_threshold must be between 0 and 1 (both excluded), got {self.loss_threshold}"
            )

    def selector(self, request: Request) -> "GreedySelector":
        """A fresh run; `request.d_sae` is the most atoms, or None to let `loss_threshold` decide."""
        return GreedySelector(self, request)


class GreedySelector:
    """A run of `GreedyRule`."""

    def __init__(self, rule: GreedyRule, request: Request) -> None:
        self._max_atoms, self._k, self._signed = request.d_sae, request.k, request.signed
        self._threshold = rule.loss_threshold
        self._draw = None
        if rule.start == "random":
            self._draw = torch.Generator().manual_seed(request.seed)
        d_in = request.d_in
        self._n_initial = d_in if self._max_atoms is None else min(d_in, self._max_atoms)
        self._store = RowStore(d_in, request.dtype, request.device, limit=self._max_atoms or 2**31)
        self._labels: list[Label] = []
        self._gram = torch.empty(0, 0, device=request.device)
        self._n_in_gram = 0
        self._guide = RunningFVU()

    @property
    def n_atoms(self) -> int:
        return len(self._store)

    @property
    def done(self) -> bool:
        return self._store.room == 0

    def update(self, x: Float[Tensor, "m d"], places: Places) -> None:
        if self.done:
            return
        unit, usable = normalize_rows(x)
        missing = self._n_initial - len(self._store)
        if missing > 0:
            self._admit(_most_frequent(unit, usable, self._draw), unit, places, at_most=missing)
        if len(self._store) == 0:
            return
        atoms = self._store.rows
        k = min(self._k, len(atoms))
        codes = encode(x, atoms, k, signed=self._signed, gram=self._current_gram())
        reconstruction = codes.decode(atoms)
        self._guide.update(x, reconstruction)
        loss = (x - reconstruction).square().sum(dim=-1)
        bad = usable & (loss > self._threshold * x.square().sum(dim=-1))
        self._admit(bad.nonzero().flatten(), unit, places)

    def running_fvu(self) -> float:
        """FVU of the batches when they were first seen."""
        return self._guide.value()

    def finish(self, progress: bool) -> Dictionary:
        n = len(self._store)
        if n == 0:
            raise ValueError("no activation with a norm above 0 was seen")
        if self._max_atoms is not None and n < self._max_atoms:
            warnings.warn(
                f"the dictionary has {n} atoms, not {self._max_atoms}: after them every activation was "
                f"reconstructed to loss_threshold={self._threshold}; lower it or give more text",
                stacklevel=2,
            )
        atoms = self._store.rows.clone()
        return Dictionary(atoms, torch.zeros_like(atoms[0]), list(self._labels))

    def _admit(
        self, rows: Int[Tensor, " c"], unit: Tensor, places: Places, at_most: int | None = None
    ) -> None:
        """Append the new directions among `rows` of `unit`, in order, until the dictionary is full."""
        new = first_of_direction(unit[rows], SAME_DIRECTION, self._signed, known=self._store.rows)
        room = self._store.room if at_most is None else min(at_most, self._store.room)
        chosen = rows[new][:room]
        self._store.append(unit[chosen])
        self._labels += [places[i] for i in chosen.tolist()]

    def _current_gram(self) -> Tensor | None:
        """The Gram matrix of the atoms so far; only the rows of new atoms are computed."""
        atoms = self._store.rows
        n, known = len(atoms), self._n_in_gram
        dtype = gram_dtype(atoms, signed=self._signed)
        if not gram_fits(n, dtype):
            self._gram, self._n_in_gram = atoms.new_empty(0, 0), 0
            return None
        if n > len(self._gram):
            sizes = (min(2 * n, self._max_atoms or 2 * n), 3 * n // 2, 9 * n // 8, n)
            size = next(size for size in sizes if size >= n and gram_fits(size, dtype))
            grown = atoms.new_empty(size, size, dtype=dtype)
            grown[:known, :known] = self._gram[:known, :known]
            self._gram = grown
        self._gram[known:n, :n] = inner_products(atoms[known:], atoms, dtype)
        self._gram[:known, known:n] = self._gram[known:n, :known].T
        self._n_in_gram = n
        return self._gram[:n, :n]


def _most_frequent(
    unit: Tensor, usable: Tensor, draw: torch.Generator | None = None
) -> Int[Tensor, " c"]:
    """First occurrences of the distinct rows, the most repeated first; ties in order, or as drawn."""
    rows = usable.nonzero().flatten()
    _, inverse, counts = torch.unique(unit[rows], dim=0, return_inverse=True, return_counts=True)
    first = torch.full_like(counts, len(rows))
    first.scatter_reduce_(0, inverse, torch.arange(len(rows), device=rows.device), "amin")
    by_place = first.argsort()
    if draw is not None:
        by_place = by_place[torch.randperm(len(by_place), generator=draw).to(by_place.device)]
    by_count = counts[by_place].argsort(descending=True, stable=True)
    return rows[first[by_place][by_count]]

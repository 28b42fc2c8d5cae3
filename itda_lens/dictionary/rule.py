"""The interface between rules for choosing atoms and the code that runs them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.dictionary.sampling import PriorityBound
from itda_lens.pursuit import Coding
from itda_lens.records import Label, Places


@dataclass(frozen=True)
class Dictionary:
    """Chosen atoms, not yet tied to any host library.

    Attributes:
        atoms: unit rows.
        mean: what is subtracted from an activation before it is decomposed (`b_dec`).
        labels: where each atom came from.
    """

    atoms: Float[Tensor, "d_sae d_in"]
    mean: Float[Tensor, " d_in"]
    labels: list[Label]


@dataclass(frozen=True)
class Request:
    """A request to a rule for a dictionary, with the facts about the stream that it needs.

    Attributes:
        d_in: numbers in an activation.
        d_sae: atoms; None leaves their number to the rule.
        k: nonzeros of the codes that the atoms are chosen for.
        signed: whether coefficients may be negative.
        seed: seed of all random draws of the rule.
        dtype, device: of the activations; float32 or float64.
    """

    d_in: int
    d_sae: int | None
    k: int
    signed: bool = True
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def coding(self) -> Coding:
        """The coding by which rules choose atoms: matching pursuit, however the dictionary will encode.

        It is the fastest pursuit, and the atoms that it prefers serve the other pursuits too.
        """
        return Coding(self.k, "mp", self.signed)


class Selector(Protocol):
    """One run of a rule: it sees a stream of activations once and then names its atoms."""

    def update(self, x: Float[Tensor, "m d"], places: Places) -> None:
        """See more activations (finite, at least float32) and the place of each."""
        ...

    def finish(self, progress: bool) -> Dictionary:
        """Choose; with `progress`, show a progress bar where that takes long.

        Raises:
            ValueError: too few distinct activations were seen.
        """
        ...


@runtime_checkable
class Guided(Protocol):
    """A selector that can tell how far it is, for progress bars."""

    @property
    def n_atoms(self) -> int:
        """Atoms that would be chosen if the stream ended now (before duplicates are dropped)."""
        ...

    def running_fvu(self) -> float:
        """A guide to quality so far; NaN if unknown."""
        ...


@runtime_checkable
class Sated(Protocol):
    """A selector that may have seen enough before the stream ends."""

    @property
    def done(self) -> bool:
        """Whether the rest of the stream cannot change the choice."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """A selector whose work can be stopped, moved and split.

    `state` is plain tensors, for a file. Parts of a stream can be seen by several runs of one rule and
    request, in any order, and merged: the choice is then that of one run, bit for bit on a CPU.
    """

    def state(self) -> dict[str, Tensor]:
        """The run so far, as data that `load` takes."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the state of a run of the same rule and request; this one must be fresh."""
        ...

    def merge(self, other: Any) -> None:
        """Take in a run of the same rule and request on another part of the stream."""
        ...


@runtime_checkable
class Foreseeing(Resumable, Protocol):
    """A selector that can tell from the places of a stream which rows it will look at.

    Parts of a planned stream then keep only these rows: a part of a thousand does not hold a thousandth
    of the tokens, but of the samples.
    """

    def bounds(self, spare: float) -> list[PriorityBound]:
        """Fresh bounds of its samples, each to be shown all places of the stream.

        Args:
            spare: room for rows that turn out to be equal, as a share of a sample.
        """
        ...

    def limit(self, bounds: Sequence[int]) -> None:
        """Pass over the rows beyond these values of its bounds."""
        ...


class Rule(Protocol):
    """A rule for choosing atoms: a frozen dataclass whose fields are its settings.

    A dictionary's metadata records the fields, so they must be plain data for JSON.

    Two class attributes may say more of a rule; it need not have them:

    - `chooses_size`: True if the rule can decide the number of atoms itself (`d_sae=None`).
    - `encoder`: the pursuit that dictionaries of this rule encode by, unless the user names another.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def selector(self, request: Request) -> Selector:
        """A fresh run.

        Raises:
            ValueError: the rule cannot serve this request.
        """
        ...

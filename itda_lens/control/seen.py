"""Data that operations and gates work on: the tokens of a pass that an edit may change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from itda_lens.sae import moved
from itda_lens.sources import Pass


@dataclass(frozen=True)
class Rows:
    """Some activations, as an operation sees them. All tensors are on the SAE's device.

    Attributes:
        sae: the dictionary of the edit.
        atoms: the atoms of the edit, m of them.
        x: the activations; heads are flattened into one row.
        coefficients: of `atoms`, a column each; 0 where an atom does not fire.
        positions: place of each token in its context, from 0 on.
    """

    sae: SAE[Any]
    atoms: Sequence[int]
    x: Float[Tensor, "rows d_in"]
    coefficients: Float[Tensor, "rows m"]
    positions: Int[Tensor, " rows"]

    @property
    def directions(self) -> Float[Tensor, "m d_in"]:
        """The rows of `W_dec` that belong to the atoms."""
        return self.sae.W_dec[list(self.atoms)]

    def moved(self, change: Float[Tensor, "rows m"]) -> Float[Tensor, "rows d_in"]:
        """Change of the activations when `change` is added to the coefficients."""
        return moved(self.sae, self.x, change, self.atoms)


@dataclass
class Reading:
    """All activations of a pass that an edit may change, as a gate sees them.

    Attributes:
        inputs: for each activation, the row of the batch that it belongs to.
        n_inputs: rows of the batch.
        positions: place of each token in its context, from 0 on.
        tokens: id of each token; None if the model shows no tokens.
        coefficients: of the edit's atoms, a column each.
        change: what the operation would add to the activations.
        error: reconstructions less activations.
        of_pass: the whole pass; None if the model shows no tokens.
        where: the activations' places in the pass.
        memory: what a gate keeps from pass to pass of one context; empty when a context begins.
    """

    inputs: Int[Tensor, " rows"]
    n_inputs: int
    positions: Int[Tensor, " rows"]
    tokens: Int[Tensor, " rows"] | None
    coefficients: Float[Tensor, "rows m"]
    change: Float[Tensor, "rows d_in"]
    error: Float[Tensor, "rows d_in"]
    of_pass: Pass | None
    where: Bool[Tensor, "batch seq"]
    memory: dict[str, Tensor] = field(default_factory=dict)

    def of_input(self, fired: Bool[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
        """For each activation, whether `fired` holds anywhere in its input, or has held before."""
        return self.kept("fired", self.added(fired.long()) > 0)[self.inputs]

    def added(self, values: Tensor) -> Tensor:
        """Sums over the activations of each input of this pass."""
        return values.new_zeros(self.n_inputs).index_add(0, self.inputs, values)

    def kept(self, name: str, now: Bool[Tensor, " inputs"]) -> Bool[Tensor, " inputs"]:
        """`now`, or whatever was true under this name in an earlier pass of the context."""
        return self._remembered(name, now, torch.logical_or)

    def summed(self, name: str, now: Float[Tensor, " inputs"]) -> Float[Tensor, " inputs"]:
        """`now` added to the sum of earlier passes of the context."""
        return self._remembered(name, now, torch.add)

    def _remembered(self, name: str, now: Tensor, joined: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        before = self.memory.get(name)
        if before is not None and len(before) != len(now):
            raise ValueError(
                f"the batch changed from {len(before)} to {len(now)} inputs within one context: a gate "
                "for whole inputs cannot follow it"
            )
        self.memory[name] = now if before is None else joined(before, now)
        return self.memory[name]


@runtime_checkable
class Operation(Protocol):
    """How the coefficients of an edit's atoms change. A frozen dataclass of yours with this method is
    one."""

    def change(self, rows: Rows) -> Float[Tensor, "rows d_in"]:
        """The vectors to add to the activations; zeros for a row that stays."""
        ...


@runtime_checkable
class Gate(Protocol):
    """Where an edit holds. A frozen dataclass of yours with this method is one."""

    def opens(self, reading: Reading) -> Bool[Tensor, " rows"]:
        """For each activation, whether the edit changes it."""
        ...

"""Gates: where an edit holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from itda_lens.control.seen import Reading
from itda_lens.records import at_least, check_fields

Scope = Literal["token", "input"]
"""Whether a gate decides for each token alone, or for all tokens of an input at once. Within one pass an
input is decided as a whole, so that its end can open the gate at its beginning. In a generation with a
key-value cache, an open gate stays open for the tokens that follow."""


@dataclass(frozen=True)
class Always:
    """Every token."""

    def opens(self, reading: Reading) -> Bool[Tensor, " rows"]:
        """See `Gate.opens`."""
        return torch.ones_like(reading.inputs, dtype=torch.bool)


@dataclass(frozen=True)
class Positions:
    """Tokens at some positions of their context.

    Attributes:
        positions: counted from 0, the BOS token and no padding included.

    Raises:
        ValueError: there are none, or one is negative.
    """

    positions: Sequence[int]

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "positions", tuple(self.positions))
        if not self.positions:
            raise ValueError("positions must name at least one position")
        at_least(0, positions=min(self.positions))

    def opens(self, reading: Reading) -> Bool[Tensor, " rows"]:
        """See `Gate.opens`."""
        wanted = torch.tensor(self.positions, device=reading.positions.device)
        return torch.isin(reading.positions, wanted)


@dataclass(frozen=True)
class Tokens:
    """Some tokens of the vocabulary.

    Attributes:
        ids: their ids.
    """

    ids: Sequence[int]

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "ids", tuple(self.ids))
        if not self.ids:
            raise ValueError("ids must name at least one token")

    @classmethod
    def of(cls, tokenizer: Any, *texts: str) -> "Tokens":
        """The tokens that the texts consist of, such as " cat".

        Raises:
            ValueError: they consist of none.
        """
        return cls(
            tuple({i for t in texts for i in tokenizer(t, add_special_tokens=False)["input_ids"]})
        )

    def opens(self, reading: Reading) -> Bool[Tensor, " rows"]:
        """See `Gate.opens`."""
        assert reading.tokens is not None  # `applied` has looked
        return torch.isin(reading.tokens, torch.tensor(self.ids, device=reading.tokens.device))


@dataclass(frozen=True)
class Masked:
    """Tokens that a function chooses: roles of a chat, words, whatever can be told from ids.

    Such an edit cannot be saved. With beam search, the ids of earlier tokens are not followed.

    Attributes:
        function: takes ids [batch, seq] of all tokens so far, and gives True where the edit holds.
    """

    function: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        check_fields(self)

    def opens(self, reading: Reading) -> Bool[Tensor, " rows"]:
        """See `Gate.opens`.

        Raises:
            ValueError: the function gives another shape, or no booleans.
        """
        assert reading.of_pass is not None  # `applied` has looked
        ids = reading.of_pass.so_far
        mask = self.function(ids)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != ids.shape:
            shown = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
            raise ValueError(f"function must give booleans of shape {tuple(ids.shape)}, got {shown}")
        seq = reading.of_pass.tokens.shape[1]
        return mask.to(reading.where.device)[:, -seq:][reading.where].to(reading.inputs.device)


@dataclass(frozen=True)
class FiresAbove:
    """Tokens at which one of the edit's atoms has a coefficient above a threshold.

    Attributes:
        threshold: a number for all atoms, or one for each, in the units of coefficients.
        sign: 0 compares absolute values; 1 positive coefficients; -1 negative ones, with their sign
            changed.
        scope: with "input", one such token opens the gate for its whole input.

    Raises:
        ValueError: a threshold is negative.
    """

    threshold: float | Sequence[float] = 0.0
    sign: Literal[-1, 0, 1] = 0
    scope: Scope = "token"

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.threshold, Sequence):
            object.__setattr__(self, "threshold", tuple(map(float, self.threshold)))
        numbers = self.threshold if isinstance(self.threshold, Sequence) else (self.threshold,)
        if not all(0 <= number < float("inf") for number in numbers):
            raise ValueError(f"threshold must be at least 0 and finite, got {self.threshold}")

    def opens(self, reading: Reading) -> Bool[Tensor, " rows"]:
        """See `Gate.opens`."""
        c = reading.coefficients.detach()
        c = c.abs() if self.sign == 0 else c * self.sign
        threshold = c.new_tensor(self.threshold)
        if threshold.ndim and len(threshold) != c.shape[1]:
            raise ValueError(f"threshold must have {c.shape[1]} numbers, got {len(threshold)}")
        fired = (c > threshold).any(dim=-1)
        return reading.of_input(fired) if self.scope == "input" else fired


@dataclass(frozen=True)
class Excess:
    """Inputs, or tokens, that the edit would change much.

    The score of a token is the squared norm of its change: the reconstruction error that the edit adds.
    ItD (arXiv 2503.09446) compares the whole error of the edited reconstruction (`whole=True`). Then the
    error that the dictionary leaves anyway is a floor under all scores.

    Attributes:
        threshold: the gate opens at scores from here on. `opening_at` finds one.
        scope: "input" takes the mean of the scores over the input's tokens so far.
        whole: whether the score is the squared distance from the activation to its edited
            reconstruction.

    Raises:
        ValueError: the threshold is negative.
    """

    threshold: float
    scope: Scope = "input"
    whole: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(0, threshold=self.threshold)

    @torch.no_grad()
    def scores(self, reading: Reading) -> Float[Tensor, " rows"]:
        """The score of each token, or for "input" that of its input."""
        moved = reading.change + reading.error if self.whole else reading.change
        each = moved.double().square().sum(dim=-1)
        if self.scope == "token":
            return each
        sums = reading.summed("scores", reading.added(each))
        counts = reading.summed("tokens", reading.added(torch.ones_like(each)))
        return (sums / counts.clamp(min=1))[reading.inputs]

    def opens(self, reading: Reading) -> Bool[Tensor, " rows"]:
        """See `Gate.opens`."""
        scores = self.scores(reading)
        # With a threshold of 0, inputs without any change would open it.
        fired = (scores >= self.threshold) & (scores > 0)
        return reading.of_input(fired) if self.scope == "input" else fired


GATES: dict[str, type] = {
    kind.__name__: kind for kind in (Always, Positions, Tokens, FiresAbove, Excess)
}
"""Gates by the names that saved edits give them. `Masked` holds a function, which JSON cannot."""

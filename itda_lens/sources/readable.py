"""The interface through which the rest of the library uses a language model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Loader = Literal["bridge", "hooked_transformer", "huggingface"]
"""The ways in which a model can be loaded by its name."""

Replace = Callable[[Float[Tensor, "batch seq *width"]], Float[Tensor, "batch seq *width"]]
"""An edit: takes the activations of a hook point and returns those that the model goes on with."""


@runtime_checkable
class ReadableModel(Protocol):
    """A language model whose hook points can be read and edited, whatever library it comes from.

    `language_model` makes one from a name or from a model of a known library. An object of your own with
    these attributes and methods can be passed wherever the library takes a model.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        name: the model's name in metadata.
        loader: the way in which it was, or would be, loaded by name.
        source: the folder or hub name from which it can be loaded again; None if not known.
    """

    tokenizer: Any
    name: str
    loader: Loader
    source: str | None

    @property
    def device(self) -> torch.device:
        """Where the model takes tokens."""
        ...

    @property
    def max_context(self) -> int | None:
        """The most tokens that the model was made for; None if it does not say."""
        ...

    def check_hooks(self, hooks: Sequence[str]) -> None:
        """Raise ValueError, naming near matches, unless all of `hooks` exist."""
        ...

    def capture(
        self, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"],
        hooks: Sequence[str],
    ) -> dict[str, Float[Tensor, "batch seq width"]]:  # fmt: skip
        """Copies of the activations at `hooks`, head dimensions flattened, without gradients.

        The model runs in evaluation mode and stops as soon as all hooks have fired. A module that runs
        more than once in a pass gives its first activation.

        Raises:
            ValueError: a hook does not exist, does not fire, or gives no activation for each token; or a
                token is outside of the model's embedding.
        """
        ...

    def logits(
        self, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"],
        replace: Mapping[str, Replace] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:  # fmt: skip
        """Logits, in evaluation mode; with `replace`, inside `edited(replace)`.

        Gradients are computed where torch computes them: put `torch.no_grad()` around calls that need
        none.

        Raises:
            ValueError: the model gives no logits; a hook does not exist or does not fire; or a token is
                outside of the model's embedding.
        """
        ...

    def edited(self, edits: Mapping[str, Replace]) -> AbstractContextManager[None]:
        """Inside this context, activations pass through the functions in `edits`, by hook.

        It holds for everything that runs the model: `capture`, `logits`, the model itself, gradients and
        `generate`. A function is called every time that its hook fires. With a key-value cache it gets
        [batch, 1, ...] for each new token. Contexts can be nested: at one hook, the outer edit comes
        first.

        Raises:
            ValueError: a hook does not exist (on entry); an edit returns another shape; a forward pass
                ran to its end, but a hook never fired (on leaving).
        """
        ...

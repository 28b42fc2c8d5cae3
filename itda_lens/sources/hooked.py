"""The common part of models of every library: a forward hook on the module that a name stands for.

TransformerLens's hook points and Hugging Face's layers are both `torch.nn.Module`s that a forward pass
calls, so one mechanism serves all. A library's class says which module a name stands for, how to run the
model, and how to load one.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from itda_lens.sources.hooks import Site, edits_at, evaluation_mode, first_activations
from itda_lens.sources.passes import Watch, watching
from itda_lens.sources.readable import Loader, Replace

logger = logging.getLogger(__name__)


class HookedModel(ABC):
    """A `ReadableModel` that runs in this process and is made of `torch.nn.Module`s.

    Attributes:
        model: the wrapped model. Hooks and modes are after each call as they were before it.
        tokenizer, name, loader, source: see `ReadableModel`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, loader: Loader, source: str | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.loader: Loader = loader
        self.source = source
        self._per_token: set[str] = set()
        """Hooks that are known to give one activation for each token."""
        self._paused = False
        """Whether edits let activations pass as they are."""

    # A library's class defines these.

    @classmethod
    @abstractmethod
    def loader_of(cls, model: Any) -> Loader | None:
        """The loader that gives such a model; None if the model is of another library."""

    @classmethod
    @abstractmethod
    def load(
        cls, name: str, loader: Loader, tokenizer: Any, device: str | None, dtype: torch.dtype
    ) -> nn.Module:
        """Load a model by its name or folder."""

    @staticmethod
    @abstractmethod
    def described(model: Any) -> tuple[str | None, Any]:
        """The name or folder that the model says it comes from, and the tokenizer that it brings."""

    @property
    @abstractmethod
    def max_context(self) -> int | None:
        """See `ReadableModel.max_context`."""

    @abstractmethod
    def _site(self, hook: str) -> Site:
        """The module that a hook stands for; ValueError if there is none."""

    @abstractmethod
    def _run(self, tokens: Tensor, attention_mask: Tensor) -> Any:
        """Run the model on its device, for `_logits_of`; gradients and modes are the caller's."""

    @abstractmethod
    def _logits_of(self, output: Any) -> Tensor | None:
        """The logits in the output of `_run`; None if there are none."""

    @abstractmethod
    def _embedding(self) -> nn.Module | None:
        """The token embedding."""

    def _ends(self) -> Sequence[nn.Module]:
        """Modules that have run when a forward pass is over, by whichever method it was started."""
        return [self.model]

    def _readers(self) -> Sequence[nn.Module]:
        """Modules that are called with a mask and a key-value cache, if there is one, before the
        embedding."""
        return self._ends()

    def _blocks(self) -> Sequence[nn.Module]:
        """Modules that are called with the cache after the embedding, where `_readers` may not be."""
        return []

    # What follows is the same for all.

    @property
    def device(self) -> torch.device:
        """Where the embedding is. Its weights may be offloaded, to the device "meta": then the device on
        which `accelerate` runs it, or else that of the first weight that is somewhere."""
        embedding = self._embedding()
        weight = next(embedding.parameters(), None) if embedding is not None else None
        if weight is not None and not weight.is_meta:
            return weight.device
        device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
        here = (p.device for p in self.model.parameters() if not p.is_meta)
        return next(here, torch.device("cpu"))

    def check_hooks(self, hooks: Sequence[str]) -> None:
        """See `ReadableModel.check_hooks`."""
        if isinstance(hooks, str):
            raise ValueError(f"hooks must be a list of names, got the string {hooks!r}")
        for hook in hooks:
            self._site(hook)

    def capture(
        self, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"],
        hooks: Sequence[str],
    ) -> dict[str, Float[Tensor, "batch seq width"]]:  # fmt: skip
        """See `ReadableModel.capture`.

        At the first use of a hook, a pass over a few tokens shows whether the shape of its activations
        follows the number of contexts and of tokens.
        """
        self.check_hooks(hooks)
        tokens, attention_mask = self._checked(tokens, attention_mask)
        captured = self._read(tokens, attention_mask, hooks)
        self._check_per_token(captured, tokens)
        return {hook: rearrange(captured[hook], "batch seq ... -> batch seq (...)") for hook in hooks}

    def n_heads(self, hook: str) -> int:
        """Number of attention heads whose parts stand side by side in a row of `capture` at a hook.

        A pass over two tokens shows it.

        Raises:
            ValueError: the hook does not exist or fire, or its activations are not split by head.
        """
        tokens = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        with self._edits_paused():
            activation = self._read(tokens, torch.ones_like(tokens, dtype=torch.bool), [hook])[hook]
        if activation.ndim != 4 or not _follows(activation, tokens):
            raise ValueError(
                f"hook {hook!r} must be split by head, as 'blocks.0.attn.hook_z' is, to give a row for "
                f"each head, but gives {tuple(activation.shape)} for the tokens {tuple(tokens.shape)}"
            )
        return activation.shape[2]

    def logits(
        self, tokens: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"],
        replace: Mapping[str, Replace] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:  # fmt: skip
        """See `ReadableModel.logits`."""
        tokens, attention_mask = self._checked(tokens, attention_mask)
        with self.edited(replace) if replace else nullcontext(), evaluation_mode(self._ends()):
            logits = self._logits_of(self._run(tokens, attention_mask))
        if logits is None or logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"{type(self.model).__name__} gives no logits for each token: it has no head that "
                "predicts tokens (Hugging Face's AutoModelForCausalLM loads models with one)"
            )
        return logits

    @contextmanager
    def edited(self, edits: Mapping[str, Replace]) -> Iterator[None]:
        """See `ReadableModel.edited`."""
        sites = {hook: self._site(hook) for hook in edits}
        with edits_at(sites, edits, self._ends(), paused=lambda: self._paused):
            yield

    def watched(self) -> AbstractContextManager[Watch]:
        """Inside this context, the `Watch` knows the tokens of the pass that is running."""
        return watching(self._embedding(), self._readers(), self._blocks())

    @torch.no_grad()
    def _read(self, tokens: Tensor, attention_mask: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        """Copies of the first activations at `hooks`, as the model has them."""
        sites = {hook: self._site(hook) for hook in hooks}
        return first_activations(sites, self._ends(), lambda: self._run(tokens, attention_mask))

    def _check_per_token(self, captured: Mapping[str, Tensor], tokens: Tensor) -> None:
        for hook, activation in captured.items():
            if not _follows(activation, tokens):
                raise _not_per_token(hook, activation, tokens)
        new = [hook for hook in captured if hook not in self._per_token]
        if not new:
            return
        # A shape may fit by chance: an attention pattern [batch, head, query, key] where the number of
        # heads is that of tokens, or positions [1, seq, width] where there is one context. Such a shape
        # does not fit a batch of another size.
        batch = next(n for n in (2, 3) if n != tokens.shape[0])
        seq = next(n for n in (2, 3, 4) if n not in (tokens.shape[1], batch))
        probe = tokens[:1, :1].expand(batch, seq).contiguous()
        try:
            with self._edits_paused():
                found = self._read(probe, torch.ones_like(probe, dtype=torch.bool), new)
        except Exception as error:  # of somebody's own hooks, made for one batch: no reason to give up
            logger.debug("shapes at %s could not be checked: %s", new, error)
            return
        for hook, activation in found.items():
            if not _follows(activation, probe):
                raise _not_per_token(hook, captured[hook], tokens)
        self._per_token.update(new)

    @contextmanager
    def _edits_paused(self) -> Iterator[None]:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _checked(self, tokens: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and mask on the model's device. Padding outside of the embedding becomes token 0."""
        if tokens.ndim != 2 or tokens.numel() == 0 or attention_mask.shape != tokens.shape:
            raise ValueError(
                "tokens must be [batch, seq] with at least one token, and attention_mask of the same "
                f"shape, got {tuple(tokens.shape)} and {tuple(attention_mask.shape)}"
            )
        tokens, attention_mask = tokens.to(self.device), attention_mask.to(self.device)
        embedding = self._embedding()
        weight = getattr(embedding, "weight", getattr(embedding, "W_E", None))  # TransformerLens's W_E
        if weight is None:
            return tokens, attention_mask
        outside = (tokens < 0) | (tokens >= weight.shape[0])
        if not outside.any():
            return tokens, attention_mask
        read = outside & attention_mask.bool()
        if read.any():
            row, position = read.nonzero()[0].tolist()
            token = int(tokens[row, position])
            raise ValueError(
                f"token {token}{self._spelt(token)} at position {position} of context {row} is outside "
                f"of the model's embedding, which has {weight.shape[0]} rows: the tokenizer and the "
                "model do not belong together"
            )
        return tokens.masked_fill(outside, 0), attention_mask

    def _spelt(self, token: int) -> str:
        with suppress(Exception):  # a tokenizer may not know it either
            return f" ({self.tokenizer.convert_ids_to_tokens(token)!r})"
        return ""


def _follows(activation: Tensor, tokens: Tensor) -> bool:
    return activation.ndim >= 3 and activation.shape[:2] == tokens.shape


def _not_per_token(hook: str, activation: Tensor, tokens: Tensor) -> ValueError:
    return ValueError(
        f"hook {hook!r} gives {tuple(activation.shape)}, not one activation for each of the "
        f"{tuple(tokens.shape)} tokens"
    )

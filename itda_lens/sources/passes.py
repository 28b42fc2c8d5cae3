"""The tokens of the forward pass that is running, for edits that depend on them."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

_CACHES = ("past_key_values", "past_kv_cache", "past_kv_cache_entry")
"""Arguments of `forward` that hold a key-value cache, in transformers and in TransformerLens."""


@dataclass
class Pass:
    """Tokens that a model reads in one forward pass.

    Attributes:
        tokens: ids of this pass.
        before: ids of earlier passes that the key-value cache holds; no columns where there is no cache.
            None while that is not known, which is before the first block of a HookedTransformer that
            generates.
        mask: True on tokens and False on padding, for `before` and `tokens` together; None if the model
            was given none.
    """

    tokens: Int[Tensor, "batch seq"]
    before: Int[Tensor, "batch cached"] | None
    mask: Bool[Tensor, "batch total"] | None

    @property
    def real(self) -> Bool[Tensor, "batch seq"]:
        """False on padding."""
        if self.mask is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        return self.mask[:, -self.tokens.shape[1] :]

    @property
    def positions(self) -> Int[Tensor, "batch seq"]:
        """Place of each token in its context, from 0 on; padding before it does not count.

        Raises:
            ValueError: it is not known how many tokens the cache holds.
        """
        start = self.so_far.shape[1] - self.tokens.shape[1]
        if self.mask is None:
            row = torch.arange(start, start + self.tokens.shape[1], device=self.tokens.device)
            return row.expand(self.tokens.shape)
        return (self.mask.long().cumsum(dim=1) - 1)[:, -self.tokens.shape[1] :]

    @property
    def so_far(self) -> Int[Tensor, "batch total"]:
        """All ids of the context, those in the cache first.

        Raises:
            ValueError: it is not known how many tokens the cache holds.
        """
        if self.before is None:
            raise ValueError(
                "a HookedTransformer that generates does not tell positions before its first block: "
                "edit at a hook of a block"
            )
        return torch.cat([self.before, self.tokens], dim=1)


class Watch:
    """The pass that is running.

    Attributes:
        current: None if no tokens were read, since the model was given embeddings.
    """

    def __init__(self) -> None:
        self.current: Pass | None = None
        self._past: Tensor | None = None
        self._cached: int | None = None
        self._mask: Tensor | None = None

    def begin(self, arguments: dict[str, Any]) -> None:
        """A model, or a part of one that reads the tokens, was called."""
        self._keep_past()
        self._learn(arguments)

    def read(self, tokens: Tensor) -> None:
        """The embedding was called."""
        self._keep_past()
        self.current = Pass(tokens, None, None)
        self._complete()
        self._cached, self._mask = None, None

    def learn(self, arguments: dict[str, Any]) -> None:
        """A block was called: it may know the cache."""
        if self.current is not None and self.current.before is None:
            self._learn(arguments)
            self._complete()
            self._cached, self._mask = None, None

    def _keep_past(self) -> None:
        if self.current is not None and self.current.before is not None:
            self._past = self.current.so_far
        self.current = None

    def _learn(self, arguments: dict[str, Any]) -> None:
        caches = [arguments[name] for name in _CACHES if name in arguments]
        lengths = [_length(cache) for cache in caches if cache is not None]
        self._cached = max([self._cached or 0, *lengths])
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._mask = mask.bool()

    def _complete(self) -> None:
        """Put tokens and mask together, once the length of the cache is known."""
        now = self.current
        if now is None or self._cached is None:
            return
        batch, seq = now.tokens.shape
        past = now.tokens.new_full((batch, self._cached), -1)
        if self._past is not None and self._past.shape[0] == batch:
            known = self._past[:, : self._cached].to(past.device)
            past[:, : known.shape[1]] = known
        now.before = past
        total = self._cached + seq
        if self._mask is not None and self._mask.shape[0] == batch and self._mask.shape[1] >= total:
            now.mask = self._mask[:, :total].to(past.device)


@contextmanager
def watching(
    embedding: nn.Module | None, readers: Iterable[nn.Module], blocks: Iterable[nn.Module] = ()
) -> Iterator[Watch]:
    """A `Watch` that follows the forward passes of a model.

    Args:
        embedding: the module that takes token ids.
        readers: modules that are called with the cache and the mask, before the embedding is.
        blocks: modules that are called with the cache after the embedding.
    """
    watch = Watch()

    def on_embedding(module: nn.Module, args: Any, kwargs: Any) -> None:
        tokens = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if tokens is not None and tokens.ndim == 2 and not tokens.is_floating_point():
            watch.read(tokens)

    with ExitStack() as stack:
        unique = {id(module): module for module in readers}
        for module in unique.values():
            stack.callback(_before(module, watch.begin).remove)
        for module in blocks:
            stack.callback(_before(module, watch.learn).remove)
        if embedding is not None:
            handle = embedding.register_forward_pre_hook(on_embedding, with_kwargs=True)
            stack.callback(handle.remove)
        yield watch


def _before(module: nn.Module, note: Any) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = dict(kwargs)
        with suppress(TypeError, ValueError):  # arguments that fit no signature: those named are enough
            arguments |= inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        note(arguments)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _length(cache: Any) -> int:
    """Number of tokens that a key-value cache holds."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if hasattr(cache, "past_keys"):
        return cache.past_keys.shape[1]
    if isinstance(cache, Tensor):
        return cache.shape[-2]
    try:
        return _length(cache[0])
    except (IndexError, KeyError, TypeError):
        return 0

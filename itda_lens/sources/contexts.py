"""Texts cut into contexts of tokens, in batches, with a place for every token."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from itda_lens.records import Cutting, Places, text_digest


@dataclass(frozen=True)
class Context:
    """Consecutive tokens of one text, as the model sees them.

    Attributes:
        row: index of the text.
        chunk: which consecutive context of the text.
        text: the whole text.
        ids: token ids, the BOS token first if there is one.
        spans: characters (start, end) of each token; (0, 0) for the BOS token.
        digest: `text_digest(text)`, computed once for all contexts of a text.
        counts: for each token, whether it may count at all; None if all may.
    """

    row: int
    chunk: int
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    digest: int
    counts: Sequence[bool] | None = None


@dataclass(frozen=True)
class ContextBatch:
    """Contexts side by side, padded on the right.

    Attributes:
        contexts: the contexts.
        tokens: their ids, padded.
        attention_mask: True on tokens, False on padding.
        keep: True on tokens whose activations count.
    """

    contexts: list[Context]
    tokens: Int[Tensor, "batch seq"]
    attention_mask: Bool[Tensor, "batch seq"]
    keep: Bool[Tensor, "batch seq"]

    def places(self) -> Places:
        """Places of the kept tokens, in the order in which `keep` indexes activations."""
        which, position = self.keep.nonzero().numpy().T
        spans = np.zeros((*self.keep.shape, 2), dtype=np.int64)
        for i, context in enumerate(self.contexts):
            spans[i, : len(context.spans)] = context.spans
        texts = np.empty(len(self.contexts), dtype=object)
        texts[:] = [context.text for context in self.contexts]

        def each(name: str, dtype: type = np.int64) -> np.ndarray:
            return np.array([getattr(context, name) for context in self.contexts], dtype=dtype)[which]

        return Places.tokens(
            each("row"), each("chunk"), position, spans[which, position], texts[which],
            each("digest", np.uint64),
        )  # fmt: skip


@dataclass(frozen=True)
class Tokenization:
    """How the texts for one model become contexts.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        cutting: how they are cut.

    Raises:
        ValueError: the tokenizer is not a fast one, or has no BOS token though `cutting` asks for it.
    """

    tokenizer: Any
    cutting: Cutting = field(default_factory=Cutting)

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                "labels need the characters of each token, which only a fast tokenizer gives; got "
                f"{type(self.tokenizer).__name__}"
            )
        if self.prepend_bos and self.tokenizer.bos_token_id is None:
            raise ValueError("prepend_bos=True, but the tokenizer has no BOS token")

    @cached_property
    def prepend_bos(self) -> bool:
        """Whether contexts begin with the BOS token: as `cutting` says, or if there is one."""
        asked = self.cutting.prepend_bos
        return self.tokenizer.bos_token_id is not None if asked is None else asked

    def vocabulary_sha256(self) -> str:
        """Tells tokenizers apart: a digest of the tokens and their ids."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def contexts(self, texts: Iterable[str]) -> Iterator[Context]:
        """Cut texts into contexts, in order."""
        bos = [self.tokenizer.bos_token_id] if self.prepend_bos else []
        step = self.cutting.context_size - len(bos)
        for row, text in enumerate(texts):
            digest = text_digest(text)
            encoded = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            ids, spans = encoded["input_ids"], encoded["offset_mapping"]
            for chunk, start in enumerate(range(0, len(ids), step)):
                yield Context(
                    row=row,
                    chunk=chunk,
                    text=text,
                    ids=bos + list(ids[start : start + step]),
                    spans=[(0, 0)] * len(bos) + [tuple(s) for s in spans[start : start + step]],
                    digest=digest,
                )

    def batches(self, texts: Iterable[str], batch_size: int) -> Iterator[ContextBatch]:
        """Contexts of `texts`, `batch_size` at a time."""
        held: list[Context] = []
        for context in self.contexts(texts):
            held.append(context)
            if len(held) == batch_size:
                yield self.batch(held)
                held = []
        if held:
            yield self.batch(held)

    def batch(self, contexts: list[Context]) -> ContextBatch:
        """Pad `contexts` to the longest and mask what does not count."""
        lengths = torch.tensor([len(context.ids) for context in contexts])
        width = int(lengths.max())
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else (self.tokenizer.eos_token_id or 0)
        tokens = torch.full((len(contexts), width), pad, dtype=torch.long)
        for row, context in enumerate(contexts):
            tokens[row, : len(context.ids)] = torch.tensor(context.ids)
        attention_mask = torch.arange(width) < lengths[:, None]
        keep = attention_mask.clone()
        for row, context in enumerate(contexts):
            if context.counts is not None:
                keep[row, : len(context.ids)] &= torch.tensor(context.counts, dtype=torch.bool)
        if not self.cutting.keep_special_tokens:
            keep[:, 0] = False
            special = torch.tensor(self.tokenizer.all_special_ids, dtype=torch.long)
            keep &= ~torch.isin(tokens, special)
        return ContextBatch(list(contexts), tokens, attention_mask, keep)

"""Texts cut into contexts of tokens, in batches, with a label for every token."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from itda_lens.dictionary import Label

CONTEXT_CHARS = 40
"""Characters of text on each side of a token that its label quotes."""


@dataclass(frozen=True)
class Context:
    """Consecutive tokens of one text, as the model sees them.

    Attributes:
        row: index of the text.
        chunk: which consecutive context of the text.
        text: the whole text.
        ids: token ids, the BOS token first if there is one.
        spans: characters (start, end) of each token; (0, 0) for the BOS token.
    """

    row: int
    chunk: int
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]

    def label(self, position: int) -> Label:
        """The label of the token at `position`."""
        start, end = self.spans[position]
        before = self.text[max(0, start - CONTEXT_CHARS) : start]
        after = self.text[end : end + CONTEXT_CHARS]
        token = self.text[start:end]
        return Label(
            row=self.row,
            chunk=self.chunk,
            position=position,
            chars=(start, end),
            token=token,
            context=f"{before}[[{token}]]{after}",
        )


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

    def labels(self) -> "BatchLabels":
        """Labels of the kept tokens, in the order in which `keep` indexes activations."""
        return BatchLabels(self)


class BatchLabels(Sequence[Label]):
    """Labels made when they are asked for: most tokens never become atoms."""

    def __init__(self, batch: ContextBatch) -> None:
        self._contexts = batch.contexts
        self._places = batch.keep.nonzero()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Label: ...
    @overload
    def __getitem__(self, index: slice) -> list[Label]: ...
    def __getitem__(self, index: int | slice) -> "Label | list[Label]":
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row, position = self._places[index].tolist()
        return self._contexts[row].label(position)


@dataclass(frozen=True)
class Tokenization:
    """How texts become contexts.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        context_size: tokens per context, the BOS token included.
        prepend_bos: whether each context begins with the BOS token.
        keep_special_tokens: keep position 0 and special tokens, which otherwise do not count. (Position
            0 draws attention whatever token is there: its activation tells nothing of the text.)
    """

    tokenizer: Any
    context_size: int = 128
    prepend_bos: bool = True
    keep_special_tokens: bool = False

    def __post_init__(self) -> None:
        if self.context_size < 2:
            raise ValueError(f"context_size must be at least 2, got {self.context_size}")
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                "labels need the characters of each token, which only a fast tokenizer gives; got "
                f"{type(self.tokenizer).__name__}"
            )
        if self.prepend_bos and self.tokenizer.bos_token_id is None:
            raise ValueError("prepend_bos=True, but the tokenizer has no BOS token")

    def vocabulary_sha256(self) -> str:
        """Tells tokenizers apart: a digest of the tokens and their ids."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def contexts(self, texts: Iterable[str]) -> Iterator[Context]:
        """Cut texts into contexts, in order."""
        bos = [self.tokenizer.bos_token_id] if self.prepend_bos else []
        step = self.context_size - len(bos)
        for row, text in enumerate(texts):
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
        if not self.keep_special_tokens:
            keep[:, 0] = False
            special = torch.tensor(self.tokenizer.all_special_ids, dtype=torch.long)
            keep &= ~torch.isin(tokens, special)
        return ContextBatch(list(contexts), tokens, attention_mask, keep)

"""Places of tokens of which only the ids are known: in caches and files that others wrote."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from itda_lens.records import Places, Tag, text_digest


class TokenPlaces:
    """Tells which tokens of a context count, and where they came from.

    Position 0 and special tokens do not count, as in `Cutting`. Without a tokenizer, special tokens are
    not known, and a label names the token's id in place of its text.

    Args:
        tokenizer: a fast tokenizer, the one that made the ids; None if there is none.
        keep_special_tokens: whether position 0 and special tokens count.
        kind: the kind of thing that a context is, for labels.
    """

    def __init__(self, tokenizer: Any, keep_special_tokens: bool, kind: str = "context") -> None:
        if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
            raise TypeError(f"tokenizer must be a tokenizer or None, got {tokenizer!r:.80}")
        self._tokenizer: Any = tokenizer
        self._keep_special, self._kind = keep_special_tokens, kind
        self._special = np.array(sorted(getattr(tokenizer, "all_special_ids", [])), dtype=np.int64)
        self._tags: dict[str, Tag] = {}

    def of(
        self,
        row: int,
        positions: Int[np.ndarray, " seq"],
        ids: Int[np.ndarray, " seq"] | None,
        name: str | None = None,
    ) -> tuple[Bool[np.ndarray, " seq"], Places]:
        """Which tokens of a context count, and the places of those that do.

        Args:
            row: the number of the context.
            positions: the position of each token in it.
            ids: the token ids; None if they are not known.
            name: the name of the context, for labels.
        """
        keep = np.ones(len(positions), dtype=bool)
        if not self._keep_special:
            keep &= positions > 0
            if ids is not None:
                keep &= ~np.isin(ids, self._special)
        rows = np.full(len(positions), row)
        if ids is None or self._tokenizer is None:
            names = [name] * len(positions) if ids is None else [f"token {i}" for i in ids.tolist()]
            places = Places.at(rows, 0, positions, [self._tag(one) for one in names])
        else:
            text, spans = self._text(ids.tolist())
            texts = np.empty(len(positions), dtype=object)
            texts[:] = [text] * len(positions)
            digests = np.full(len(positions), text_digest(text), dtype=np.uint64)
            places = Places.tokens(rows, np.zeros_like(rows), positions, spans, texts, digests)
            places = places.tagged(self._tag(name))
        return keep, places.take(np.flatnonzero(keep))

    def _tag(self, name: str | None) -> Tag:
        return self._tags.setdefault(name or "", Tag(self._kind, name))

    def _text(self, ids: Sequence[int]) -> tuple[str, Int[np.ndarray, "seq 2"]]:
        """The text of a context, and the characters of each token in it.

        The tokenizer says the characters if it cuts the text into these ids again. Otherwise the text is
        that of the single tokens, one after the other.
        """
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if getattr(self._tokenizer, "is_fast", False):
            again = self._tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            if list(again["input_ids"]) == list(ids):
                return text, np.array(again["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        pieces = [self._tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        return "".join(pieces), np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)

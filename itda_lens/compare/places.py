"""Which labels of different dictionaries name the same place of a text."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from itda_lens.records import Label, Provenance
from itda_lens.sae import ITDA, provenance_of

logger = logging.getLogger(__name__)

Match = Literal["auto", "position", "span", "overlap"]
"""How labels are matched.

"position": by text, context and token position; for one tokenizer and contexts cut in one way.
"span": by text and the token's characters, without white space around them; for any tokenizers.
"overlap": by text, and characters that overlap; each token has one partner at most.
"auto": "position" where it can be used, else "span".
"""

Place = tuple[Any, ...]
"""A place of a text, as a key: (row, chunk, position) or (row, start, end). The number of an attention
head comes last in the former, and before the characters in the latter. Images, vocabulary tokens and
other rows that are no text have their kind in front: token 5 is not text 5."""

_UNNAMED_KINDS = ("text", "row")
"""Kinds that no user has named. Version 0.1 wrote none, and called every row a text."""

_CUTTING = ("vocabulary_sha256", "context_size", "prepend_bos")
"""Metadata in which two builds must agree before equal positions mean the same tokens."""


def resolve_match(itdas: Sequence[ITDA], match: Match = "auto") -> Match:
    """The way to match the labels of these dictionaries: "position", "span" or "overlap".

    Raises:
        ValueError: `match` is none of its values, the dictionaries were built from different texts, have
            no labels, or have none that can be matched in the way asked for.
    """
    if match not in get_args(Match):
        raise ValueError(f"match must be one of {get_args(Match)}, got {match!r}")
    records = [provenance_of(itda) for itda in itdas]
    difference = _difference(records, ("texts_fingerprint",))
    if difference is not None:
        raise ValueError(f"labels of different texts cannot be compared: {difference}")
    labels = [itda.labels for itda in itdas]  # raises if there are none
    cut = _difference(records, _CUTTING)
    if match == "position" and cut is not None:
        raise ValueError(
            f"labels of tokens that were cut differently cannot be matched by position: {cut}; use "
            "match='span' or 'overlap'"
        )
    if match == "position" or (match == "auto" and cut is None):
        return "position"
    if match == "auto":
        logger.info("labels are matched by their characters: %s", cut)
    for own in labels:
        if any(label.chars is None for label in own):
            raise ValueError(
                "labels without characters can only be matched by position, which needs one tokenizer "
                f"and contexts cut in one way{'' if cut is None else f': {cut}'}"
            )
    return "span" if match == "auto" else match


def places(labels: Iterable[Label], match: Match) -> list[Place | None]:
    """The place of each label. It is None for a special token that is matched by characters: it has
    none.

    Args:
        match: a result of `resolve_match`.

    Raises:
        ValueError: a label has no characters, and they are needed.
    """
    if match == "position":
        return [
            label.key if label.kind in _UNNAMED_KINDS else (label.kind, *label.key) for label in labels
        ]
    return [_span(label) for label in labels]


def n_shared(a: set[Place], b: set[Place], match: Match) -> int:
    """How many places of `a` have a partner in `b`, each at most one."""
    return n_overlapping(a, b) if match == "overlap" else len(a & b)


def n_overlapping(a: set[Place], b: set[Place]) -> int:
    """Size of the largest matching between the spans of two sets that overlap by a character or more.

    Different spans of a set do not overlap, being tokens of one text (several tokens of one character
    have one span), so that pairing from left to right finds the largest matching.
    """
    left, right = sorted(a), sorted(b)
    i = j = found = 0
    while i < len(left) and j < len(right):
        (*row, start, end), (*other_row, other_start, other_end) = left[i], right[j]
        if row == other_row and start < other_end and other_start < end:
            found += 1
            i += 1
            j += 1
        elif (row, end) <= (other_row, other_end):
            i += 1
        else:
            j += 1
    return found


def _span(label: Label) -> Place | None:
    """The characters of a token without white space around them, since tokenizers differ in that."""
    if label.chars is None:
        raise ValueError(f"labels without characters can only be matched by position, got {label}")
    start, end = label.chars
    text = label.token or ""
    if text.strip() and len(text) == end - start:
        start += len(text) - len(text.lstrip())
        end -= len(text) - len(text.rstrip())
    where = (label.row,) if label.head is None else (label.row, label.head)
    return (*where, start, end) if end > start else None


def _difference(records: Sequence[Provenance], keys: Sequence[str]) -> str | None:
    for key in keys:
        values = list(dict.fromkeys(v for r in records if (v := getattr(r, key)) is not None))
        if len(values) > 1:
            shown = " and ".join(
                f"{value[:12]}..." if isinstance(value, str) else str(value) for value in values[:2]
            )
            return f"{key} is {shown}"
    return None

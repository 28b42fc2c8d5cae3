"""The facts of a site, read from a model and texts."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens import SAE

from itda_lens.analysis import decompose, examples
from itda_lens.records import checked
from itda_lens.reports.site.facts import SiteFacts, site_facts
from itda_lens.sae import provenance_of
from itda_lens.sources import ReadableModel, iterate_texts

DECOMPOSED, DECOMPOSED_CHARS = 3, 400
"""Texts that are taken apart where none are named, and the characters of each that are shown."""


@checked
def facts_from_texts(
    lm: ReadableModel,
    sae: SAE[Any],
    texts: str | Path | Iterable[str],
    *,
    name: str | None = None,
    decomposed: Sequence[str] | None = None,
    comparisons: Sequence[Mapping[str, Any]] = (),
    read_from: str | None = None,
    max_tokens: int | None = None,
    n_examples: int = 8,
    batch_size: int = 16,
    text_field: str = "text",
    split: str = "train",
    progress: bool = True,
) -> SiteFacts:
    """Look through texts, take a few apart, and gather the facts of a dictionary's site.

    Args:
        lm: the model that `sae` belongs to.
        texts: as in `examples`. They are read twice, so that an iterator will not do.
        decomposed: texts to take apart; default: the beginnings of the first `DECOMPOSED`.
        name, comparisons, read_from: as in `site_facts`.
        sae, max_tokens, n_examples, batch_size, text_field, split, progress: as in `examples`.

    Raises:
        ValueError: as `examples` and `decompose`.
    """
    found = examples(
        lm, sae, texts, max_tokens=max_tokens, n_examples=n_examples, batch_size=batch_size,
        text_field=text_field, split=split, progress=progress,
    )  # fmt: skip
    if not decomposed:
        every = iterate_texts(texts, text_field=text_field, split=split)
        spelt = (text for text in every if isinstance(text, str) and text.strip())
        first = itertools.islice(spelt, DECOMPOSED)
        decomposed = [_beginning(text) for text in first]
    recorded = provenance_of(sae).unexplained
    usual = found.unexplained.tolist() if recorded is None else None
    apart = [decompose(lm, sae, text, usual=usual) for text in decomposed]
    return site_facts(sae, found, name=name, texts=apart, comparisons=comparisons, read_from=read_from)


def _beginning(text: str) -> str:
    """The beginning of a text, up to the end of a word."""
    return text if len(text) <= DECOMPOSED_CHARS else text[:DECOMPOSED_CHARS].rsplit(maxsplit=1)[0]

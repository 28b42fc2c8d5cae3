"""`itda report`."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from itda_lens.cli.options import (
    BatchSize,
    DeviceOption,
    Folders,
    ModelOption,
    SameLoader,
    Split,
    TextField,
    load_every,
    model_of,
)
from itda_lens.terminal import make_console, shown

if TYPE_CHECKING:
    from sae_lens import SAE

    from itda_lens.reports import SiteFacts

DECOMPOSED, DECOMPOSED_CHARS = 3, 400
"""Texts that are taken apart where --text names none, and the characters of each that are shown."""


def report_command(
    folders: Folders,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the site.")] = Path("site"),
    texts: Annotated[
        str | None,
        typer.Option(
            help="Text to look through, best one that the dictionary was not built from: a file or a "
            "data set; default: the one that it was built from."
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text to take apart token by token; may be repeated."),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(help="A file that `itda compare --json` wrote, to show too; may be repeated."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the texts to read.")] = 20_000,
    examples: Annotated[int, typer.Option(min=1, help="Contexts of each kind for an atom.")] = 8,
    model: ModelOption = None,
    batch_size: BatchSize = 16,
    text_field: TextField = "text",
    split: Split = "train",
    loader: SameLoader = None,
    device: DeviceOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a site that is in the folder.")
    ] = False,
) -> None:
    """Write a site about dictionaries, which opens in a browser without a server.

    It has a table of all atoms to search and sort, a page for each atom, and texts taken apart token by
    token. Other SAEs of SAELens get the same pages, without labels.

    Example: itda report gpt2-dictionaries/blocks.6.hook_resid_post -o site --texts other-book.txt
    """
    from itda_lens.reports import comparison_facts, site_folder, write_site
    from itda_lens.sources import language_model

    loaded = load_every(folders)
    comparisons = [comparison_facts(file) for file in compare or []]
    read, read_from = _texts(texts, [sae for _, sae in loaded])
    with site_folder(out, overwrite) as site:
        name, loaded_by = model_of([sae for _, sae in loaded], model, loader)
        lm = language_model(name, loader=loaded_by, device=device)
        facts = [
            facts_of(
                lm, sae, read, read_from, name=folder.name, own_texts=text, comparisons=comparisons,
                max_tokens=max_tokens, n_examples=examples, batch_size=batch_size,
                text_field=text_field, split=split,
            )
            for folder, sae in loaded
        ]  # fmt: skip
        write_site(facts, site)
    page = shown(out / "index.html", "bold")
    make_console().print(Text.assemble("Open ", page, " in a browser."), soft_wrap=True)


def facts_of(
    lm: Any,
    sae: "SAE[Any]",
    read: str | Path | Iterable[str],
    read_from: str,
    *,
    name: str,
    own_texts: Sequence[str] | None = None,
    comparisons: Sequence[dict[str, Any]] = (),
    text_field: str = "text",
    split: str = "train",
    **options: Any,
) -> "SiteFacts":
    """The facts of a dictionary's site, from one pass over `read` and a few decomposed texts."""
    from itda_lens.analysis import decompose, examples
    from itda_lens.reports import site_facts
    from itda_lens.sources import iterate_texts

    found = examples(lm, sae, read, text_field=text_field, split=split, **options)
    if not own_texts:
        first = itertools.islice(
            (text for text in iterate_texts(read, text_field=text_field, split=split) if text.strip()),
            DECOMPOSED,
        )
        own_texts = [_beginning(text) for text in first]
    decomposed = [
        decompose(lm, sae, text, usual=_usual(sae, found.unexplained.tolist())) for text in own_texts
    ]
    return site_facts(
        sae, found, name=name, texts=decomposed, comparisons=comparisons, read_from=read_from
    )


def _usual(sae: "SAE[Any]", measured: list[float]) -> list[float] | None:
    """The quantiles that `decompose` should use: None for those that a build has recorded."""
    from itda_lens.sae import provenance_of

    return measured if provenance_of(sae).unexplained is None else None


def _texts(texts: str | None, saes: "Sequence[SAE[Any]]") -> tuple[str | Iterable[str], str]:
    """The texts to read, and a description of them."""
    from itda_lens.sae import provenance_of
    from itda_lens.samples import reference_prose, smollm2

    if texts is not None:
        return texts, texts
    records = [provenance_of(sae) for sae in saes]
    if {record.model_name for record in records} == {smollm2.NAME}:
        return reference_prose()[1], "articles of Python's reference that the demo holds out"
    known = {record.dataset_path for record in records} - {None}
    if len(known) != 1:
        raise ValueError(
            f"pass --texts: the dictionaries name {len(known)} texts that could be read, not one"
        )
    path = str(known.pop())
    return path, f"{path}, which the dictionary was built from"


def _beginning(text: str) -> str:
    """The beginning of a text, up to the end of a word."""
    return text if len(text) <= DECOMPOSED_CHARS else text[:DECOMPOSED_CHARS].rsplit(maxsplit=1)[0]

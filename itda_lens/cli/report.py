"""`itda report`."""

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
    from itda_lens.reports import comparison_facts, facts_from_texts, site_folder, write_site
    from itda_lens.sources import language_model

    loaded = load_every(folders)
    comparisons = [comparison_facts(file) for file in compare or []]
    names = _names([folder for folder, _ in loaded])
    read, read_from = _texts(texts, [sae for _, sae in loaded])
    with site_folder(out, overwrite) as site:
        name, loaded_by = model_of([sae for _, sae in loaded], model, loader)
        lm = language_model(name, loader=loaded_by, device=device)
        facts = [
            facts_from_texts(
                lm, sae, read, name=name, decomposed=text, comparisons=comparisons,
                read_from=read_from, max_tokens=max_tokens, n_examples=examples,
                batch_size=batch_size, text_field=text_field, split=split,
            )
            for name, (_, sae) in zip(names, loaded, strict=True)
        ]  # fmt: skip
        write_site(facts, site)
    page = shown(out / "index.html", "bold")
    make_console().print(Text.assemble("Open ", page, " in a browser."), soft_wrap=True)


def _names(folders: Sequence[Path]) -> list[str]:
    """Different names of the dictionaries: the ends of their paths, as short as tell them apart.

    Raises:
        ValueError: a folder is given twice.
    """
    parts = [folder.absolute().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError(f"folders must be different ones, got {', '.join(map(str, folders))}")
    if len(folders) == 1:
        return [folders[0].name]
    for n in range(1, max(map(len, parts))):
        names = ["/".join(own[-n:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


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

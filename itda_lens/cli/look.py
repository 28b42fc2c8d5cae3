"""`itda info`, `itda decompose`, `itda find`, `itda eval`: commands that look at a dictionary."""

import re
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from itda_lens.cli.options import (
    AsJson,
    BatchSize,
    ChatsOption,
    DeviceOption,
    Drop,
    Folders,
    ModelOption,
    Only,
    Role,
    SameLoader,
    Split,
    TextField,
    TextsOrNone,
    filter_of,
    load_all,
    model_of,
    print_json,
    texts_of,
)
from itda_lens.terminal import make_console

if TYPE_CHECKING:
    from itda_lens.sae import ITDA


def info_command(
    folders: Folders,
    labels: Annotated[int, typer.Option(min=0, help="How many atoms' labels to show.")] = 10,
    neuronpedia: Annotated[
        Path | None,
        typer.Option(help="Write all atoms to this file, a JSON line each with Neuronpedia's fields."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show all settings, digests and versions.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how a dictionary was built, and where its atoms came from."""
    from itda_lens.reports import info_facts, info_table, labels_table, save_neuronpedia_features
    from itda_lens.sae import load_sparsity

    loaded = load_all(folders)
    if neuronpedia is not None:
        if len(loaded) != 1:
            raise ValueError(f"--neuronpedia takes one dictionary, got {len(loaded)}")
        ((folder, itda),) = loaded
        save_neuronpedia_features(itda, neuronpedia, load_sparsity(folder))
    if as_json:
        print_json(
            [
                {"folder": str(folder), **info_facts(itda), "labels": _rows(itda, range(labels))}
                for folder, itda in loaded
            ]
        )
        return
    for folder, itda in loaded:
        make_console().print(info_table(itda, str(folder), everything))
        if labels:
            make_console().print(labels_table(itda, labels))


def decompose_command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of a dictionary.", show_default=False)
    ],
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="The text to take apart.", show_default=False)
    ],
    model: ModelOption = None,
    top: Annotated[int, typer.Option(min=1, help="Atoms to show per token.")] = 4,
    loader: SameLoader = None,
    device: DeviceOption = None,
    as_json: AsJson = False,
) -> None:
    """Show which activations each token of a text is made of.

    A line below the table warns of text that is unlike the text that the dictionary was built from.
    FOLDER may be "demo", a small dictionary of SmolLM2 that comes with the package.

    Examples: itda decompose gpt2-dictionaries/blocks.6.hook_resid_post "The cat sat on the mat."

    itda decompose demo "The function returns a list of strings."
    """
    from itda_lens.analysis import decompose
    from itda_lens.reports import decomposition_table
    from itda_lens.sae import load

    itda = load(folder)
    name, loaded_by = model_of([itda], model, loader)
    found = decompose(name, itda, text, loader=loaded_by, device=device)
    if as_json:
        tokens = [asdict(replace(token, components=token.components[:top])) for token in found]
        print_json({"hook": found.hook_name, "warning": found.warning, "tokens": tokens})
        return
    make_console().print(decomposition_table(found, top, itda.cfg.metadata.hook_name or ""))


def find_command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of a dictionary.", show_default=False)
    ],
    text: Annotated[
        str,
        typer.Argument(metavar="TEXT", help="What to look for in labels.", show_default=False),
    ],
    regex: Annotated[
        bool, typer.Option("--regex", help="TEXT is a regular expression, in Python's form.")
    ] = False,
    token_only: Annotated[
        bool, typer.Option("--token-only", help="Look at the token, not at the text around it.")
    ] = False,
    prompt: Annotated[
        bool,
        typer.Option(
            "--prompt",
            help="TEXT is a prompt: list the atoms that its last token's activation resembles most.",
        ),
    ] = False,
    every_token: Annotated[
        bool, typer.Option("--every-token", help="With --prompt: of every token, not only of the last.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Most atoms to list.")] = 10,
    model: ModelOption = None,
    loader: SameLoader = None,
    device: DeviceOption = None,
    as_json: AsJson = False,
) -> None:
    """Find atoms by a word in their labels, or by a prompt that they resemble.

    Examples: itda find demo list

    itda find demo "raises an exception" --prompt
    """
    from itda_lens.analysis import nearest
    from itda_lens.reports import labels_table, matches_table
    from itda_lens.sae import load

    if prompt and (regex or token_only):
        raise ValueError("--prompt looks at activations: it goes with neither --regex nor --token-only")
    if every_token and not prompt:
        raise ValueError("--every-token goes with --prompt")
    itda = load(folder)
    if prompt:
        name, loaded_by = model_of([itda], model, loader)
        found = nearest(name, itda, text, top=top, loader=loaded_by, device=device)
        found = found if every_token else found[-1:]
        if as_json:
            print_json([asdict(token) for token in found])
        else:
            make_console().print(matches_table(found, f"Atoms that {text!r} resembles"))
        return
    atoms = itda.labels.search(_pattern(text) if regex else text, token_only=token_only)
    if as_json:
        print_json(_rows(itda, atoms[:top]))
    elif atoms:
        make_console().print(labels_table(itda, top, atoms))
    else:
        make_console().print("No label has it.")


def _check_beside(folder: Path) -> None:
    """Refuse a dictionary that no file can be put beside, before the work."""
    if not folder.is_dir():
        raise ValueError(
            f"--save-density writes a file beside each dictionary, but {str(folder)!r} is no folder here"
        )
    from itda_lens.records.files import probe, temporary_folder

    with temporary_folder(folder, "probe") as made:
        try:
            probe(made)
        finally:
            made.rmdir()


def _pattern(text: str) -> "re.Pattern[str]":
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"TEXT is no regular expression: {error}, got {text!r}") from error


def _rows(itda: "ITDA", atoms: Iterable[int]) -> list[dict[str, Any]]:
    """The labels of some atoms, for JSON; none of a dictionary without labels."""
    from itda_lens.sae import labels_of

    labels = labels_of(itda)
    known = range(0 if labels is None else len(labels))
    return [{"atom": i, **asdict(labels[i])} for i in atoms if labels is not None and i in known]


def eval_command(
    folders: Folders,
    texts: TextsOrNone = None,
    chats: ChatsOption = None,
    model: ModelOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this number of tokens; default: never."),
    ] = None,
    batch_size: BatchSize = 8,
    role: Role = None,
    only: Only = None,
    drop: Drop = None,
    text_field: TextField = "text",
    split: Split = "train",
    loader: SameLoader = None,
    device: DeviceOption = None,
    save_density: Annotated[
        bool, typer.Option("--save-density", help="Write sparsity.safetensors beside each dictionary.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure dictionaries on a text that they were not built from.

    The figures are FVU, L0, CE-loss score, KL and alive fraction. With --save-density the share of
    tokens at which each atom fires is kept in the file that SAELens's tools look for. With --chats, FVU
    is given apart for the contents of messages and for the tokens of the chat template's form.

    Example: itda eval gpt2-dictionaries --texts other-book.txt --max-tokens 20000
    """
    from itda_lens.analysis import evaluate
    from itda_lens.reports import evaluation_table
    from itda_lens.sae import save_sparsity

    read = texts_of(texts, chats, text_field, split, "keep")
    loaded = load_all(folders)
    if save_density:
        for folder, _ in loaded:
            _check_beside(folder)
    itdas = [itda for _, itda in loaded]
    name, loaded_by = model_of(itdas, model, loader)
    evaluations = evaluate(
        name,
        itdas,
        read,
        tokens=filter_of(role, only, drop),
        max_tokens=max_tokens,
        batch_size=batch_size,
        text_field=text_field,
        split=split,
        loader=loaded_by,
        device=device,
    )
    if save_density:
        for (folder, _), found in zip(loaded, evaluations, strict=True):
            save_sparsity(folder, found.feature_density)
    if as_json:
        figures = [
            {f.name: getattr(e, f.name) for f in fields(e) if f.name != "feature_density"}
            for e in evaluations
        ]
        print_json(figures)
        return
    make_console().print(evaluation_table(evaluations, title=f"Evaluation on {texts or chats}"))

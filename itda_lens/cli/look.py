"""`itda info`, `itda decompose`, `itda eval`: commands that look at a dictionary."""

from pathlib import Path
from typing import Annotated

import typer

from itda_lens.cli.options import (
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
    texts_of,
)
from itda_lens.terminal import make_console


def info_command(
    folders: Folders,
    labels: Annotated[int, typer.Option(min=0, help="How many atoms' labels to show.")] = 10,
    neuronpedia: Annotated[
        Path | None,
        typer.Option(help="Write all atoms to this file, a JSON line each with Neuronpedia's fields."),
    ] = None,
) -> None:
    """Show how a dictionary was built, and where its atoms came from."""
    from itda_lens.reports import info_table, labels_table, save_neuronpedia_features
    from itda_lens.sae import load_sparsity

    loaded = load_all(folders)
    if neuronpedia is not None:
        if len(loaded) != 1:
            raise ValueError(f"--neuronpedia takes one dictionary, got {len(loaded)}")
        ((folder, itda),) = loaded
        save_neuronpedia_features(itda, neuronpedia, load_sparsity(folder))
    for folder, itda in loaded:
        make_console().print(info_table(itda, str(folder)))
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
) -> None:
    """Show which activations each token of a text is made of.

    Example: itda decompose gpt2-dictionaries/blocks.6.hook_resid_post "The cat sat on the mat."
    """
    from itda_lens.analysis import decompose
    from itda_lens.reports import decomposition_table
    from itda_lens.sae import load

    itda = load(folder)
    name, loaded_by = model_of([itda], model, loader)
    found = decompose(name, itda, text, loader=loaded_by, device=device)
    make_console().print(decomposition_table(found, top, itda.cfg.metadata.hook_name or ""))


def eval_command(
    folders: Folders,
    texts: TextsOrNone = None,
    chats: ChatsOption = None,
    model: ModelOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stop after the batch that reaches this number of tokens; default: never."
        ),
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
    make_console().print(evaluation_table(evaluations, title=f"Evaluation on {texts or chats}"))

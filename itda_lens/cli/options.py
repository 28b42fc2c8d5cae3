"""What several commands share: options, and the dictionaries and models that they name."""

from pathlib import Path
from typing import Annotated, Any

import typer

from itda_lens.sae import ITDA, dictionaries_in, load, provenance_of
from itda_lens.sources import Loader

Folders = Annotated[
    list[Path],
    typer.Argument(help="Folders of dictionaries, or folders that hold several.", show_default=False),
]
Texts = Annotated[
    str,
    typer.Option(
        help="A text file, a .jsonl file, or the name of a Hugging Face data set.", show_default=False
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="The model, if not the one that the dictionary names.", show_default=False),
]
LoaderOption = Annotated[
    str, typer.Option(help="How to load the model: bridge, hooked_transformer or huggingface.")
]
SameLoader = Annotated[
    str | None,
    typer.Option(help="How to load it: bridge, hooked_transformer, huggingface.", show_default=False),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")
]
TextField = Annotated[str, typer.Option(help="Field of a jsonl line or data set row with the text.")]
Split = Annotated[str, typer.Option(help="Split of the data set.")]


def load_all(folders: list[Path]) -> list[tuple[Path, ITDA]]:
    found = [inside for folder in folders for inside in (dictionaries_in(folder) or [folder])]
    return [(folder, load(folder)) for folder in found]


def model_of(itdas: list[ITDA], model: str | None, loader: str | None) -> tuple[Any, Loader]:
    """The model to load: the one named by the user, else the one that the dictionaries name."""
    records = [provenance_of(itda) for itda in itdas]
    loaders = {record.loader for record in records} - {None}
    chosen = loader or (loaders.pop() if len(loaders) == 1 else "bridge")
    if model is not None:
        return model, as_loader(chosen)
    models = {record.model for record in records} - {None}
    if len(models) != 1:
        raise ValueError(
            f"pass --model: the dictionaries name {len(models)} models that could be loaded, not one"
        )
    return models.pop(), as_loader(chosen)


def as_loader(name: str) -> Loader:
    return name  # pyright: ignore[reportReturnType] (checked by language_model)

"""Options that several commands share, and the dictionaries and models that they name."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from itda_lens.cli.choices import Loader, SpecialTokens

if TYPE_CHECKING:
    from sae_lens import SAE

    from itda_lens.records import TokenFilter
    from itda_lens.sae import ITDA

Folders = Annotated[
    list[Path],
    typer.Argument(
        metavar="FOLDER",
        help="Folders of dictionaries, or folders that hold several.",
        show_default=False,
    ),
]
Texts = Annotated[
    str,
    typer.Option(
        help="A text file, a .jsonl file, or the name of a Hugging Face data set.", show_default=False
    ),
]
TextsOrNone = Annotated[
    str | None,
    typer.Option(
        help="A text file, a .jsonl file, or the name of a Hugging Face data set.", show_default=False
    ),
]
ChatsOption = Annotated[
    str | None,
    typer.Option(
        "--chats",
        help="Instead of --texts: conversations, a .jsonl file or data set with messages of role and "
        "content. Each is read alone, in the form of the model's chat template.",
        show_default=False,
    ),
]
SpecialTokensOption = Annotated[
    SpecialTokens,
    typer.Option(
        help="For --chats: whether the tokens of the template's form count; cap: a tenth of the rows."
    ),
]
Role = Annotated[
    list[str] | None,
    typer.Option(
        help="For --chats: only tokens of this role count; may be repeated.", show_default=False
    ),
]
Only = Annotated[
    str | None,
    typer.Option(help="Only tokens in a match of this regular expression count.", show_default=False),
]
Drop = Annotated[
    str | None,
    typer.Option(help="No token in a match of this regular expression counts.", show_default=False),
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="The model, if not the one that the dictionary names.", show_default=False),
]
LoaderOption = Annotated[Loader, typer.Option(help="How to load the model.")]
SameLoader = Annotated[
    Loader | None,
    typer.Option(help="How to load the model; default: as for the build.", show_default=False),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Contexts per forward pass.")]
TextField = Annotated[
    str,
    typer.Option(
        help="Field of a jsonl line or data set row with the text; of chats the default is messages."
    ),
]
Split = Annotated[str, typer.Option(help="Split of the data set.")]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_json(value: Any) -> None:
    """Print results as JSON, in ASCII; figures that are no numbers become null."""
    import json

    typer.echo(json.dumps(_plain(value), indent=1, allow_nan=False, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inside) for inside in value]
    return value


def names_in(value: str) -> list[str]:
    """The names in an option such as `--evals saelens,core`."""
    return [name.strip() for name in value.split(",") if name.strip()]


def only(allowed: Sequence[str]) -> Callable[[str], str]:
    """A callback for an option with names and commas between: refuses other names than `allowed`."""

    def check(value: str) -> str:
        for name in names_in(value):
            if name not in allowed:
                raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, allowed))}.")
        return value

    return check


def completing(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Shell completion for such an option: of its last name, by one that is not there yet."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        rest = [name for name in allowed if name not in names_in(before)]
        return [f"{before}{comma}{name}" for name in rest if name.startswith(last)]

    return complete


def check_output(option: str, file: Path | None) -> None:
    """Refuse a file that cannot be written, before the work.

    Raises:
        ValueError: its folder is not there, or it is a folder itself. Links are followed.
    """
    if file is None:
        return
    place = Path(os.path.realpath(file))
    if place.is_dir():
        raise ValueError(f"{option} {file}: it is a folder, where a file is to be written")
    if not place.parent.is_dir():
        raise ValueError(f"{option} {file}: there is no folder {place.parent}")


def load_all(folders: list[Path]) -> "list[tuple[Path, ITDA]]":
    from itda_lens.sae import dictionaries_in, load

    found = [inside for folder in folders for inside in (dictionaries_in(folder) or [folder])]
    return [(folder, load(folder)) for folder in found]


def load_every(folders: list[Path]) -> "list[tuple[Path, SAE[Any]]]":
    """Dictionaries, and SAEs of SAELens's other architectures beside them."""
    import json

    from sae_lens import SAE
    from sae_lens.constants import SAE_CFG_FILENAME

    from itda_lens.sae import dictionaries_in, load

    found: list[tuple[Path, SAE[Any]]] = []
    for folder in [inside for given in folders for inside in (dictionaries_in(given) or [given])]:
        try:
            architecture = json.loads((folder / SAE_CFG_FILENAME).read_text())["architecture"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            architecture = "itda"  # whose loading says what is wrong
        sae = load(folder) if architecture == "itda" else SAE.load_from_disk(folder, device="cpu")
        found.append((folder, sae))
    return found


def model_of(
    itdas: "Sequence[SAE[Any]]", model: str | None, loader: Loader | None
) -> tuple[Any, Loader]:
    """The model to load: the one named by the user, else the one that the dictionaries name."""
    from itda_lens.sae import provenance_of

    records = [provenance_of(itda) for itda in itdas]
    loaders = {record.loader for record in records} - {None}
    chosen: Any = loader or (loaders.pop() if len(loaders) == 1 else "bridge")
    if model is not None:
        return model, chosen
    models = {record.model for record in records if record.model is not None}
    if len(models) > 1:
        raise ValueError(f"pass --model: the dictionaries name several: {', '.join(sorted(models))}")
    if not models:
        from itda_lens.samples import smollm2

        names = sorted({record.model_name for record in records if record.model_name})
        if names == [smollm2.NAME]:
            return smollm2.fetch(), chosen
        called = f", which is called {' or '.join(names)}" if names else ""
        raise ValueError(f"pass --model: nothing here says where the dictionaries' model is{called}")
    return models.pop(), chosen


def texts_of(
    texts: str | None, chats: str | None, text_field: str, split: str, special: SpecialTokens
) -> Any:
    """The texts or chats that the user names: one of the two."""
    from itda_lens.sources import Chats

    if (texts is None) == (chats is None):
        given = "neither" if texts is None else "both"
        raise ValueError(f"pass one of --texts and --chats, got {given}")
    if chats is None:
        if special != "keep":
            raise ValueError(f"--special-tokens is for --chats, got {special!r} for --texts")
        return texts
    field = "messages" if text_field == "text" else text_field
    return Chats(chats, special, field=field, split=split)


def filter_of(roles: list[str] | None, only: str | None, drop: str | None) -> "TokenFilter | None":
    """The conditions on tokens that the user gives; None where there are none."""
    from itda_lens.records import TokenFilter

    found = TokenFilter(roles or None, only=only, drop=drop)
    return found if found.record() else None

"""`itda compare`."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from itda_lens.cli.choices import Match, Measure
from itda_lens.cli.options import DeviceOption, Split, TextField, check_output, print_json
from itda_lens.terminal import make_console, shown

if TYPE_CHECKING:
    from itda_lens.sae import ITDA
    from itda_lens.sources import Activations

T = TypeVar("T")

STANDARD_OUTPUT = Path("-")


def compare_command(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER",
            help="A folder for each model: of one dictionary, or of those of its layers.",
            show_default=False,
        ),
    ],
    measure: Annotated[
        Measure,
        typer.Option(help="jaccard and weighted compare labels, the others compare activations."),
    ] = "jaccard",
    match: Annotated[
        Match, typer.Option(help="When two labels are the same place; auto chooses.")
    ] = "auto",
    texts: Annotated[
        str | None,
        typer.Option(
            help="Text for --diff and for every measure but jaccard, such as the one that the "
            "dictionaries were built from: a file or a data set."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the texts to read.")] = 20_000,
    difference: Annotated[
        bool,
        typer.Option(
            "--diff",
            help="List the atoms of the second model that are most foreign to its base, the first.",
        ),
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Atoms to list.")] = 20,
    json: Annotated[
        Path | None,
        typer.Option(
            help="Write all figures, or all atoms of --diff, to this file; - prints them instead of "
            "tables."
        ),
    ] = None,
    heatmap: Annotated[Path | None, typer.Option(help="Draw the matrices: an image file.")] = None,
    text_field: TextField = "text",
    split: Split = "train",
    device: DeviceOption = None,
) -> None:
    """Compare models by the dictionaries of their layers.

    The dictionaries must be built from the same texts. The tables show how similar whole models are, by
    the unions over their layers, and which layer of one model is most like each layer of another. Labels
    need no model; the other measures, and --diff, load the models that the dictionaries name.

    Examples: itda compare gpt2-dictionaries other-dictionaries --heatmap layers.png

    itda compare base/blocks.6.hook_resid_post tuned/blocks.6.hook_resid_post --diff --texts book.txt
    """
    from itda_lens.compare import (
        activations_of,
        check_comparable,
        check_diffable,
        compare,
        diff,
        recorded_settings,
    )
    from itda_lens.reports import (
        comparison_heatmap,
        comparison_record,
        comparison_table,
        differences_record,
        differences_table,
        layers_table,
        save_comparison,
        save_differences,
    )

    models = _models(folders)
    if difference:
        _check_two_hooks(models, measure, heatmap)
        check_diffable(*_firsts(models), match)  # pyright: ignore (checked there)
    else:
        check_comparable(models, measure, match)
    if heatmap is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--heatmap needs matplotlib: pip install 'itda-lens[plots]'")
    for option, file in (("--json", json), ("--heatmap", heatmap)):
        if file != STANDARD_OUTPUT:
            check_output(option, file)
    activations: "dict[str, list[Activations]]" = {}
    if difference or measure != "jaccard":
        if texts is None:
            what = "--diff" if difference else f"--measure {measure}"
            raise ValueError(f"{what} looks at activations: pass --texts")
        for itdas in models.values():
            recorded_settings(itdas)  # all are looked at before the first model is loaded
        for folder, itdas in models.items():
            activations[folder] = activations_of(
                itdas,
                texts,
                max_tokens=max_tokens,
                text_field=text_field,
                split=split,
                device=device,
            )
    console = make_console()
    if difference:
        found = diff(*_firsts(models), *_firsts(activations), match)  # pyright: ignore
        if json == STANDARD_OUTPUT:
            print_json(differences_record(found))
            return
        base, tuned = models
        console.print(differences_table(found, top, f"In {tuned}, foreign to {base}"))
        if json is not None:
            console.print(shown(f"All atoms: {save_differences(found, json)}"), soft_wrap=True)
        return
    comparison = compare(models, measure, match, activations or None)  # pyright: ignore
    if json == STANDARD_OUTPUT:
        print_json(comparison_record(comparison))
        return
    overview = comparison_table(comparison)
    if overview is not None:
        console.print(overview)
    for pair in comparison.layers:
        if overview is None or max(pair.similarity.shape) > 1:
            console.print(layers_table(pair))
    if json is not None:
        console.print(shown(f"Figures: {save_comparison(comparison, json)}"), soft_wrap=True)
    if heatmap is not None:
        console.print(shown(f"Heatmap: {comparison_heatmap(comparison, heatmap)}"), soft_wrap=True)


def _check_two_hooks(
    models: "Mapping[str, Sequence[ITDA]]", measure: Measure, heatmap: Path | None
) -> None:
    if len(models) != 2 or [len(own) for own in models.values()] != [1, 1]:
        raise ValueError("--diff takes the dictionaries of one hook point of two models: two folders")
    if measure != "jaccard" or heatmap is not None:
        raise ValueError("--diff lists atoms: it goes with neither --measure nor --heatmap")


def _firsts(several: Mapping[str, Sequence[T]]) -> list[T]:
    return [own[0] for own in several.values()]


def _models(folders: Sequence[Path]) -> "dict[str, list[ITDA]]":
    """The dictionaries of each folder, in the order of the layers in their hooks' names."""
    from itda_lens.records import HookPoint
    from itda_lens.sae import dictionaries_in, load

    if len(set(folders)) != len(folders):
        raise ValueError(f"folders must be different ones, got {', '.join(map(str, folders))}")
    return {
        str(folder): sorted(
            (load(inside) for inside in dictionaries_in(folder) or [folder]),
            key=lambda itda: HookPoint.parse(itda.cfg.metadata.hook_name or "").sort_key,
        )
        for folder in folders
    }

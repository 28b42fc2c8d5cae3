"""`itda fit`."""

from pathlib import Path
from typing import Annotated

import typer

from itda_lens.cli.choices import Method, Preset
from itda_lens.terminal import make_console, shown


def fit_command(
    activations: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A .npy, .safetensors or .parquet file with an activation a row.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the dictionary; must not exist.")],
    column: Annotated[
        str | None,
        typer.Option(help="The column or tensor of the activations; default: the only one that can be."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="A column of strings or whole numbers that name the rows.")
    ] = None,
    item: Annotated[str | None, typer.Option(help="A word for what a row is, such as image.")] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="A file of the same form to measure the dictionary on.")
    ] = None,
    d_sae: Annotated[int, typer.Option(min=1, help="Atoms of the dictionary.")] = 4096,
    k: Annotated[int, typer.Option(min=1, help="Most nonzeros per code.")] = 20,
    preset: Annotated[Preset, typer.Option(help="How atoms are chosen; as in itda build.")] = "best",
    method: Annotated[
        Method | None, typer.Option(help="Encoder; default: mp for preset paper, else ols.")
    ] = None,
    l0: Annotated[
        float | None,
        typer.Option(min=0, help="Mean nonzeros per code, k at most; default: k in every code."),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Move the atoms by least squares: better, no longer pure.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the dictionary in the output folder.")
    ] = False,
) -> None:
    """Choose atoms among the activations in a file.

    The file is read once, batch by batch, so that it may be larger than the memory.

    Example: itda fit clip.parquet --labels class --item image --held-out rest.parquet -o clip-dictionary
    """
    from itda_lens.analysis import evaluate_rows
    from itda_lens.reports import evaluation_table
    from itda_lens.sources import as_source
    from itda_lens.training import fit, output_folder

    rest = None if held_out is None else as_source(held_out, column=column)  # told before the work
    with output_folder(out, overwrite) as folder:
        itda = fit(
            activations,
            d_sae=d_sae,
            k=k,
            preset=preset,
            labels=labels,
            item=item,
            column=column,
            seed=seed,
            method=method,
            l0=l0,
            update=update,
            progress=True,
        )
        itda.save_model(folder)
    console = make_console()
    console.print(shown(f"{out}: {itda.cfg.d_sae:,} atoms, k = {itda.cfg.k}"), soft_wrap=True)
    if rest is not None:
        console.print(evaluation_table(evaluate_rows(itda, rest), title=f"Evaluation on {held_out}"))

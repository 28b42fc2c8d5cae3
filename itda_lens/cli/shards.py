"""`itda build-shard` and `itda build-finish`: a build in parts, by any number of processes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from itda_lens.cli.build import print_built
from itda_lens.cli.options import DeviceOption
from itda_lens.terminal import make_console, shown

if TYPE_CHECKING:
    from itda_lens.training import Plan

PlanFolder = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER", help="The folder that itda build --folder made.", show_default=False
    ),
]


def build_shard_command(
    folder: PlanFolder,
    index: Annotated[
        list[int],
        typer.Option(min=0, help="Number of the part, from 0; may be repeated."),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="The model, if it is elsewhere than when the work was split."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Do it anew, even if it is finished.")] = False,
) -> None:
    """Do one part of a build, or several.

    Any process can, on any machine that sees the folder and the model.

    Example, as an array job of Slurm: itda build-shard run --index $SLURM_ARRAY_TASK_ID
    """
    from itda_lens.training import open_plan

    made = open_plan(folder, model=model)
    for i in index:
        made.run(i, again=again)
    left = len(made.pending())
    line = f"{folder}: {len(made) - left} of {len(made)} parts are finished"
    make_console().print(shown(line), soft_wrap=True)


def build_finish_command(
    folder: PlanFolder,
    out: Annotated[
        Path, typer.Option(help="Folder for the dictionaries, a subfolder per hook; must not exist.")
    ],
    device: DeviceOption = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the dictionaries in the output folder.")
    ] = False,
) -> None:
    """Put the finished parts of a build together: the dictionaries of a build in one go, bit for bit.

    The model is not needed.

    Example: itda build-finish run --out dictionaries
    """
    from itda_lens.training import open_plan

    finished(open_plan(folder), out, overwrite, device)


def planned(
    model: str, texts: str, hooks: Sequence[str], folder: Path, shard_rows: int | None,
    settings: dict[str, Any],
) -> "Plan":  # fmt: skip
    """The plan in the folder, made if it is not there; says how to run it."""
    from itda_lens.training import plan

    size = {} if shard_rows is None else {"shard_rows": shard_rows}
    made = plan(model, texts, hooks, folder=folder, **size, **settings)
    left = len(made.pending())
    console = make_console()
    line = f"{folder}: {made.n_rows:,} tokens in {len(made)} parts, {left} of them to do"
    console.print(shown(line), soft_wrap=True)
    if left:
        command = shown(f"itda build-shard {folder} --index 0", "bold")
        last = f" (to {len(made) - 1}), in any order, by any number of processes"
        console.print(Text.assemble("Each: ", command, last), soft_wrap=True)
    return made


def finished(
    made: "Plan", out: Path, overwrite: bool, device: str | None = "cpu", *, run: bool = False
) -> None:
    """Save the dictionaries of a plan whose parts are finished; with `run`, do the others first."""
    from itda_lens.training import output_folder, save_all

    with output_folder(out, overwrite) as new:
        if run:
            made.run_all()
        dictionaries = made.finish(device=device or "cpu")
        save_all(dictionaries, new)
    print_built(dictionaries, out)

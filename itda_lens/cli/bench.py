"""`itda bench`."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from itda_lens.cli.choices import Baseline, Codes, Evaluation
from itda_lens.cli.options import (
    AsJson,
    BatchSize,
    DeviceOption,
    ModelOption,
    Split,
    TextField,
    completing,
    names_in,
    only,
    print_json,
)
from itda_lens.terminal import make_console, shown

EVALUATIONS, BASELINES = get_args(Evaluation), get_args(Baseline)


def bench_command(
    saes: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER",
            help="Folders of dictionaries or other SAELens SAEs, folders that hold several, or "
            "release:sae_id of SAELens's list.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for results; the same one goes on with a stopped run.")
    ],
    evals: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help=f"Evaluations, with commas between: {', '.join(EVALUATIONS)}.",
            callback=only(EVALUATIONS),
            autocompletion=completing(EVALUATIONS),
        ),
    ] = "saelens,core",
    texts: Annotated[
        str | None,
        typer.Option(help="Text for saelens, core, autointerp, mdl; default: SAEBench's data sets."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with data sets under their names: DATA/org/name.")
    ] = None,
    model: ModelOption = None,
    codes: Annotated[
        Codes, typer.Option(help="Which codes of signed ITDAs to evaluate, where the sign matters.")
    ] = "both",
    settings: Annotated[
        Path | None,
        typer.Option(help='A JSON file: {"core": {"context_size": 64}, ...} over SAEBench\'s defaults.'),
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="Precision: float32, bfloat16, ...")] = "float32",
    batch_size: BatchSize = 16,
    text_field: TextField = "text",
    split: Split = "train",
    baselines: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help=f"Baselines to build beside the ITDAs, with commas between: {', '.join(BASELINES)}.",
            show_default=False,
            callback=only(BASELINES),
            autocompletion=completing(BASELINES),
        ),
    ] = "",
    train_texts: Annotated[
        str | None, typer.Option(help="What to build the baselines from: the dictionaries' own text.")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Write pareto.png: the figures over L0.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run SAEBench on dictionaries and other SAEs, side by side.

    A run that was stopped goes on when it is given the same folder for results.

    Needs the extra: pip install 'itda-lens[saebench]'.

    Example: itda bench gpt2-dictionaries --evals saelens,core --texts other-book.txt --out bench
    """
    names = names_in(evals)
    if plot and "saelens" not in names:
        raise ValueError("--plot needs the evaluation saelens, which measures L0")
    chosen = _settings(settings)
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'itda-lens[saebench]'")
    from itda_lens.reports import bench_table, pareto_plot
    from itda_lens.saebench import bench

    results = bench(
        saes,
        names,
        out,
        texts=texts,
        data=data,
        model=model,
        codes=codes,
        settings=chosen,
        baselines=names_in(baselines),
        train_texts=train_texts,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        text_field=text_field,
        split=split,
    )
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        make_console().print(bench_table(results, title=f"Results in {out}"))
    if plot:
        plotted = pareto_plot(results, out / "pareto.png")
        make_console(stderr=as_json).print(shown(f"Plot: {plotted}"), soft_wrap=True)
    if any(result.file is None for result in results):
        raise typer.Exit(1)


def _settings(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"--settings {file} is not JSON: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(value, dict) for value in values.values()):
        raise ValueError(f"--settings {file} must map evaluations to their settings")
    return values

"""`itda bench`."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from itda_lens.cli.options import DeviceOption, ModelOption, Split, TextField
from itda_lens.reports import bench_table, make_console, pareto_plot
from itda_lens.saebench import EVALUATIONS, bench


def bench_command(
    saes: Annotated[
        list[str],
        typer.Argument(
            help="Folders of dictionaries or other SAELens SAEs, folders that hold several, or "
            "release:sae_id of SAELens's list.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for results; the same one goes on with a stopped run.")
    ],
    evals: Annotated[
        str, typer.Option(help=f"Evaluations, with commas between: {', '.join(EVALUATIONS)}.")
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
        str,
        typer.Option(help="Codes of signed ITDAs, where it matters: both, signed, nonnegative."),
    ] = "both",
    settings: Annotated[
        Path | None,
        typer.Option(help='A JSON file: {"core": {"context_size": 64}, ...} over SAEBench\'s defaults.'),
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="Precision: float32, bfloat16, ...")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Contexts per forward pass.")] = 16,
    text_field: TextField = "text",
    split: Split = "train",
    baselines: Annotated[
        str,
        typer.Option(
            help="Baselines to build beside the ITDAs: random,pca,topk,batchtopk,matryoshka,"
            "matching_pursuit."
        ),
    ] = "",
    train_texts: Annotated[
        str | None, typer.Option(help="What to build the baselines from: the dictionaries' own text.")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Write pareto.png: the figures over L0.")] = False,
) -> None:
    """Run SAEBench on dictionaries and other SAEs, side by side; stop it when you like, and go on.

    Needs the extra: pip install 'itda-lens[saebench]'.

    Example: itda bench gpt2-dictionaries --evals saelens,core --texts other-book.txt --out bench
    """
    names = [name.strip() for name in evals.split(",")]
    if plot and "saelens" not in names:
        raise ValueError("--plot needs the evaluation saelens, which measures L0")
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'itda-lens[saebench]'")
    results = bench(
        saes,
        names,
        out,
        texts=texts,
        data=data,
        model=model,
        codes=codes,  # pyright: ignore[reportArgumentType] (checked by bench)
        settings=_settings(settings),
        baselines=[name.strip() for name in baselines.split(",") if name.strip()],
        train_texts=train_texts,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        text_field=text_field,
        split=split,
    )
    make_console().print(bench_table(results, title=f"Results in {out}"))
    if plot:
        make_console().print(f"Plot: {pareto_plot(results, out / 'pareto.png')}")
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

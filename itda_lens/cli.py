"""The commands of `itda` for the user's own model."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from itda_lens.analysis import decompose, evaluate
from itda_lens.reports import (
    bench_table,
    decomposition_table,
    evaluation_table,
    info_table,
    labels_table,
    make_console,
    pareto_plot,
    save_neuronpedia_features,
)
from itda_lens.sae import ITDA, dictionaries_in, load, load_sparsity, save_sparsity
from itda_lens.saebench import EVALUATIONS, bench
from itda_lens.sources import Loader
from itda_lens.training import BUILD_KEY, Preset, build, output_folder, save_all

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


def build_command(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face name or a local folder.", show_default=False)
    ],
    texts: Texts,
    hook: Annotated[
        list[str],
        typer.Option(help="A hook point, such as blocks.10.hook_resid_post; may be repeated."),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the dictionaries, a subfolder per hook; must not exist.")
    ],
    d_sae: Annotated[int, typer.Option(help="Atoms per dictionary.")] = 4096,
    k: Annotated[int, typer.Option(help="Most nonzeros per code.")] = 20,
    preset: Annotated[str, typer.Option(help="best, or paper (Leask et al. 2025).")] = "best",
    method: Annotated[
        str | None, typer.Option(help="Encoder: mp or omp; default: omp for best, mp for paper.")
    ] = None,
    loss_threshold: Annotated[
        float | None, typer.Option(help="For paper: relative error that admits an activation.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop after so many tokens; default: all of the texts.")
    ] = None,
    context_size: Annotated[int, typer.Option(help="Tokens per context, BOS included.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Contexts per forward pass.")] = 16,
    keep_special_tokens: Annotated[
        bool, typer.Option("--keep-special-tokens", help="Let BOS and special tokens be atoms.")
    ] = False,
    text_field: TextField = "text",
    split: Split = "train",
    loader: LoaderOption = "bridge",
    device: DeviceOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the dictionaries in the output folder.")
    ] = False,
) -> None:
    """Build labelled dictionaries of a model's activations.

    All hook points are fed by the same forward passes, which stop at the deepest of them.

    Example: itda build gpt2 --texts book.txt --hook blocks.6.hook_resid_post --out gpt2-dictionaries
    """
    with output_folder(out, overwrite) as folder:
        dictionaries = build(
            model,
            texts,
            hook,
            d_sae=d_sae,
            k=k,
            preset=_preset(preset),
            method=method,  # pyright: ignore[reportArgumentType] (checked by build)
            loss_threshold=loss_threshold,
            seed=seed,
            max_tokens=max_tokens,
            context_size=context_size,
            batch_size=batch_size,
            keep_special_tokens=keep_special_tokens,
            text_field=text_field,
            split=split,
            loader=_loader(loader),
            device=device,
        )
        save_all(dictionaries, folder)
    for name, itda in dictionaries.items():
        make_console().print(f"{out / name}: {itda.cfg.d_sae:,} atoms, k = {itda.cfg.k}")
    make_console().print(f"Next: [bold]itda eval {out} --texts HELD_OUT_FILE[/]")


def info_command(
    folders: Folders,
    labels: Annotated[int, typer.Option(min=0, help="How many atoms' labels to show.")] = 10,
    neuronpedia: Annotated[
        Path | None,
        typer.Option(help="Write all atoms to this file, a JSON line each with Neuronpedia's fields."),
    ] = None,
) -> None:
    """Show what a dictionary is, how it was built, and where its first atoms came from."""
    loaded = _load_all(folders)
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
    folder: Annotated[Path, typer.Argument(help="Folder of a dictionary.", show_default=False)],
    text: Annotated[str, typer.Argument(help="The text to take apart.", show_default=False)],
    model: ModelOption = None,
    top: Annotated[int, typer.Option(min=1, help="Atoms to show per token.")] = 4,
    loader: SameLoader = None,
    device: DeviceOption = None,
) -> None:
    """Show which activations each token of a text is made of.

    Example: itda decompose gpt2-dictionaries/blocks.6.hook_resid_post "The cat sat on the mat."
    """
    itda = load(folder)
    name, loaded_by = _model_of([itda], model, loader)
    found = decompose(name, itda, text, loader=loaded_by, device=device)
    make_console().print(decomposition_table(found, top, itda.cfg.metadata.hook_name or ""))


def eval_command(
    folders: Folders,
    texts: Texts,
    model: ModelOption = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop after the batch that reaches so many tokens.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Contexts per forward pass.")] = 8,
    text_field: TextField = "text",
    split: Split = "train",
    loader: SameLoader = None,
    device: DeviceOption = None,
    save_density: Annotated[
        bool, typer.Option("--save-density", help="Write sparsity.safetensors beside each dictionary.")
    ] = False,
) -> None:
    """Measure dictionaries on a text: FVU, L0, CE-loss score, KL and alive fraction.

    Give a text that the dictionaries were not built from. With --save-density the share of tokens at
    which each atom fires is kept in the file that SAELens's tools look for.

    Example: itda eval gpt2-dictionaries --texts other-book.txt --max-tokens 20000
    """
    loaded = _load_all(folders)
    itdas = [itda for _, itda in loaded]
    name, loaded_by = _model_of(itdas, model, loader)
    evaluations = evaluate(
        name,
        itdas,
        texts,
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
    make_console().print(evaluation_table(evaluations, title=f"Evaluation on {texts}"))


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
        typer.Option(help="Baselines to build beside the ITDAs: random,pca,topk, or some of them."),
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


def _load_all(folders: list[Path]) -> list[tuple[Path, ITDA]]:
    found = [inside for folder in folders for inside in (dictionaries_in(folder) or [folder])]
    return [(folder, load(folder)) for folder in found]


def _model_of(itdas: list[ITDA], model: str | None, loader: str | None) -> tuple[Any, Loader]:
    """The model to load: the one named by the user, else the one that the dictionaries name."""
    records: list[dict[str, Any]] = [dict(itda.cfg.metadata[BUILD_KEY] or {}) for itda in itdas]
    loaders = {record["loader"] for record in records if "loader" in record}
    chosen = loader or (loaders.pop() if len(loaders) == 1 else "bridge")
    if model is not None:
        return model, _loader(chosen)
    models = {record.get("model") for record in records} - {None}
    if len(models) != 1:
        raise ValueError(
            f"pass --model: the dictionaries name {len(models)} models that could be loaded, not one"
        )
    return models.pop(), _loader(chosen)


def _loader(name: str) -> Loader:
    return name  # pyright: ignore[reportReturnType] (checked by language_model)


def _preset(name: str) -> Preset:
    return name  # pyright: ignore[reportReturnType] (checked by build)

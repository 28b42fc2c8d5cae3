"""`itda build`."""

from pathlib import Path
from typing import Annotated

import typer

from itda_lens.cli.options import DeviceOption, LoaderOption, Split, TextField, Texts, as_loader
from itda_lens.pursuit import DEFAULT_RTOL
from itda_lens.reports import make_console
from itda_lens.training import Preset, build, output_folder, save_all


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
    preset: Annotated[
        str, typer.Option(help="best, thorough (better, slower) or paper (Leask et al. 2025).")
    ] = "best",
    method: Annotated[
        str | None, typer.Option(help="Encoder: mp, omp or ols; default: mp for paper, else ols.")
    ] = None,
    loss_threshold: Annotated[
        float | None, typer.Option(help="For paper: relative error that admits an activation.")
    ] = None,
    l0: Annotated[
        float | None,
        typer.Option(help="Mean nonzeros per code, k at most; default: k in every code."),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Move the atoms by least squares: better, no longer pure.")
    ] = False,
    least_cosine: Annotated[
        float | None,
        typer.Option(help="With --update: how near atoms stay to their activations; default 0.9."),
    ] = None,
    rtol: Annotated[
        float, typer.Option(help="End a code once its residual is this, relative to the activation.")
    ] = DEFAULT_RTOL,
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
            l0=l0,
            update=update,
            least_cosine=least_cosine,
            rtol=rtol,
            seed=seed,
            max_tokens=max_tokens,
            context_size=context_size,
            batch_size=batch_size,
            keep_special_tokens=keep_special_tokens,
            text_field=text_field,
            split=split,
            loader=as_loader(loader),
            device=device,
        )
        save_all(dictionaries, folder)
    for name, itda in dictionaries.items():
        make_console().print(f"{out / name}: {itda.cfg.d_sae:,} atoms, k = {itda.cfg.k}")
    make_console().print(f"Next: [bold]itda eval {out} --texts HELD_OUT_FILE[/]")


def _preset(name: str) -> Preset:
    return name  # pyright: ignore[reportReturnType] (checked by build)

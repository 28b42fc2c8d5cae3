"""`itda build`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from itda_lens.cli.choices import Method, Preset
from itda_lens.cli.options import (
    BatchSize,
    ChatsOption,
    DeviceOption,
    Drop,
    LoaderOption,
    Only,
    Role,
    SpecialTokensOption,
    Split,
    TextField,
    TextsOrNone,
    filter_of,
    texts_of,
)
from itda_lens.terminal import make_console, shown

if TYPE_CHECKING:
    from itda_lens.sae import ITDA


def build_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A Hugging Face name or a local folder.", show_default=False
        ),
    ],
    hook: Annotated[
        list[str],
        typer.Option(help="A hook point, such as blocks.10.hook_resid_post; may be repeated."),
    ],
    texts: TextsOrNone = None,
    chats: ChatsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the dictionaries, a subfolder per hook; must not exist."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps finished parts of the work: the same command goes on after a stop."
        ),
    ] = None,
    shard_rows: Annotated[
        int | None,
        typer.Option(min=1, help="With --folder: tokens of one part of the work; default 65536."),
    ] = None,
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan-only",
            help="With --folder: only split the work, for itda build-shard and itda build-finish.",
        ),
    ] = False,
    d_sae: Annotated[int, typer.Option(min=1, help="Atoms per dictionary.")] = 4096,
    k: Annotated[int, typer.Option(min=1, help="Most nonzeros per code.")] = 20,
    preset: Annotated[
        Preset,
        typer.Option(
            help="How atoms are chosen; thorough is better than best and slower, paper is the rule of "
            "Leask et al. (2025)."
        ),
    ] = "best",
    method: Annotated[
        Method | None, typer.Option(help="Encoder; default: mp for preset paper, else ols.")
    ] = None,
    loss_threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="For paper: relative error that admits an activation."),
    ] = None,
    l0: Annotated[
        float | None,
        typer.Option(min=0, help="Mean nonzeros per code, k at most; default: k in every code."),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Move the atoms by least squares: better, no longer pure.")
    ] = False,
    least_cosine: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="With --update: how near atoms stay to their activations; default 0.9."
        ),
    ] = None,
    rtol: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="End a code once its residual is this, relative to the activation."
        ),
    ] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after this number of tokens; default: never.")
    ] = None,
    context_size: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens per context, BOS included; default: 128, for chats up to 2048."
        ),
    ] = None,
    batch_size: BatchSize = 16,
    keep_special_tokens: Annotated[
        bool, typer.Option("--keep-special-tokens", help="Let BOS and special tokens be atoms.")
    ] = False,
    special_tokens: SpecialTokensOption = "keep",
    role: Role = None,
    only: Only = None,
    drop: Drop = None,
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

    With --chats, conversations are read instead of texts, one by one.

    Example: itda build gpt2 --texts book.txt --hook blocks.6.hook_resid_post --out gpt2-dictionaries
    """
    if folder is None and (plan_only or shard_rows is not None):
        raise ValueError("--plan-only and --shard-rows need --folder")
    if plan_only == (out is not None):
        raise ValueError("--out is needed, or else --plan-only")
    read = texts_of(texts, chats, text_field, split, special_tokens)
    if folder is not None and chats is not None:
        raise ValueError("--folder takes --texts; chats are built in one go")
    settings: dict[str, Any] = dict(
        d_sae=d_sae,
        k=k,
        preset=preset,
        method=method,
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
        tokens=filter_of(role, only, drop),
        text_field=text_field,
        split=split,
        loader=loader,
        device=device,
    )
    if folder is not None:
        from itda_lens.cli.shards import finished, planned

        made = planned(model, read, hook, folder, shard_rows, settings)
        if out is not None:
            finished(made, out, overwrite, run=True)
        return
    from itda_lens.training import build, output_folder, save_all

    assert out is not None, "or else there is a plan"
    with output_folder(out, overwrite) as new:
        dictionaries = build(model, read, hook, **settings)
        save_all(dictionaries, new)
    print_built(dictionaries, out)


def print_built(dictionaries: "Mapping[str, ITDA]", out: Path) -> None:
    """Where the dictionaries are, and the command that goes on from there."""
    console = make_console()
    for name, itda in dictionaries.items():
        line = f"{out / name}: {itda.cfg.d_sae:,} atoms, k = {itda.cfg.k}"
        console.print(shown(line), soft_wrap=True)
    from itda_lens.sae import provenance_of

    of_chats = any(provenance_of(itda).chats for itda in dictionaries.values())
    option = "--chats" if of_chats else "--texts"
    next_command = shown(f"itda eval {out} {option} HELD_OUT_FILE", "bold")
    console.print(Text.assemble("Next: ", next_command), soft_wrap=True)

"""`itda push`."""

from typing import Annotated

import typer

from itda_lens.cli.choices import Exposed
from itda_lens.cli.options import DeviceOption, Folders, Split, TextField, load_all, model_of
from itda_lens.terminal import make_console, shown


def push_command(
    folders: Folders,
    repo: Annotated[str, typer.Option(help="The repository on the hub, ORG/NAME; made if need be.")],
    labels: Annotated[
        Exposed,
        typer.Option(help="How much of the labels others see; places leaves out all text."),
    ] = "full",
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository a private one.")
    ] = False,
    texts: Annotated[
        str | None,
        typer.Option(
            help="Held-out text to measure the dictionaries on, for the card.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="With --texts: stop after the batch that reaches this number.")
    ] = 20_000,
    text_field: TextField = "text",
    split: Split = "train",
    device: DeviceOption = None,
) -> None:
    """Upload dictionaries to the Hugging Face hub, with a card that says how to load them.

    Each goes into a folder of the name that it has here. With --texts, its FVU, L0 and CE-loss score on
    that text are put on the card. Log in with `hf auth login` first.

    Example: itda push gpt2-dictionaries --repo my-name/gpt2-itda --labels places --texts other-book.txt
    """
    from itda_lens.sae import load_sparsity, push
    from itda_lens.sae.hub import check_repo

    check_repo(repo)
    loaded = load_all(folders)
    named = {folder.resolve().name: (folder, itda) for folder, itda in loaded}
    if len(named) != len(loaded):
        raise ValueError("folders must have different names: each names a folder of the repository")
    densities = {
        name: density
        for name, (folder, _) in named.items()
        if (density := load_sparsity(folder)) is not None
    }
    figures = {}
    if texts is not None:
        from itda_lens.analysis import evaluate

        itdas = [itda for _, itda in loaded]
        model, loader = model_of(itdas, None, None)
        found = evaluate(
            model, itdas, texts, max_tokens=max_tokens, text_field=text_field, split=split,
            loader=loader, device=device,
        )  # fmt: skip
        for name, one in zip(named, found, strict=True):
            measured = {"FVU": one.fvu, "L0": one.l0, "CE-loss score": one.ce_loss_score}
            figures[name] = {**measured, "tokens measured on": one.n_tokens}
    dictionaries = {name: itda for name, (_, itda) in named.items()}
    commit = push(
        dictionaries, repo, labels=labels, private=private, figures=figures, densities=densities
    )
    console = make_console()
    console.print(shown(f"Pushed {len(dictionaries)} dictionaries: {commit}"), soft_wrap=True)
    console.print(shown(f"Labels: {labels}"), soft_wrap=True)
    first = repo if len(named) == 1 else f"{repo}/{next(iter(named))}"
    console.print(shown(f'Load with: itda_lens.load("{first}")'), soft_wrap=True)

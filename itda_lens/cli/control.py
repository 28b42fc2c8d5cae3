"""`itda steer`, `itda erase`: commands that edit a model while it runs."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from itda_lens.cli.choices import AmountUnit, Contrast
from itda_lens.cli.options import (
    DeviceOption,
    ModelOption,
    SameLoader,
    check_output,
    model_of,
    names_in,
)
from itda_lens.terminal import make_console, shown

if TYPE_CHECKING:
    from itda_lens.control import Edit
    from itda_lens.sae import ITDA

DictionaryFolder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Folder of a dictionary.", show_default=False)
]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write.")]
Temperature = Annotated[
    float, typer.Option(min=0, help="Of the draws; 0 takes the likeliest token each time.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the draws.")]


def steer_command(
    folder: DictionaryFolder,
    prompts: Annotated[
        list[str],
        typer.Argument(metavar="PROMPT", help="Beginnings of texts.", show_default=False),
    ],
    atoms: Annotated[
        str | None,
        typer.Option(help="Numbers of atoms with commas between.", show_default=False),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="All atoms that came from this token.", show_default=False),
    ] = None,
    edit: Annotated[
        Path | None,
        typer.Option(help="Edits that `itda erase` saved, in place of --atoms.", show_default=False),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="Multiply the atoms' coefficients; 0 removes the atoms.", show_default=False),
    ] = None,
    add: Annotated[
        float | None, typer.Option(help="Add this to the atoms' coefficients.", show_default=False)
    ] = None,
    unit: Annotated[
        AmountUnit,
        typer.Option(help="Of --add: shares of the activation's norm, or coefficients as they are."),
    ] = "norm",
    new_tokens: NewTokens = 40,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    json: Annotated[Path | None, typer.Option(help="Write the texts to this file.")] = None,
    model: ModelOption = None,
    loader: SameLoader = None,
    device: DeviceOption = None,
) -> None:
    """Write texts with and without an edit, side by side.

    Examples: itda steer gpt2-dictionaries/blocks.6.hook_resid_post --label cat --add 0.4 "I went to"

    itda steer gpt2-dictionaries/blocks.6.hook_resid_post --atoms 12,301 --scale 0 "Once upon a time"
    """
    given = [name for name, value in (("--atoms", atoms), ("--label", label), ("--edit", edit)) if value]
    if len(given) != 1:
        raise ValueError(f"give one of --atoms, --label and --edit, got {' and '.join(given) or 'none'}")
    if edit is None and (scale is None) == (add is None):
        raise ValueError("give either --scale or --add")
    if edit is not None and (scale, add) != (None, None):
        raise ValueError("--edit says itself how coefficients change: leave out --scale and --add")
    check_output("--json", json)
    from itda_lens.control import applied, load_edits, written
    from itda_lens.reports import writings_table
    from itda_lens.sae import load
    from itda_lens.sources import language_model

    itda = load(folder)
    edits = load_edits(edit, itda) if edit else [_edit(itda, atoms, label, scale, add, unit)]
    name, loaded_by = model_of([itda], model, loader)
    lm = language_model(name, loader=loaded_by, device=device)
    console, found = make_console(), []
    for prompt in prompts:
        ids = [_tokens(itda, lm, prompt)]
        texts = {"without": lm.tokenizer.decode(written(lm, ids, new_tokens, temperature, seed)[0])}
        with applied(lm, edits) as tallies:
            texts["with"] = lm.tokenizer.decode(written(lm, ids, new_tokens, temperature, seed)[0])
        console.print(writings_table(texts, prompt))
        changed, tokens = sum(t.changed for t in tallies), sum(t.tokens for t in tallies)
        console.print(shown(f"{changed} of {tokens} tokens were changed"), soft_wrap=True)
        found.append({"prompt": prompt, **texts, "changed": changed, "tokens": tokens})
    if json is not None:
        _write(json, found)


def erase_command(
    folder: DictionaryFolder,
    targets: Annotated[
        Path, typer.Option(help="Prompts with the concept: a text file, one a line.", show_default=False)
    ],
    retained: Annotated[
        Path, typer.Option(help="Prompts without it: a text file, one a line.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Write the edit to this JSON file.", show_default=False)],
    scale: Annotated[
        float, typer.Option(help="Multiply the coefficients; negative numbers invert the concept.")
    ] = 0.0,
    by: Annotated[Contrast, typer.Option(help="How atoms are chosen.")] = "sets",
    count: Annotated[int, typer.Option(min=1, help="The most atoms to take.")] = 64,
    top: Annotated[
        int, typer.Option(min=1, help="Strongest atoms of each prompt that --by sets compares.")
    ] = 16,
    gated: Annotated[
        bool, typer.Option("--gated/--always", help="Edit inputs that look like the targets, or all.")
    ] = True,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    model: ModelOption = None,
    loader: SameLoader = None,
    device: DeviceOption = None,
) -> None:
    """Find the atoms of a concept, remove them where it appears, measure that, and save the edit.

    Every second prompt of each file chooses the atoms and the gate; the others measure. The last word of
    a target is the answer whose probability is measured.

    Example: itda erase FOLDER --targets france.txt --retained others.txt --out erase-france.json
    """
    for option, file in (("--targets", targets), ("--retained", retained)):
        if not file.is_file():
            raise FileNotFoundError(f"{option} {file}: there is no such file")
    check_output("--out", out)
    check_output("--json", json)
    if json is not None and os.path.realpath(json) == os.path.realpath(out):
        raise ValueError(f"--out and --json must be different files, got {out} for both")
    from itda_lens.control import Edit, Scale, contrast, effects, opening_at, save_edits
    from itda_lens.reports import chosen_table, effects_table, save_effects
    from itda_lens.sae import load
    from itda_lens.sources import language_model

    lines = {option: _lines(option, file) for option, file in
             (("--targets", targets), ("--retained", retained))}  # fmt: skip
    on, off = lines.values()
    prompts = [_prompt(text) for text in on[1::2]]
    itda = load(folder)
    name, loaded_by = model_of([itda], model, loader)
    lm = language_model(name, loader=loaded_by, device=device)
    chosen = contrast(lm, itda, on[::2], off[::2], by=by, count=count, top=top)
    edit = Edit(itda, [each.atom for each in chosen], Scale(scale))
    if gated:
        edit = opening_at(lm, edit, on[::2])
    found = effects(lm, edit, prompts, off[1::2])
    console = make_console()
    console.print(chosen_table(chosen[:20]))
    console.print(effects_table(found, f"Effects on {len(prompts)} prompts and {len(off[1::2])} texts"))
    save_edits(edit, out, folder)
    console.print(shown(f"Edit: {out}"), soft_wrap=True)
    if json is not None:
        save_effects(found, json, atoms=list(edit.atoms), edit=str(out))
        console.print(shown(f"Figures: {json}"), soft_wrap=True)


def _edit(
    itda: "ITDA", atoms: str | None, label: str | None, scale: float | None, add: float | None, unit: Any
) -> "Edit":
    from itda_lens.control import Add, Edit, Scale, labelled

    if label is not None:
        numbers = labelled(itda, label)
    else:
        try:
            numbers = [int(name) for name in names_in(atoms or "")]
        except ValueError:
            raise ValueError(
                f"--atoms must be whole numbers with commas between, got {atoms!r}"
            ) from None
    if scale is not None:
        return Edit(itda, numbers, Scale(scale))
    assert add is not None
    return Edit(itda, numbers, Add(add / len(numbers) ** 0.5, unit))


def _tokens(itda: "ITDA", lm: Any, prompt: str) -> list[int]:
    from itda_lens.control.selection import prompt_batch

    tokens, _ = prompt_batch(lm, itda, [prompt])
    return tokens[0].tolist()


def _lines(option: str, file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # a byte-order mark is no part of the first prompt
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {file} is not UTF-8 text: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise ValueError(f"{option} {file}: at least 2 prompts are needed, got {len(lines)}")
    return lines


def _prompt(text: str) -> Any:
    """The target without its last word, which is the answer."""
    from itda_lens.control import Prompt

    before, _, last = text.rstrip(" .?!").rpartition(" ")
    if not before:
        raise ValueError(f"a target needs two words at least: its last one is the answer, got {text!r}")
    return Prompt(before, " " + last)


def _write(file: Path, known: Any) -> None:
    from json import dumps

    from itda_lens.records import replacing

    with replacing(file) as (temporary,):
        temporary.write_text(dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    make_console().print(shown(f"Texts: {file}"), soft_wrap=True)

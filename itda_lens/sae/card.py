"""The card of a repository of dictionaries: how to load them, and what they are."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from itda_lens.records import BUILD_KEY, Provenance
from itda_lens.terminal import printable

MARK = "<!-- This card is written by itda-lens. Remove this line to keep a card of your own. -->"
"""The line by which a card is known as one that may be replaced."""

LABELS = {
    "full": "Labels name the text, context and token that each atom comes from, and quote the token and "
    "some of the text around it.",
    "places": "Labels name the number of the text, of the context and of the token that each atom comes "
    "from. They quote no text. Whoever has the texts can look the tokens up.",
    "none": "The dictionary carries no labels.",
    None: "The card's writer does not know how much the labels hold.",
}
"""The sentence on the card about each choice of labels."""


class Entry(NamedTuple):
    """A dictionary of the repository.

    Attributes:
        name: its folder.
        config: its `cfg.json`.
        labels: how much of the labels it holds; None if that is not recorded.
        figures: what was measured of it, by name.
    """

    name: str
    config: Mapping[str, Any]
    labels: str | None
    figures: Mapping[str, float]


def card(repo: str, entries: Sequence[Entry]) -> str:
    """The card as Markdown, for one or several dictionaries. Foreign text in it is escaped."""
    first = entries[0]
    where = repo if len(entries) == 1 else f"{repo}/{first.name}"
    records = {entry.name: _provenance(entry) for entry in entries}
    models = {record.model_name for record in records.values() if record.model_name}
    of = f" of {_escaped(' and '.join(sorted(models)))}" if models else ""
    lines = [
        "---",
        "library_name: itda-lens",
        "tags:",
        *(f"- {tag}" for tag in ("itda-lens", "saelens", "sparse-autoencoder", "interpretability")),
        "---",
        MARK,
        "",
        f"# Dictionaries of activations{of}",
        "",
        "Each atom is a labelled direction; a code says how an activation is made of a few of them. "
        'Every dictionary is a SAELens SAE of the architecture "itda".',
        "",
        "## Load",
        "",
        "```",
        "pip install itda-lens",
        "```",
        "",
        "```python",
        "import itda_lens",
        "",
        f'itda = itda_lens.load("{where}")',
        "```",
        "",
        "SAELens knows the architecture once `itda_lens` is imported:",
        "",
        "```python",
        "import itda_lens",
        "from sae_lens import SAE",
        "",
        f'sae = SAE.from_pretrained("{repo}", "{first.name}")',
        "```",
        "",
        "## Dictionaries",
        "",
        *_table(
            ["folder", "hook", "atoms", "width", "k", "mean L0", "encoder", "labels"],
            [_row(entry, records[entry.name]) for entry in entries],
        ),
    ]
    names = list(dict.fromkeys(name for entry in entries for name in entry.figures))
    if names:
        rows = [[entry.name, *(_number(entry.figures.get(name)) for name in names)] for entry in entries]
        lines += ["", "## Figures", "", *_table(["folder", *names], rows)]
    lines += ["", "## What the labels expose", ""]
    lines += [
        f"{LABELS.get(kind, LABELS[None])} ({', '.join(_escaped(e.name) for e in own)})"
        for kind in dict.fromkeys(entry.labels for entry in entries)
        if (own := [entry for entry in entries if entry.labels == kind])
    ]
    lines += [
        "",
        "An atom itself is an activation of the model, or near one. It can give away the token that it "
        "comes from, also without a label.",
        "",
        "## Settings",
    ]
    for entry in entries:
        settings = _settings(records[entry.name])
        lines += ["", f"### {_escaped(entry.name)}", "", *_table(["setting", "value"], settings)]
    return "\n".join(lines) + "\n"


def _provenance(entry: Entry) -> Provenance:
    metadata = entry.config.get("metadata")
    return Provenance.of(metadata if isinstance(metadata, dict) else {})


def _row(entry: Entry, record: Provenance) -> list[Any]:
    config = entry.config
    sign = "signed" if config.get("signed") else "non-negative"
    return [
        entry.name,
        record.hook_name or "",
        config.get("d_sae", ""),
        config.get("d_in", ""),
        config.get("k", ""),
        "" if config.get("l0") is None else _number(config["l0"]),
        f"{config.get('method', '')}, {sign}",
        entry.labels or "",
    ]


def _settings(record: Provenance) -> list[list[Any]]:
    known = {
        name: value
        for name, value in vars(record).items()
        if value is not None and name not in ("recipe", "versions", "others")
    }
    settings = {**known, **record.recipe, **record.others}
    settings |= {f"version of {name}": value for name, value in record.versions.items()}
    return [[name, value] for name, value in settings.items() if name != BUILD_KEY]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    head, *body = ([_escaped(cell) for cell in row] for row in (header, *rows))
    lines = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(line)} |" for line in lines]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _escaped(value: object) -> str:
    """Foreign text as text: no markup, no new line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", printable(value))

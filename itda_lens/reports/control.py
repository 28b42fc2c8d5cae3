"""Effects of edits: a table, a JSON file, and texts side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from itda_lens.control import Effect, Scored
from itda_lens.records import replacing
from itda_lens.reports.tables import TITLE, origin
from itda_lens.terminal import shown

FORMS = {
    "probability": ".3f", "logit difference": "+.2f", "changed": ".1%", "norm": ".3f", "KL": ".4f",
    "loss": ".3f", "accuracy": ".1%", "concept": ".0%", "distinct-2": ".2f", "perplexity": ".1f",
}  # fmt: skip
"""How figures are written."""


def effects_table(effects: Sequence[Effect], title: str = "Effects") -> Table:
    """A row for each edit; under a mean, the ends of its confidence interval."""
    table = Table(
        title=shown(title, TITLE),
        caption="intervals are bootstrapped over prompts, or over retained texts",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    names = list(effects[0].figures) if effects else []
    table.add_column("", min_width=8)
    for name in names:
        table.add_column(name, justify="right", min_width=6)
    for effect in effects:
        cells = []
        for name in names:
            each, form = effect.figures[name], FORMS.get(name, ".3f")
            ends = f"\n{each.low:{form}}…{each.high:{form}}" if each.low < each.high else ""
            cells.append(f"{each.mean:{form}}{ends}")
        table.add_row(shown(effect.name), *cells)
    return table


def chosen_table(chosen: Sequence[Scored], title: str = "Atoms of the edit") -> Table:
    """Atoms with the scores by which they were chosen, and where they came from."""
    table = Table(title=shown(title, TITLE))
    for name in ("atom", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("came from")
    for each in chosen:
        table.add_row(str(each.atom), f"{each.score:.3f}", origin(each.label, each.atom))
    return table


def writings_table(writings: Mapping[str, str], title: str) -> Table:
    """Texts side by side, by the name of the edit."""
    table = Table(title=shown(title, TITLE), show_lines=False)
    for name in writings:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(shown(text) for text in writings.values()))
    return table


def save_effects(effects: Sequence[Effect], path: str | Path, **more: Any) -> Path:
    """Write all figures as JSON, with other facts beside them.

    Raises:
        OSError: the file cannot be written.
    """
    known = {**more, "effects": [asdict(effect) for effect in effects]}
    path = Path(path)
    with replacing(path) as (temporary,):
        temporary.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path

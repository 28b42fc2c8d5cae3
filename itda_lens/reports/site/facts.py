"""The plain data that a site about a dictionary shows. Everything in it can be written as JSON."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE

from itda_lens.analysis import AtomExamples, Decomposition, Example, Examples
from itda_lens.records import Label, checked
from itda_lens.records.files import said
from itda_lens.sae import ITDA, provenance_of
from itda_lens.terminal import printable

DIGITS = 4
"""Significant digits of the figures that a site shows."""

DIFFERENCES = 1000
"""Most atoms of a model diff that the comparison page lists."""


@dataclass(frozen=True)
class SiteFacts:
    """The facts that a site shows of one dictionary.

    Attributes:
        name: the dictionary's name: the title of its pages, and of its folder in a site of several.
        about: figures of the whole dictionary and of the text that was read, by their names.
        table: a column a name, with an entry an atom: three for the quoted text ("before", "token" and
            "after") and the figures of `AtomExamples`. A column of figures may be None as a whole.
        examples: from which `atoms` makes its entries.
        texts: decomposed texts, as `decomposition_facts` gives them.
        comparisons: as `comparison_facts` gives them.
    """

    name: str
    about: Mapping[str, Any]
    table: Mapping[str, list[Any] | None]
    examples: Examples
    texts: Sequence[Mapping[str, Any]] = ()
    comparisons: Sequence[Mapping[str, Any]] = ()

    def atoms(self) -> Iterator[dict[str, Any]]:
        """The facts of each atom's page, in order."""
        return (_atom_facts(atom) for atom in self.examples)


@checked
def site_facts(
    sae: SAE[Any],
    found: Examples,
    *,
    name: str | None = None,
    texts: Sequence[Decomposition] = (),
    comparisons: Sequence[Mapping[str, Any]] = (),
    read_from: str | None = None,
) -> SiteFacts:
    """Gather the facts of a site about a dictionary.

    Args:
        sae: an ITDA, or another SAE of SAELens, which gets the same site without labels.
        found: where its atoms fire (`analysis.examples`).
        name: default: the hook name.
        texts: texts that `analysis.decompose` took apart, for a page of their own.
        comparisons: from `comparison_facts`, for a page of their own.
        read_from: a description of the text that `found` is about.

    Raises:
        ValueError: `found` is about another number of atoms than `sae` has.
    """
    if len(found) != sae.cfg.d_sae:
        raise ValueError(f"found must be about the sae's {sae.cfg.d_sae} atoms, got {len(found)}")
    provenance = provenance_of(sae)
    f1 = found.label_f1()
    about = {
        "model": provenance.model_name,
        "hook": found.hook_name,
        "architecture": sae.cfg.architecture(),
        "atoms": sae.cfg.d_sae,
        "width": sae.cfg.d_in,
        "k": getattr(sae.cfg, "k", None),
        "signed": sae.cfg.signed if isinstance(sae, ITDA) else None,
        "labelled": f1 is not None or found.scores is not None,
        "built_tokens": provenance.n_tokens,
        "tokens": found.n_tokens,
        "read_from": None if read_from is None else printable(read_from),
        "l0": _short(float(found.density.sum())),
        "explained": _short(1 - float(found.unexplained[len(found.unexplained) // 2])),
        "alive": _short(float((found.tokens > 0).mean())),
        "label_f1": None if f1 is None else _short(f1[0]),
        "shuffled_f1": None if f1 is None else _short(f1[1]),
        "edges": [_short(edge) if math.isfinite(edge) else None for edge in found.edges.tolist()],
    }
    quotes = [_name(atom) for atom in found]
    table: dict[str, list[Any] | None] = {
        part: [quote[i] for quote in quotes] for i, part in enumerate(("before", "token", "after"))
    }
    for column in ("density", "energy", "mean_size", "negative"):
        table[column] = [_short(value) for value in getattr(found, column).tolist()]
    table["f1"] = None
    if found.scores is not None:
        table["f1"] = [None if math.isnan(v) else _short(v) for v in found.scores[0, :, 2].tolist()]
    decomposed = [decomposition_facts(text) for text in texts]
    title = printable(name or found.hook_name)
    return SiteFacts(title, about, table, found, decomposed, list(comparisons))


def decomposition_facts(decomposition: Decomposition, top: int = 12) -> dict[str, Any]:
    """A decomposed text for the site: its tokens, each with its `top` atoms.

    Atoms go by their numbers. The pages quote the labels from the table.
    """
    return {
        "text": _visible(decomposition.text),
        "warning": decomposition.warning,
        "tokens": [
            {
                "token": _visible(token.token),
                "breaks": "\n" in token.token,
                "explained": _short(token.explained),
                "unusual": None if token.unusual is None else _short(token.unusual),
                "atoms": [
                    [c.atom, _short(c.coefficient), _short(c.share)] for c in token.components[:top]
                ],
                "more": max(0, len(token.components) - top),
            }
            for token in decomposition
        ],
    }


@checked
def comparison_facts(path: str | Path) -> dict[str, Any]:
    """The facts of a comparison page, from a file that `save_comparison` or `save_differences` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    file = Path(path)
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {"name": printable(file.stem), **_comparison(known)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"path must be a file of figures that `itda compare --json` wrote, but {file} is none: "
            f"{said(error)}"
        ) from error


def _comparison(known: Any) -> dict[str, Any]:
    if isinstance(known, list):
        rows = [
            {
                "atom": int(difference["atom"]),
                "excess": _short(float(difference["excess"])),
                "q": _short(float(difference["q"])),
                "tokens": int(difference["tokens"]),
                "shared": difference["shared"],
                "label": _saved_quote(difference["label"]),
                "example": _saved_quote(next(iter(difference["examples"]), None)),
            }
            for difference in known
        ]
        return {"kind": "differences", "rows": rows[:DIFFERENCES], "of": len(rows)}
    matrices = [
        {
            "title": f"{printable(pair['a'])} → {printable(pair['b'])}",
            "rows": [printable(hook) for hook in pair["hooks_a"]],
            "columns": [printable(hook) for hook in pair["hooks_b"]],
            "values": _numbers(pair["similarity"]),
        }
        for pair in known["layers"]
    ]
    if known["similarity"] is not None:
        names = [printable(model) for model in known["models"]]
        whole = dict(title="Whole models", rows=names, columns=names)
        matrices.insert(0, whole | {"values": _numbers(known["similarity"])})
    return {"kind": "similarities", "measure": printable(known["measure"]), "matrices": matrices}


def _numbers(rows: list[list[float]]) -> list[list[float]]:
    return [[_short(float(value)) for value in row] for row in rows]


def _saved_quote(label: Mapping[str, Any] | None) -> list[str] | None:
    if label is None:
        return None
    known: dict[str, Any] = {name: label[name] for name in ("row", "token", "context")}
    chars = label["chars"]
    return list(_quote(Label(**known, chars=chars and (chars[0], chars[1]))))


def _atom_facts(atom: AtomExamples) -> dict[str, Any]:
    label = atom.label
    return {
        "atom": atom.atom,
        "label": None
        if label is None
        else {
            "quote": _quote(label),
            "place": printable(label.place),
            "cosine": _short(label.cosine),
        },
        "tokens": atom.tokens,
        "density": _short(atom.density),
        "mean_size": _short(atom.mean_size),
        "max_size": _short(atom.max_size),
        "negative": _short(atom.negative),
        "energy": _short(atom.energy),
        "histogram": list(atom.histogram),
        "top": [_example(example) for example in atom.top],
        "bottom": [_example(example) for example in atom.bottom],
        "quantiles": [[_example(example) for example in group] for group in atom.quantiles],
        "promoted": [[_visible(token), _short(change)] for token, change in atom.promoted],
        "suppressed": [[_visible(token), _short(change)] for token, change in atom.suppressed],
        "firing_with": [[a, _short(share), _short(lift)] for a, share, lift in atom.firing_with],
        "nearest": [[a, _short(cosine)] for a, cosine in atom.nearest],
        "score": atom.score and [_short(value) for value in atom.score],
        "shuffled": atom.shuffled and [_short(value) for value in atom.shuffled],
    }


def _name(atom: AtomExamples) -> tuple[str, str, str]:
    """The text by which an atom is shown in lists: its label, or else where it fires most."""
    if atom.label is not None:
        return _quote(atom.label)
    first = (*atom.top, *atom.bottom)[:1]
    return _quote(first[0].label) if first else ("", "", "")


def _example(example: Example) -> list[Any]:
    return [*_quote(example.label), _short(example.coefficient)]


def _quote(label: Label) -> tuple[str, str, str]:
    """The text before the token, the token, and the text after it, all of them visible."""
    if label.token is None and label.context is None:
        return "", _visible(str(label)), ""
    before, token, after = (_visible(part) for part in label.quoted())
    return before, token, after


def _visible(text: str) -> str:
    """Text in which everything can be seen: line ends as "⏎", marks of direction as escapes."""
    return printable(text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥"))


def _short(value: float) -> float:
    """A number of `DIGITS` significant digits; files of a site hold millions of them."""
    return float(f"{value:.{DIGITS}g}")

"""Text of other people is shown literally and does nothing, wherever rich prints it."""

import io
import unicodedata

import numpy as np
import pytest
import torch
from rich.console import Console

from itda_lens import fit
from itda_lens.analysis import Component, Evaluation, TokenDecomposition
from itda_lens.compare import Comparison, Difference, LayerComparison
from itda_lens.records import BUILD_KEY, Label, Labels, Places
from itda_lens.reports import (
    bench_table,
    comparison_table,
    decomposition_table,
    differences_table,
    evaluation_table,
    info_table,
    labels_table,
    layers_table,
)
from itda_lens.reports.tables import quote
from itda_lens.saebench import Result
from itda_lens.terminal import make_console, printable, shown

# What is written, and what is seen.
HOSTILE = {
    "[bold]x[/bold]": "[bold]x[/bold]",
    "[/]": "[/]",
    "[red": "[red",
    ":dog:": ":dog:",
    "a\\b\\": "a\\b\\",
    "\\[x]": "\\[x]",
    "\x1b[31mred\x1b[0m": "\\x1b[31mred\\x1b[0m",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "\x9b2J": "\\x9b2J",
    "\x7f\x08": "\\x7f\\x08",
    "a\rb": "a\\rb",
    "\u202eabc\u202c": "\\u202eabc\\u202c",
    "\u2066a\u2069\u200f": "\\u2066a\\u2069\\u200f",
    "\u200bzero": "\\u200bzero",
    "\ufeffbom": "\\ufeffbom",
    "\ud800half": "\\ud800half",
    "\u2028line": "\\u2028line",
    "\U000e0041tag": "\\U000e0041tag",
    "plain 猫 é": "plain 猫 é",
}


def rendered(table, encoding="utf-8"):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    # A terminal with colours, as where escape sequences would do harm.
    console = Console(file=stream, width=400, force_terminal=True, color_system=None)
    console.print(table)
    stream.flush()
    return raw.getvalue().decode(encoding)


def dictionary(text):
    itda = fit(torch.randn(50, 8), d_sae=9, k=2, metadata={"model_name": text, "hook_name": text})
    itda.cfg.metadata[BUILD_KEY] = {text: text, "texts": text, "versions": {text: text}}
    itda.cfg.metadata.itda_labels = Labels([label(text)] * 9).to_compact()
    return itda


def label(text):
    return Label(0, token=text, context=f"before[[{text}]]after", chars=(6, 6 + len(text)))


def evaluation_of(text):
    figures = Evaluation(text, 9, 2, 10, 2.0, 0.1, 1.0, 2.9, 3.0, 10.8, 0.98, 0.2, torch.zeros(9))
    return evaluation_table([figures], {text: 10}, {text: 1.0}, title=text)


def decomposition_of(text):
    token = TokenDecomposition(1, "a", [Component(1, -0.5, label(text))], 0.8)
    return decomposition_table([token], 1, text)


def comparison_of(text):
    pair = LayerComparison(text, "b", [text], ["h"], torch.ones(1, 1), 1.0)
    return comparison_table(Comparison("jaccard", "span", [text, "b"], torch.ones(2, 2), [pair]))


def layers_of(text):
    return layers_table(LayerComparison(text, "b", ["h"], [text], torch.ones(1, 1), 1.0))


def differences_of(text):
    found = Difference(1, label(text), 0.5, 0.01, False, 20, (label(text),))
    return differences_table([found], 1, text)


def bench_of(text):
    failed = Result(text, "core", "signed", {}, None, text)
    return bench_table([failed], title=text)


TABLES = {
    "info": lambda text: info_table(dictionary(text), text),
    "labels": lambda text: labels_table(dictionary(text), 3),
    "evaluation": evaluation_of,
    "decomposition": decomposition_of,
    "comparison": comparison_of,
    "layers": layers_of,
    "differences": differences_of,
    "bench": bench_of,
    "message": shown,
}
# How many times the text stands in each.
TIMES = dict(info=8, labels=3, evaluation=2, decomposition=2, comparison=1, layers=2, differences=3)
TIMES |= dict(bench=3, message=1)


@pytest.mark.parametrize("written", HOSTILE)
@pytest.mark.parametrize("name", TABLES)
def test_tables_show_text_literally(name, written):
    text = rendered(TABLES[name](written))
    assert text.count(HOSTILE[written]) >= TIMES[name]
    assert {unicodedata.category(c) for c in text.replace("\n", "")} & {"Cc", "Cf", "Cs", "Zl"} == set()


def test_the_token_itself_is_shown_literally_too():
    token = TokenDecomposition(1, "\x1b[x]:dog:", [Component(1, 0.5, label("a"))], 0.8)
    assert r"'\x1b[x]:dog:'" in rendered(decomposition_table([token], 1, "hook"))


def test_styles_stay():
    assert [span.style for span in quote(label("cat")).spans] == ["dim", "bold", "dim"]


def context_label(text, start, end):
    n = np.zeros(1, dtype=np.int64)
    spans, texts = np.array([[start, end]]), np.array([text], dtype=object)
    return Places.tokens(n, n, n, spans, texts, n.astype(np.uint64))[0]


@pytest.mark.parametrize(
    ("text", "start", "end", "expected"),
    [
        ("[[cat]] and [[cat]] and", 14, 17, "[[cat]] and [[«cat»]] and"),
        ("[[cat]] and [[cat]] and", 2, 5, "[[«cat»]] and [[cat]] and"),
        ("a [[[[ b", 2, 6, "a «[[[[» b"),
        ("x ]] y ]] z", 7, 9, "x ]] y «]]» z"),
        ("a]]b a]]b", 5, 9, "a]]b «a]]b»"),
        ("- " * 30 + "[[it]] - [[it]] - x", 71, 73, " - - - - [[it]] - [[«it»]] - x"),
        ("one[[]]two", 5, 5, "one[[«»]]two"),
        ("a\nb\tc", 2, 3, "a⏎«b» c"),
    ],
)
def test_the_marked_token_is_the_labels_own(text, start, end, expected):
    assert quote(context_label(text, start, end)).plain == expected


def test_labels_made_elsewhere_are_marked_too():
    short = Label(0, token="cat", context="the [[cat]] sat", chars=(500, 503))
    assert quote(short).plain == "the «cat» sat"
    unmarked = Label(0, token="cat", context="no marks")
    assert quote(unmarked).plain == "no marks«cat»"
    assert quote(Label(3, token="\x1b")).plain == r"'\x1b' (text 3, chunk 0, position 0)"


def test_a_terminal_that_knows_ascii_only(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console = make_console()
    for name in TABLES:
        console.print(TABLES[name]("猫 \x1b"))
    console.print("[bold]:dog:[/]")
    console.file.flush()
    text = raw.getvalue().decode("ascii")
    assert text.count(r"\u732b") >= sum(TIMES.values())
    assert "[bold]:dog:[/]" in text


def test_printable_leaves_ordinary_text_alone():
    for text in ("", "a b", "naïve café", "日本語", 'it\'s "quoted" \\n', "🐶"):
        assert printable(text) == text
    assert printable("a\tb\nc") == r"a\tb\nc"

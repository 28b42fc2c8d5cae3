"""Docstrings and pages are written in plain words: turns of phrase that newcomers stumble over stay out.

A pattern here says what to write instead. Add one when a sentence had to be read twice.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "itda_lens").rglob("*.py"))
PAGES = sorted((ROOT / "docs").glob("*.md"))

ANYWHERE = {
    r"\b(as|so) (many|few)\b": "name the number; the reader does not know which one is meant",
    r"\bthe same of\b|[,;:] the same with\b": "name the thing again",
    r"\b(about|at|by|for|from|in|of|on|than|to|with) what\b": "name the thing instead of 'what'",
    r"[,;:] ((and|or) )?ones? that\b": "name the thing instead of 'one that'",
}
"""Patterns that no sentence may match, each with the advice for whoever wrote one."""

OPENING = r"(As|By which|It|Its|Not|Of|Such|The same|These|They|This|Those|What)\b"
"""How no docstring may begin: it is read alone, in an editor or in a reference."""

TO_DO: frozenset[str] = frozenset()
"""Modules whose words are still to be put right, by their path below `itda_lens`."""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, those of constants and attributes included."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            match statement:
                case ast.Expr(ast.Constant(str(text))):
                    yield statement.lineno, text


def prose(page: str) -> Iterator[tuple[int, str]]:
    """First line and text of each paragraph, list item or table row outside of code."""
    page = re.sub(r"^( *)```.*?^\1```", lambda code: "\n" * code[0].count("\n"), page, flags=re.M | re.S)
    start, lines = 1, []
    for number, line in enumerate([*page.split("\n"), ""], start=1):
        if lines and re.match(r" *([-*|] ?|\d+\. |#|$)", line):
            yield start, " ".join(lines)
            lines = []
        if line.strip():
            start = start if lines else number
            lines.append(line.strip())


def faults(text: str) -> list[str]:
    plain = " ".join(text.split())
    return [
        f"{plain[max(0, found.start() - 30) : found.end() + 30]!r}: {advice}"
        for pattern, advice in ANYWHERE.items()
        for found in re.finditer(pattern, plain, flags=re.IGNORECASE)
    ]


def test_docstrings_are_plain():
    found = []
    for module in MODULES:
        name = module.relative_to(ROOT / "itda_lens").as_posix()
        if name in TO_DO:
            continue
        for line, text in docstrings(module.read_text(encoding="utf-8")):
            found += [f"{name}:{line}: {fault}" for fault in faults(text)]
            if re.match(OPENING, text.strip()):
                found.append(f"{name}:{line}: {text.strip()[:40]!r}: begin with the thing itself")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_plain(page):
    found = [
        f"docs/{page.name}:{line}: {fault}"
        for line, text in prose(page.read_text(encoding="utf-8"))
        for fault in faults(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "n_faults"),
    [
        ('FEW = 3\n"""What `MANY` is for\nso few."""', 1),
        ('def f():\n    """The same of\n    what is left."""', 2),
        ('class A:\n    def f(self):\n        """A dictionary, or one that is near."""', 1),
        ('x = "so many"', 0),
        ('"""Three atoms of each text."""', 0),
    ],
)
def test_the_patterns_find_faults(source, n_faults):
    assert sum(len(faults(text)) for _, text in docstrings(source)) == n_faults


def test_code_of_a_page_is_not_prose():
    page = (
        "One line\nand so\nmany more.\n\n```python\nso_many = 'as many as'\n```\n- an item\n| as few |\n"
    )
    assert [line for line, text in prose(page) if faults(text)] == [1, 9]
    assert [text for _, text in prose(page)] == ["One line and so many more.", "- an item", "| as few |"]

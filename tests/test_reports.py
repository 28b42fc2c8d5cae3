"""Tables must be readable in a narrow terminal and in a pipe."""

import io

import pytest
import torch
from rich.console import Console

from itda_lens.analysis import Component, Evaluation, TokenDecomposition
from itda_lens.dictionary import Label
from itda_lens.reports import decomposition_table, evaluation_table, make_console

HOOK = "blocks.10.hook_resid_post"


def render(table, width):
    output = io.StringIO()
    Console(file=output, width=width).print(table)
    return output.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_figure_is_cut(width):
    density = torch.zeros(16_384)
    figures = Evaluation(
        HOOK, 16_384, 20, 2_884, 19.98, 0.0701, 0.999, 2.9, 3.0, 10.8, 0.9882, 0.215, density
    )
    text = render(evaluation_table([figures], {HOOK: 1_103_957}, {HOOK: 6300.0}), width)
    for figure in ("16,384", "20.0", "0.070", "0.9882", "0.215", "99.9%", "1,103,957", "6300"):
        assert figure in text


@pytest.mark.parametrize("width", [80, 120])
def test_decomposition_keeps_signs_atoms_and_the_token_marked(width):
    label = Label(0, token=" cat", context="a list a[[0]] and the[[ cat]] sat on the mat")
    token = TokenDecomposition(1, " dog", [Component(1234, -12.345, label)], 0.873)
    text = render(decomposition_table([token], 3, HOOK), width)
    for expected in ("' dog'", "87%", "-12.35", "1234", "« cat»"):
        assert expected in text
    assert "«0»" not in text


def test_a_pipe_is_not_80_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == 120
    monkeypatch.setenv("COLUMNS", "90")
    assert make_console().width == 90

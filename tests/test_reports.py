"""Tables must be readable in a narrow terminal and in a pipe."""

import io

import pytest
import torch
from rich.console import Console
from sae_lens.analysis.neuronpedia_integration import open_neuronpedia_feature_dashboard

from itda_lens import fit
from itda_lens.analysis import Component, Evaluation, TokenDecomposition
from itda_lens.compare import Difference
from itda_lens.records import Label
from itda_lens.reports import (
    decomposition_table,
    differences_table,
    evaluation_table,
    make_console,
    neuronpedia_features,
    neuronpedia_id,
)

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


def test_an_atom_without_a_label_is_shown_by_its_number():
    token = TokenDecomposition(1, " dog", [Component(1234, 2.5)], 0.5)
    assert "atom 1234" in render(decomposition_table([token], 3, HOOK), 100)
    difference = Difference(atom=77, label=None, excess=0.1, q=0.5, shared=None, tokens=12)
    shown = render(differences_table([difference], 5, "a, b"), 100)
    assert "atom 77" in shown
    assert "one " not in shown


def test_a_pipe_is_not_80_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == 120
    monkeypatch.setenv("COLUMNS", "90")
    assert make_console().width == 90


def test_neuronpedia_ids_are_those_that_saelens_takes(monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    metadata = dict(model_name="org/GPT2", hook_name="blocks.6.hook_resid_post")
    itda = fit(torch.randn(50, 8), d_sae=9, k=2, metadata=metadata)
    assert neuronpedia_id(itda) == "gpt2/6-res-itda"
    itda.cfg.metadata.neuronpedia_id = neuronpedia_id(itda)
    open_neuronpedia_feature_dashboard(itda, 3)
    assert opened == ["https://neuronpedia.org/gpt2/6-res-itda/3"]
    record = next(neuronpedia_features(itda))
    assert (record["modelId"], record["layer"], record["frac_nonzero"]) == ("gpt2", "6-res-itda", None)
    with pytest.raises(ValueError, match="needs model_name and hook_name"):
        neuronpedia_id(fit(torch.randn(50, 8), d_sae=9, k=2))

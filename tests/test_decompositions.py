"""Decompositions that do not mislead: shares, signs in words, and a warning for foreign text."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from itda_lens import Label, Labels, build, fit, load
from itda_lens.analysis import Component, Decomposition, TokenDecomposition, decompose, examples
from itda_lens.pursuit import Coding, encode, unexplained_out_of_fold
from itda_lens.reports import decomposition_table
from itda_lens.sae import provenance_of

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def itda(tiny, texts):
    return build(tiny, texts, HOOK, d_sae=40, k=3, context_size=12, progress=False)[HOOK]


def made(unusual, n=10):
    """A decomposition of ten tokens, of which some are unusual."""
    tokens = [
        TokenDecomposition(i, f"t{i}", [Component(i, -2.0, Label(0, token="<b>"), 1.0)], 0.5, unusual=u)
        for i, u in enumerate([*[0.99] * unusual, *[0.5] * (n - unusual)])
    ]
    return Decomposition(tokens, HOOK, "text")


class TestShares:
    def test_they_add_up_to_the_reconstruction(self, itda, tiny):
        for token in decompose(tiny, itda, "the cat sat on the mat"):
            parts = {c.atom: c.coefficient * itda.W_dec[c.atom].detach() for c in token.components}
            whole = sum(parts.values())
            for c in token.components:
                expected = (parts[c.atom] @ whole / whole.square().sum()).item()
                assert c.share == pytest.approx(expected, abs=1e-5)
            assert sum(c.share for c in token.components) == pytest.approx(1, abs=1e-5)

    def test_old_calls_work(self):
        """Components and tokens of version 0.2 had no share and no rank."""
        assert Component(1, 2.0, None).share == 0
        assert TokenDecomposition(0, "a", [], 0.5).unusual is None


class TestUsualResidual:
    def test_it_is_measured_without_a_texts_own_atoms(self):
        torch.manual_seed(0)
        x, atoms = torch.randn(50, 8), torch.nn.functional.normalize(torch.randn(12, 8), dim=-1)
        folds, atom_folds = torch.arange(50) % 4, torch.arange(12) % 5 - 1
        found = unexplained_out_of_fold(x, folds, atoms, atom_folds, Coding(3, "omp"))
        for i in range(50):
            own = atoms[atom_folds != folds[i]]
            code = encode(x[i], own, 3, method="omp")
            left = (x[i] - code.decode(own)).square().sum() / x[i].square().sum()
            assert found[i].item() == pytest.approx(left.item(), abs=1e-5)

    def test_a_build_records_it(self, itda, tiny, texts):
        recorded = provenance_of(itda).unexplained
        assert recorded is not None
        assert len(recorded) == 101
        assert recorded == sorted(recorded)
        # On the build's own text, atoms included, codes leave less.
        found = examples(tiny, itda, texts, progress=False)
        assert found.unexplained[500] < recorded[50]

    def test_it_survives_saving_and_falls_with_other_codes(self, itda, tiny, texts, tmp_path):
        itda.save_model(tmp_path)
        again = load(tmp_path)
        assert provenance_of(again).unexplained == provenance_of(itda).unexplained
        assert provenance_of(again.prefix(20)).unexplained is None
        assert provenance_of(itda.nonnegative()).unexplained == provenance_of(itda).unexplained
        again.calibrate(torch.randn(100, 32), l0=2)
        assert provenance_of(again).unexplained is None

    def test_too_few_texts_to_hold_some_out(self):
        itda = fit(torch.randn(3, 4), d_sae=2, k=1, progress=False)
        assert provenance_of(itda).unexplained is None
        assert "unexplained" not in itda.cfg.metadata.itda_build


class TestRank:
    def test_it_is_the_share_of_the_quantiles_below(self, itda, tiny):
        usual = np.linspace(0, 1, 5).tolist()
        for token in decompose(tiny, itda, "the cat sat", usual=usual):
            assert token.unusual == pytest.approx(1 - token.explained, abs=1e-6)
        recorded = provenance_of(itda).unexplained
        for token in decompose(tiny, itda, "the cat sat"):
            below = np.mean(np.array(recorded) < 1 - token.explained)
            assert token.unusual == pytest.approx(below, abs=0.02)

    def test_without_a_record(self, itda, tiny):
        found = decompose(tiny, itda.prefix(20), "the cat sat on the mat")
        assert all(token.unusual is None for token in found)
        assert found.unusual_share is None
        assert found.warning is None

    @pytest.mark.parametrize("usual", [[], [0.5], [0.5, 0.4]])
    def test_bad_quantiles(self, itda, tiny, usual):
        with pytest.raises(ValueError, match="usual must be two or more quantiles that rise"):
            decompose(tiny, itda, "the cat", usual=usual)


class TestWarning:
    @pytest.mark.parametrize(("unusual", "n", "warns"), [(3, 10, False), (4, 10, True), (2, 3, False)])
    def test_a_third_of_the_tokens_and_three(self, unusual, n, warns):
        found = made(unusual, n)
        assert (found.warning is not None) == warns
        assert found.unusual_share == unusual / n
        if warns:
            assert f"{unusual} of its {n} tokens" in found.warning

    def test_it_is_shown(self):
        def text(found):
            output = io.StringIO()
            Console(file=output, width=100).print(decomposition_table(found, 3, HOOK))
            return " ".join(output.getvalue().split())

        assert "unlike the text" in text(made(5))
        assert "unlike the text" not in text(made(0))
        assert "NOT -2.00" in text(made(0))

    @pytest.mark.real
    def test_the_demo_knows_its_own_kind_of_text(self, smollm2):
        """Python's reference is familiar to it; a children's sentence, a story and German are not."""
        demo = load("demo")
        for familiar in (
            "The function returns a list of strings, or raises an error.",
            "A class definition is an executable statement that binds a name.",
        ):
            assert decompose(smollm2, demo, familiar).warning is None
        for foreign in (
            "The cat sat on the mat.",
            "Once upon a time there was a little girl who lived in a village near the forest.",
            "Liebe Grüße aus Berlin, wo die Sonne scheint.",
        ):
            assert decompose(smollm2, demo, foreign).warning is not None


class TestHtml:
    def test_decompositions(self):
        text = made(5)._repr_html_()
        assert "unlike the text" in text
        assert "NOT</b>" in text
        assert "&lt;b&gt;" in text
        assert "'<b>'" not in text
        assert made(0, n=3)._repr_html_().count("<tr>") == 4

    def test_labels(self):
        bad = "<script>\u202e\ud800\n"
        labels = Labels([Label(0, token=bad, context=f"{bad}[[{bad}]]{bad}", chars=(11, 22))] * 25)
        text = labels._repr_html_()
        assert "<script>" not in text
        assert "\u202e" not in text
        assert "\ud800" not in text
        assert "&lt;script&gt;" in text
        assert "5 more" in text
        assert Label(0, token="<")._repr_html_() == "&#x27;&lt;&#x27; (text 0, chunk 0, position 0)"

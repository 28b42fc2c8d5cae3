"""Texts are cut in one way by everything that reads them again for a dictionary."""

import pytest
import torch
from sae_lens import SAE

from itda_lens import fit
from itda_lens.analysis import evaluate
from itda_lens.analysis.evaluate import tokenization_of
from itda_lens.architectures import build_baselines
from itda_lens.compare import activations_of
from itda_lens.records import BUILD_KEY, Cutting
from itda_lens.sae import provenance_of
from itda_lens.sources import ModelSource
from itda_lens.training import collect

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def cuttings(monkeypatch):
    """Every `Cutting` that a model's texts are cut by, as it is used."""
    from itda_lens.sources import contexts

    seen = []
    contexts_of = contexts.Tokenization.contexts

    def recorded(self, texts, *where):
        seen.append((self.cutting.context_size, self.prepend_bos, self.cutting.keep_special_tokens))
        return contexts_of(self, texts, *where)

    monkeypatch.setattr(contexts.Tokenization, "contexts", recorded)
    return seen


def readers(tiny, texts, tmp_path):
    """Every public function that cuts texts as a dictionary's metadata say."""
    return {
        "evaluate": lambda itda: evaluate(tiny, itda, texts, max_tokens=40, progress=False),
        "tokenization_of": lambda itda: list(tokenization_of([itda], tiny).contexts(texts[:1])),
        "activations_of": lambda itda: activations_of([itda], texts, tiny, progress=False),
        "build_baselines": lambda itda: build_baselines(
            [itda], ["random"], tmp_path, model=tiny, texts=texts, max_tokens=200, progress=False
        ),
    }


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("in_record", [False, True])
def test_metadata_of_a_fit_decide_everywhere(tiny, texts, tmp_path, cuttings, in_record, kept):
    """It does not matter whether SAELens's entries say it, or the record of a build."""
    cutting = {"context_size": 16, "prepend_bos": False}
    record = {"keep_special_tokens": kept} | (cutting if in_record else {})
    metadata = {"hook_name": HOOK, "model_name": "tiny", BUILD_KEY: record}
    metadata |= {} if in_record else cutting
    itda = fit(torch.randn(200, 32), d_sae=20, k=4, metadata=metadata)
    itda.save_model(tmp_path / "saved")
    for name, read in readers(tiny, texts, tmp_path / "baselines").items():
        for dictionary in (itda, SAE.load_from_disk(tmp_path / "saved")):
            cuttings.clear()
            read(dictionary)
            if name != "build_baselines" or dictionary is itda:  # the second time it is there already
                assert cuttings, name
            assert set(cuttings) <= {(16, False, kept)}, name


def test_defaults_are_those_of_cutting(tiny, texts, cuttings, tmp_path):
    itda = fit(torch.randn(200, 32), d_sae=20, k=4, metadata={"hook_name": HOOK})
    for read in readers(tiny, texts, tmp_path).values():
        read(itda)
    collect(tiny, texts, HOOK, max_tokens=50, progress=False)
    next(iter(ModelSource(tiny, texts, HOOK).rows()))
    default = Cutting()
    assert set(cuttings) == {(default.context_size, True, default.keep_special_tokens)}
    assert provenance_of(itda).cutting == default

"""SAELens's own loaders refuse what `itda_lens.load` refuses."""

import copy
import dataclasses
import json

import pytest
import torch
from sae_lens import SAE

import itda_lens
from itda_lens import ITDA, ITDAConfig
from itda_lens.sae.saved import REQUIRED, WEIGHTS_KEY
from itda_lens.saebench import worker
from itda_lens.saebench.job import Entry, Job


@pytest.fixture
def saved(tmp_path):
    itda = itda_lens.fit(torch.randn(60, 6), d_sae=40, k=3, metadata={"hook_name": "blocks.1.hook_z"})
    itda.save_model(tmp_path)
    return tmp_path


def change(folder, **fields):
    """Set fields of `cfg.json`; ... takes one out."""
    file = folder / "cfg.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def of_the_bench_worker(folder):
    return worker.load(Entry("x", str(folder)), Job("core", {}, [], "m", None, "cpu", "", ""))


LOADERS = {
    "itda_lens": itda_lens.load,
    "SAE": SAE.load_from_disk,
    "ITDA": ITDA.load_from_disk,
    "bench worker": of_the_bench_worker,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
class TestEveryLoader:
    # SAELens itself reads "dtype" before anything else.
    @pytest.mark.parametrize("field", [name for name in REQUIRED if name != "dtype"])
    def test_refuses_a_missing_field(self, load, field, saved):
        change(saved, **{field: ...})
        with pytest.raises(ValueError, match=f"'{field}' is missing"):
            load(saved)

    def test_refuses_missing_metadata(self, load, saved):
        change(saved, metadata=...)
        with pytest.raises(ValueError, match="'metadata' is missing"):
            load(saved)

    @pytest.mark.parametrize("metadata", [{}, {"hook_name": "blocks.1.hook_z"}])
    def test_refuses_metadata_that_saelens_would_cut_down(self, load, metadata, saved):
        change(saved, metadata=metadata)
        with pytest.raises(ValueError, match="sae_lens_version"):
            load(saved)

    @pytest.mark.parametrize("value", ["yes", 1, [True]])
    def test_refuses_metadata_of_another_type(self, load, value, saved):
        metadata = json.loads((saved / "cfg.json").read_text())["metadata"]
        change(saved, metadata=metadata | {"prepend_bos": value})
        with pytest.raises(ValueError, match="prepend_bos"):
            load(saved)

    def test_takes_a_whole_one(self, load, saved):
        loaded = load(saved)
        assert loaded.cfg.k == 3
        assert loaded.labels[0].row >= 0


class TestConfigurationsMadeInCode:
    def test_keep_their_defaults(self):
        assert ITDAConfig(d_in=4, d_sae=40).k == 32
        assert SAE.from_dict({"architecture": "itda", "d_in": 4, "d_sae": 40}).cfg.k == 32

    def test_are_copied_replaced_and_given_back(self, saved):
        cfg = itda_lens.load(saved).cfg
        for other in (copy.copy(cfg), copy.deepcopy(cfg), dataclasses.replace(cfg)):
            assert other == cfg
        again = ITDAConfig.from_dict(cfg.to_dict())
        assert again == cfg
        assert WEIGHTS_KEY not in again.metadata

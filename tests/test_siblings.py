"""Faults found by trying siblings of known ones."""

import os
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata

import itda_lens
from itda_lens import ITDAConfig, fit
from itda_lens.sae import save_sparsity
from itda_lens.training import output_folder, save_all

X = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
LABELS = [(i // 20, 0, i % 20) for i in range(300)]


@pytest.mark.parametrize(
    "settings",
    [{}, dict(preset="paper"), dict(l0=2, labels=LABELS), dict(update=True), dict(method="omp")],
    ids=str,
)
def test_the_default_device_does_not_matter(settings, tmp_path):
    """Torch's default device, as set_default_device("cuda") makes it, is for the user's own tensors."""

    def made() -> list[torch.Tensor]:
        itda = fit(X, d_sae=24, k=4, **settings)
        itda.save_model(tmp_path)
        loaded = itda_lens.load(tmp_path)
        loaded.calibrate(X, l0=2)
        several = (itda, itda.nonnegative(), itda.prefix(8), loaded)
        return [itda.W_dec, *(one(X) for one in several)]

    wanted = made()
    with torch.device("meta"):
        found = made()
    assert all(map(torch.equal, found, wanted))


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    for path in (".", "..", inside, inside.parent):
        folder = output_folder(path)
        with pytest.raises(FileExistsError, match="current folder or holds it"):
            folder.__enter__()
    with output_folder("new") as folder:
        save_all({"x": fit(X, d_sae=24, k=4)}, folder)
    assert os.listdir() == ["new"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/tmp/x", "a/../../x", "a\0b"])
def test_dictionaries_are_saved_inside_the_folder(tmp_path, name):
    itda = fit(X, d_sae=24, k=4)
    with pytest.raises(ValueError, match="dictionaries must go by names of subfolders, got"):
        save_all({"good": itda, name: itda}, tmp_path / "out")
    assert not [*Path(tmp_path).iterdir()]


def test_densities_of_another_number_of_atoms(tmp_path):
    fit(X, d_sae=24, k=4).save_model(tmp_path)
    with pytest.raises(ValueError, match="feature_density must have d_sae=24 numbers, got 25"):
        save_sparsity(tmp_path, torch.full((25,), 0.5))


def test_metadata_as_a_mapping():
    """As SAELens's `from_dict` passes it, before it replaces it."""
    cfg = ITDAConfig(d_in=6, d_sae=8, k=2, metadata={"hook_name": "x"})
    assert isinstance(cfg.metadata, SAEMetadata)
    assert SAE.from_dict(cfg.to_dict()).cfg.metadata.hook_name == "x"

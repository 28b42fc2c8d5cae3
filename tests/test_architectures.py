"""Baselines: random activations, principal components, SAEs that SAELens trains."""

import pytest
import torch
from conftest import TINY
from sae_lens import SAE

import itda_lens
from itda_lens import fit
from itda_lens.architectures import (
    build_baselines,
    principal_components,
    random_atoms,
    save_inference,
    train_sae,
)
from itda_lens.training import Activations, collect

HOOK = "blocks.1.hook_resid_post"
D_IN = TINY["hidden_size"]


@pytest.fixture(scope="module")
def activations(tiny, texts) -> Activations:
    many = [f"{a} {b}" for a in texts for b in texts[:4]]
    options = dict(max_tokens=3000, context_size=16, progress=False)
    return collect(tiny, many, [HOOK], **options)[HOOK]


class TestBaselines:
    def test_random_atoms(self, activations):
        x, labels = activations
        itda = random_atoms(x, d_sae=30, k=3, labels=labels)
        mean = x.double().mean(dim=0).float()
        place = {label.key: i for i, label in enumerate(labels)}
        for i, label in enumerate(itda.labels):
            expected = x[place[label.key]] - mean
            torch.testing.assert_close(itda.W_dec[i], expected / expected.norm())
        assert torch.equal(itda.W_dec, random_atoms(x, d_sae=30, k=3).W_dec)
        assert not torch.equal(itda.W_dec, random_atoms(x, d_sae=30, k=3, seed=1).W_dec)
        with pytest.raises(ValueError, match="d_sae must be between 1 and the 3000"):
            random_atoms(x, d_sae=3001, k=3)

    def test_principal_components(self, activations):
        x = activations.values
        pca = principal_components(x, k=D_IN)
        torch.testing.assert_close(pca.W_dec @ pca.W_dec.T, torch.eye(D_IN), atol=1e-5, rtol=0)
        spread = ((x - x.mean(dim=0)) @ pca.W_dec.T).var(dim=0)
        assert (spread.diff() <= 1e-6 * spread[0]).all()
        with torch.no_grad():
            # The whole basis at every token gives the input back, up to cfg.rtol.
            assert (pca(x) - x).norm() <= 2 * pca.cfg.rtol * x.norm()
            few = principal_components(x, k=3)
            coefficients = (x - few.b_dec) @ few.W_dec.T
            largest = coefficients.abs().topk(3).indices.sort().values
            assert torch.equal(few.encode_sparse(x).indices.sort().values, largest)

    def test_topk_learns_and_is_what_saelens_loads(self, activations, tmp_path):
        x = activations.values
        fvu = {}
        for epochs in (1, 6):
            trained = train_sae(x, d_sae=60, k=4, epochs=epochs, batch_size=256)
            save_inference(trained, tmp_path / str(epochs))
            sae = SAE.load_from_disk(tmp_path / str(epochs))
            assert sae.cfg.architecture() == "topk"
            with torch.no_grad():
                assert (sae.encode(x) != 0).sum(dim=-1).max() <= 4
                fvu[epochs] = ((x - sae(x)).square().sum() / (x - x.mean(dim=0)).square().sum()).item()
        assert fvu[6] < fvu[1] < 1
        again = train_sae(x, d_sae=60, k=4, epochs=6, batch_size=256)
        save_inference(again, tmp_path / "again")
        assert torch.equal(SAE.load_from_disk(tmp_path / "again").W_dec, sae.W_dec)

    @pytest.mark.saebench  # the oldest SAELens has a fault here
    @pytest.mark.parametrize("scale", [0.1, 10.0])
    def test_topk_over_the_batch_has_k_on_average(self, activations, tmp_path, scale):
        x = scale * activations.values
        trained = train_sae(x, d_sae=60, k=4, architecture="batchtopk", epochs=8, batch_size=256)
        save_inference(trained, tmp_path)
        sae = SAE.load_from_disk(tmp_path)
        assert sae.cfg.architecture() == "jumprelu"
        with torch.no_grad():
            l0 = (sae.encode(x) != 0).sum(dim=-1).double()
            assert l0.mean() == pytest.approx(4, rel=0.35)
            assert l0.min() < l0.max()
            assert (x - sae(x)).square().sum() < (x - x.mean(dim=0)).square().sum()

    @pytest.mark.saebench  # the oldest SAELens has a fault here
    def test_matryoshka_has_nested_levels(self, activations, tmp_path):
        x = activations.values
        trained = train_sae(x, d_sae=60, k=4, architecture="matryoshka", epochs=8, batch_size=256)
        assert trained.cfg.matryoshka_widths == [7, 15, 30, 60]
        save_inference(trained, tmp_path)
        sae = SAE.load_from_disk(tmp_path)
        assert sae.cfg.architecture() == "jumprelu"
        with torch.no_grad():
            assert (sae.encode(x) != 0).sum(dim=-1).double().mean() == pytest.approx(4, rel=0.35)
            assert (x - sae(x)).square().sum() < (x - x.mean(dim=0)).square().sum()

    def test_matching_pursuit_learns(self, activations, tmp_path):
        x = activations.values
        errors = []
        for epochs in (1, 8):
            options = dict(architecture="matching_pursuit", epochs=epochs, batch_size=256)
            save_inference(train_sae(x, d_sae=60, k=4, **options), tmp_path)
            sae = SAE.load_from_disk(tmp_path)
            assert sae.cfg.architecture() == "matching_pursuit"
            with torch.no_grad():
                assert (sae.encode(x) != 0).sum(dim=-1).max() <= 4
                errors.append((x - sae(x)).square().sum())
        assert errors[1] < errors[0] < (x - x.mean(dim=0)).square().sum()

    def test_bad_input(self, activations):
        x = activations.values
        for change, message in (
            (dict(k=61), "k must be"),
            (dict(epochs=0), "epochs must be"),
            (dict(architecture="gated"), "architecture must be one of .*'gated'"),
        ):
            with pytest.raises(ValueError, match=message):
                train_sae(x, **dict(d_sae=60, k=4) | change)


class TestBaselinesLike:
    def test_of_a_calibrated_dictionary_have_its_mean(self, tiny_folder, texts, tmp_path):
        options = dict(d_sae=40, k=9, l0=3, context_size=16, device="cpu", progress=False)
        itda = itda_lens.build(str(tiny_folder), texts, HOOK, **options)[HOOK]
        (path,) = build_baselines(
            [itda], ["random"], tmp_path, texts=texts, model=str(tiny_folder), progress=False
        )
        assert path.name == f"random-40-k3-{HOOK}"
        assert itda_lens.load(path).cfg.k == 3

    def test_bad_input(self, tmp_path):
        x = torch.randn(40, D_IN)
        bare = fit(x, d_sae=20, k=2)
        itda = fit(x, d_sae=20, k=2, metadata={"hook_name": HOOK})
        with pytest.raises(ValueError, match="must be among random, .*matching_pursuit; got 'sae'"):
            build_baselines([itda], ["sae"], tmp_path, texts="t", model=None)
        with pytest.raises(ValueError, match="name their hook_name"):
            build_baselines([bare], ["pca"], tmp_path, texts="t", model=None)
        del itda.cfg.metadata.itda_build["n_tokens"]
        with pytest.raises(ValueError, match="max_tokens must be given"):
            build_baselines([itda], ["pca"], tmp_path, texts="t", model=None)

"""Dictionaries of vectors that the user has already, and unions of dictionaries."""

import logging

import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import itda_lens
from itda_lens import ITDA, Label, fit
from itda_lens.records import BUILD_KEY
from itda_lens.sae import provenance_of
from itda_lens.sources import language_model, unembedding

D = 16


def rows(n, seed=0, dtype=torch.float32):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def unit(x):
    return torch.nn.functional.normalize(x.double(), dim=1).to(x.dtype)


class TestFromAtoms:
    def test_atoms_are_the_rows_at_norm_1(self):
        vectors = rows(12) * torch.logspace(-30, 30, 12)[:, None]
        itda = ITDA.from_atoms(vectors, k=3)
        torch.testing.assert_close(itda.W_dec, unit(rows(12)), atol=2e-7, rtol=0)
        assert (itda.cfg.method, itda.cfg.k, itda.cfg.d_sae) == ("ols", 3, 12)
        assert not itda.b_dec.any()
        assert itda.labels[4] == Label(row=4, kind="vector")

    def test_rows_of_norm_1_stay_bit_for_bit_and_code_as_before(self):
        x = rows(300) + 2
        first = fit(x, d_sae=40, k=4)
        again = ITDA.from_atoms(first.W_dec, first.labels, k=4, b_dec=first.b_dec)
        assert torch.equal(again.W_dec, first.W_dec)
        assert torch.equal(again.encode(x), first.encode(x))
        assert again.labels == first.labels

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype):
        itda = ITDA.from_atoms(rows(12, dtype=dtype), k=2)
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        assert itda.W_dec.dtype == itda.b_dec.dtype == wanted
        torch.testing.assert_close(itda.W_dec.norm(dim=1), torch.ones(12, dtype=wanted))

    def test_the_decoder_of_another_sae(self):
        from sae_lens import TopKSAE, TopKSAEConfig

        sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=24, k=4))
        sae.W_dec.data, sae.b_dec.data = 3 * rows(24), rows(1)[0]
        itda = ITDA.from_atoms(sae.W_dec, k=4, b_dec=sae.b_dec, kind="latent", signed=False)
        x = sae.b_dec + 2 * sae.W_dec[5]
        assert str(itda.labels[5]) == "latent 5"
        assert itda.encode(x).nonzero().flatten().tolist() == [5]
        assert not itda.W_dec.requires_grad or itda.W_dec.is_leaf

    def test_labels_of_every_kind(self):
        own = Label(row=9, kind="image", name="cat")
        given = ["dog", 7, own, (1, 2, 3)]
        labels = ITDA.from_atoms(rows(4), given, k=1, kind="class").labels
        assert list(labels) == [
            Label(row=0, kind="class", name="dog"), Label(row=7, kind="class"), own, Label(1, 2, 3),
        ]  # fmt: skip
        assert [str(label) for label in labels[:2]] == ["class 0: dog", "class 7"]

    def test_saved_hooked_and_loaded_as_any_other(self, tmp_path):
        metadata = dict(model_name="m", hook_name="blocks.1.attn.hook_z")
        itda = ITDA.from_atoms(rows(12), [f"probe {i}" for i in range(12)], k=3, metadata=metadata)
        assert itda.cfg.reshape_activations == "hook_z"
        itda.save_model(tmp_path)
        for loaded in (itda_lens.load(tmp_path), SAE.load_from_disk(tmp_path)):
            assert loaded.labels == itda.labels
            assert loaded.cfg.to_dict() == itda.cfg.to_dict()
            x = rows(5, seed=1).view(5, 4, 4)
            assert torch.equal(loaded(x), itda(x))
        assert provenance_of(itda).recipe["rule"]["name"] == "from_atoms"

    def test_zero_rows(self, caplog):
        vectors = rows(6)
        vectors[[2, 4]] = 0
        with pytest.raises(
            ValueError, match=r"row 2 has norm zero.* \(2 such rows\); pass zeros='drop'"
        ):
            ITDA.from_atoms(vectors, k=1)
        with caplog.at_level(logging.INFO):
            itda = ITDA.from_atoms(vectors, list("abcdef"), k=1, zeros="drop")
        assert [label.name for label in itda.labels] == list("abdf")
        assert [label.row for label in itda.labels] == [0, 1, 3, 5]
        assert "2 vectors are dropped" in caplog.text
        with pytest.raises(ValueError, match="at least one row that is not zero"):
            ITDA.from_atoms(vectors * 0, k=1, zeros="drop")

    @pytest.mark.parametrize("signed", [True, False])
    def test_duplicates(self, signed):
        vectors = rows(5)
        vectors[1], vectors[3] = 8 * vectors[0], -vectors[2]
        kept = ITDA.from_atoms(vectors, k=2, signed=signed, method="omp")
        assert kept.encode_sparse(vectors[1]).indices[0] == 0  # the first of equal atoms
        dropped = ITDA.from_atoms(vectors, k=2, signed=signed, method="omp", duplicates="drop")
        assert [label.row for label in dropped.labels] == ([0, 2, 4] if signed else [0, 2, 3, 4])
        n = 2 if signed else 1
        with pytest.raises(ValueError, match=rf"row 1 points where an earlier .* \({n} such rows\)"):
            ITDA.from_atoms(vectors, k=2, signed=signed, duplicates="refuse")

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(vectors=rows(4) / 0), ValueError, "vectors must be finite, but row 0"),
            (dict(vectors=rows(0)), ValueError, "vectors must have at least one row"),
            (dict(vectors=rows(4)[:, :0]), ValueError, "vectors must have at least one row and one col"),
            (dict(vectors=[[1.0]]), TypeError, "vectors must be a floating-point tensor"),
            (dict(vectors=rows(4).long()), TypeError, "vectors must be a floating-point tensor"),
            (dict(k=5), ValueError, r"k must be between 1 and the number of vectors=4, got 5"),
            (dict(labels=["a"] * 3), ValueError, "3 labels for 4 vectors"),
            (dict(labels=[2.5] * 4), TypeError, r"labels\[0\] must be"),
            (dict(b_dec=torch.zeros(3)), ValueError, "b_dec must have 16 numbers"),
            (dict(b_dec=torch.zeros(D) / 0), ValueError, "b_dec must be finite"),
            (dict(zeros="keep"), ValueError, "zeros must be one of"),
            (dict(duplicates=True), ValueError, "duplicates must be one of"),
            (dict(method="ols", signed=False), ValueError, "for signed=False, got 'ols'"),
            (dict(kind=3), TypeError, "kind must be a string"),
        ],
    )
    def test_bad_input(self, change, error, message):
        with pytest.raises(error, match=message):
            ITDA.from_atoms(**(dict(vectors=rows(4), k=2) | change))


class TestUnembedding:
    @pytest.mark.parametrize("loader", ["bridge", "huggingface"])
    def test_rows_and_labels(self, tiny_folder, tokenizer, tmp_path, loader):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        with torch.no_grad():
            model.model.norm.weight.copy_(torch.linspace(0.5, 2, 32))
        model.save_pretrained(tmp_path / "tiny")
        tokenizer.save_pretrained(tmp_path / "tiny")
        lm = language_model(str(tmp_path / "tiny"), loader=loader, device="cpu")
        values, labels = unembedding(lm)
        weights = model.lm_head.weight * model.model.norm.weight
        torch.testing.assert_close(values, weights.detach(), atol=1e-5, rtol=1e-5)
        assert labels[5].token == lm.tokenizer.decode([5])
        assert str(labels[5]).endswith("(token 5)")
        assert labels[0].special
        assert not labels[5].special
        bare, (one,) = unembedding(lm, [7], final_norm=False)
        assert torch.equal(bare, model.lm_head.weight[[7]])
        assert one == labels[7]

    def test_a_layer_norm_takes_off_the_mean(self, tokenizer):
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_head=2, n_layer=1)
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            model.transformer.ln_f.weight.uniform_(0.5, 2)
            model.transformer.ln_f.bias.uniform_(-1, 1)
        values, _ = unembedding(model, tokenizer=tokenizer)
        # A step along a row moves the logits as the gradient at a normalised input says.
        x = torch.tensor([[1.0, -1.0] * 4], requires_grad=True)
        logit = model.lm_head(model.transformer.ln_f(x))[0, 3]
        logit.backward()
        free = x.grad[0] + (values[3] @ x[0].detach()) * x[0].detach() / 8  # the norm holds its length
        torch.testing.assert_close(free, values[3], atol=1e-4, rtol=1e-3)

    def test_bad_input(self, tiny, tokenizer):
        with pytest.raises(ValueError, match="tokens must be ids from 0 to 25, got 99"):
            unembedding(tiny, [99])
        with pytest.raises(ValueError, match="tokens must hold at least one"):
            unembedding(tiny, [])
        bare = AutoModelForCausalLM.from_pretrained(tiny.source).model
        with pytest.raises(ValueError, match="model must have an unembedding"):
            unembedding(bare, tokenizer=tokenizer)


class TestUnion:
    def make(self, seed, metadata=None, **options):
        x = rows(300, seed) + 2
        given = dict(model_name="m", hook_name="h") if metadata is None else metadata
        return fit(x, d_sae=20, k=4, seed=seed, metadata=given, **options), x

    def test_atoms_labels_and_settings(self, tmp_path):
        (a, x), (b, _) = self.make(0, l0=3), self.make(1)
        c = ITDA.from_atoms(rows(5, seed=2), list("vwxyz"), k=1, kind="class")
        both = itda_lens.union(a, b, c)
        assert torch.equal(both.W_dec, torch.cat([a.W_dec, b.W_dec, c.W_dec]))
        assert torch.equal(both.b_dec, a.b_dec)
        assert list(both.labels) == [*a.labels, *b.labels, *c.labels]
        cfg = both.cfg
        assert (cfg.k, cfg.method, cfg.l0, cfg.threshold) == (4, "ols", None, a.cfg.threshold)
        assert (cfg.metadata.model_name, cfg.metadata.hook_name) == ("m", "h")
        parts = cfg.metadata[BUILD_KEY]["recipe"]["rule"]["parts"]
        assert [part["d_sae"] for part in parts] == [20, 20, 5]
        both.save_model(tmp_path)
        loaded = itda_lens.load(tmp_path)
        assert torch.equal(loaded.encode(x), both.encode(x))
        assert loaded.labels == both.labels
        assert a.labels[0] == both.labels[0]
        assert len(a.labels) == 20

    def test_it_explains_what_each_explains(self):
        (a, x), _ = self.make(0), None
        directions = rows(3, seed=5)
        both = itda_lens.union(a, ITDA.from_atoms(directions, k=1), k=5)
        y = x[:20] + 20 * unit(directions)[torch.arange(20) % 3]
        found = both.encode(y)[:, 20:].abs().argmax(dim=1)
        assert torch.equal(found, torch.arange(20) % 3)
        assert ((both(y) - y).norm() / (a(y) - y).norm()) < 0.3

    def test_codes_without_signs_and_another_centre(self):
        (a, x), (b, _) = self.make(0), self.make(1)
        mean = x.mean(dim=0) + 1
        both = itda_lens.union(a, b, method="omp", signed=False, b_dec=mean)
        assert torch.equal(both.b_dec, mean)
        assert (both.encode(x) >= 0).all()
        assert both.cfg.k == 4

    def test_a_dictionary_without_labels(self):
        (a, _), (b, _) = self.make(0), self.make(1)
        del vars(b.cfg.metadata)["itda_labels"]
        assert str(itda_lens.union(a, b).labels[21]) == "dictionary 2, atom 1"

    def test_a_duplicate_of_an_earlier_atom_is_never_used(self):
        a, x = self.make(0)
        both = itda_lens.union(a, a)
        assert torch.equal(both.encode(x)[:, :20], a.encode(x))
        assert not both.encode(x)[:, 20:].any()

    def test_refusals(self):
        a, _ = self.make(0)
        for metadata, word in (
            (dict(hook_name="other"), "hook_name"), (dict(model_name="n"), "model_name"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"must agree in {word}"):
                itda_lens.union(a, self.make(1, metadata)[0])
        with pytest.raises(ValueError, match="one width, got d_in=16 and d_in=3"):
            itda_lens.union(a, ITDA.from_atoms(torch.eye(3), k=1))
        with pytest.raises(ValueError, match="number 2 is one"):
            itda_lens.union(a, a.nonnegative())
        with pytest.raises(ValueError, match="b_dec must have 16 numbers"):
            itda_lens.union(a, a, b_dec=torch.zeros(3))
        with pytest.raises(ValueError, match="k must be between 1 and the number of atoms=40"):
            itda_lens.union(a, a, k=41)
        per_head = ITDA.from_atoms(rows(3), k=1, metadata=dict(hook_name="blocks.0.attn.hook_z"))
        bare = ITDA.from_atoms(rows(3), k=1)
        with pytest.raises(ValueError, match="activations in one form"):
            itda_lens.union(bare, per_head)
        with pytest.raises(TypeError, match="more"):
            itda_lens.union(a, a, 3)

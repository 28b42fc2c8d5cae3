"""`fit` and `build`: dictionaries, labels, determinism, and bad input."""

import json
import sys
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch

import itda_lens
from itda_lens import Label, build, fit
from itda_lens.architectures import principal_components, random_atoms, train_sae
from itda_lens.dictionary import EnergyRule
from itda_lens.records import Cutting, Places
from itda_lens.sae import provenance_of
from itda_lens.sources import Tokenization
from itda_lens.training import output_folder, save_all

HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]


def activations(n=400, d=16):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 1


class TestFit:
    def test_default_labels_are_rows(self):
        x = activations()
        itda = fit(x, d_sae=50, k=4)
        assert itda.cfg.method == "ols"
        for atom, label in zip(itda.W_dec.detach(), itda.labels, strict=True):
            assert (label.chunk, label.position, label.cosine) == (0, 0, 1)
            origin = x[label.row] - itda.b_dec.detach()
            assert torch.nn.functional.cosine_similarity(atom, origin, dim=0) > 0.999999

    def test_own_labels(self):
        labels = [Label(i, 1, 2, token=str(i)) for i in range(400)]
        assert {label.token for label in fit(activations(), d_sae=50, k=4, labels=labels).labels} <= {
            str(i) for i in range(400)
        }
        triples = [(i, 7, 8) for i in range(400)]
        assert all(
            label.chunk == 7 for label in fit(activations(), d_sae=50, k=4, labels=triples).labels
        )

    @pytest.mark.parametrize("preset", ["best", "thorough", "paper"])
    def test_bit_equal_again(self, preset):
        first, second = (fit(activations(), d_sae=50, k=4, preset=preset, seed=3) for _ in range(2))
        assert torch.equal(first.W_dec, second.W_dec)
        assert torch.equal(first.b_dec, second.b_dec)
        assert first.cfg.to_dict() == second.cfg.to_dict()

    def test_best_does_not_depend_on_batches(self):
        first = fit(activations(), d_sae=50, k=4, batch_size=9)
        second = fit(activations(), d_sae=50, k=4)
        assert torch.equal(first.W_dec, second.W_dec)
        assert first.labels == second.labels

    @pytest.mark.parametrize("method", ["mp", "omp", "ols"])
    def test_l0_is_a_mean_on_other_activations(self, method):
        x = activations(6000)
        x, others = x[:3000], x[3000:]
        itda = fit(x, d_sae=50, k=12, l0=4, method=method)
        assert itda.cfg.k == 12
        assert itda.cfg.threshold > 0
        l0 = itda.encode_sparse(others).l0().double()
        assert l0.mean() == pytest.approx(4, rel=0.04)  # calibrated with an eighth fewer atoms
        assert l0.min() < 4 < l0.max()
        fixed = fit(x, d_sae=50, k=4, method=method)
        assert torch.equal(fixed.W_dec, itda.W_dec)  # the same atoms
        errors = [(others - d(others)).square().sum() for d in (itda, fixed)]
        assert errors[0] < errors[1]

    @pytest.mark.parametrize(("labelled", "length"), [(True, 50), (False, 10)])
    @pytest.mark.parametrize("update", [True, False])
    def test_l0_is_a_mean_on_other_texts(self, labelled, length, update):
        """Texts of few directions each: one's codes by its own atoms say nothing about another's.

        Rows without labels are kept from most of their own text, which is among their neighbours.
        """
        generator = torch.Generator().manual_seed(0)
        n, d = 6000 // length, 24
        x = torch.randn(2 * n, length, 2, generator=generator)
        x = x @ torch.randn(2 * n, 2, d, generator=generator)
        x = x + 0.3 * torch.randn(2 * n, length, d, generator=generator)
        read, unread = x[:n].reshape(-1, d), x[n:].reshape(-1, d)
        labels = [(text, 0, i) for text in range(n) for i in range(length)] if labelled else None
        itda = fit(read, d_sae=100, k=12, l0=4, update=update, labels=labels)
        l0 = [itda.encode_sparse(part).l0().double().mean().item() for part in (read, unread)]
        assert l0[1] == pytest.approx(4, rel=0.08)
        assert l0[0] < 0.95 * l0[1]

    def test_update_reconstructs_better_with_the_same_labels(self):
        x = activations(3000) @ torch.diag(torch.linspace(0.2, 3, 16))
        pure, updated = (fit(x, d_sae=50, k=3, update=update) for update in (False, True))
        assert (x - updated(x)).square().sum() < 0.95 * (x - pure(x)).square().sum()
        assert [a.key for a in updated.labels] == [a.key for a in pure.labels]
        for atom, label in zip(updated.W_dec.detach(), updated.labels, strict=True):
            origin = x[label.row] - updated.b_dec.detach()
            cosine = torch.nn.functional.cosine_similarity(atom, origin, dim=0)
            assert cosine.item() == pytest.approx(label.cosine, abs=1e-4)

    @pytest.mark.parametrize("options", [dict(l0=2.5), dict(update=True), dict(l0=2.5, update=True)])
    def test_l0_and_update_are_bit_equal_again_whatever_the_batches(self, options):
        first = fit(activations(), d_sae=50, k=6, **options)
        second = fit(activations(), d_sae=50, k=6, batch_size=9, **options)
        assert torch.equal(first.W_dec, second.W_dec)
        assert first.cfg.threshold == second.cfg.threshold

    def test_least_cosine_trades_reconstruction_for_nearness(self):
        x = activations(3000) @ torch.diag(torch.linspace(0.2, 3, 16))
        common = dict(d_sae=50, k=3, method="mp")  # the codes that an update fits atoms to
        made = [fit(x, update=True, least_cosine=least, **common) for least in (0, 0.95, 0.995)]
        made.append(fit(x, **common))
        errors = [(x - itda(x)).square().sum().item() for itda in made]
        assert errors == sorted(errors)
        assert min(label.cosine for label in made[2].labels) == pytest.approx(0.995, abs=1e-5)
        assert provenance_of(made[0]).recipe["rule"]["least_cosine"] == 0

    def test_rtol_ends_codes_early(self):
        x = activations(1000)
        # OLS may find a shorter code that is as good when it has to drop atoms.
        whole, early = (fit(x, d_sae=50, k=8, rtol=rtol, method="omp") for rtol in (0.001, 0.5))
        assert torch.equal(whole.W_dec, early.W_dec)
        centred = x - early.b_dec
        relative = (x - early(x)).norm(dim=-1) / centred.norm(dim=-1)
        l0 = early.encode_sparse(x).l0()
        assert (l0 < 8).any()
        assert (relative[l0 < 8] <= 0.5).all()
        # With one atom less they would not have been there yet.
        for length in l0[l0 > 1].unique().tolist():
            early.cfg.k = length - 1
            shorter = (x - early(x)).norm(dim=-1) / centred.norm(dim=-1)
            assert (shorter[l0 == length] > 0.5).all()

    def test_l0_is_met_with_rtol_in_force(self):
        x = activations(6000)
        itda = fit(x[:3000], d_sae=50, k=8, l0=3, rtol=0.3)
        assert itda.cfg.rtol == 0.3
        assert itda.encode_sparse(x[3000:]).l0().float().mean() == pytest.approx(3, rel=0.04)

    def test_l0_where_every_activation_is_an_atom(self):
        itda = fit(activations(), d_sae=400, k=12, l0=3)
        other = torch.randn(400, 16, generator=torch.Generator().manual_seed(1)) + 1
        assert itda.encode_sparse(other).l0().float().mean() == pytest.approx(3, rel=0.06)
        assert itda.encode_sparse(activations()).l0().float().mean() == 1

    @pytest.mark.parametrize("update", [False, True])
    def test_thorough_preset(self, update):
        x = 3 * activations(60).repeat(100, 1) + 0.8 * activations(6000)
        x, others = x[:3000], x[3000:]
        best, thorough, spread = (
            fit(x, d_sae=50, update=update, preset=preset, **codes)
            for preset, codes in (
                ("best", dict(k=3)), ("thorough", dict(k=3)), ("thorough", dict(k=9, l0=3))
            )
        )  # fmt: skip
        assert thorough.cfg.method == "ols"
        assert provenance_of(thorough).recipe["preset"] == "thorough"
        errors = [(others - itda(others)).square().sum() for itda in (thorough, best)]
        assert errors[0] < 0.98 * errors[1]
        assert torch.equal(spread.W_dec, thorough.W_dec)
        assert spread.cfg.threshold > 0
        for atom, label in zip(thorough.W_dec.detach(), thorough.labels, strict=True):
            origin = x[label.row] - thorough.b_dec.detach()
            cosine = torch.nn.functional.cosine_similarity(atom, origin, dim=0)
            assert cosine.item() == pytest.approx(label.cosine, abs=1e-4)

    def test_paper_preset(self):
        itda = fit(activations(), d_sae=None, k=4, preset="paper", loss_threshold=0.3)
        assert itda.cfg.method == "mp"
        assert (itda.b_dec == 0).all()
        assert 16 < itda.cfg.d_sae < 400

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype):
        itda = fit(activations().to(dtype), d_sae=50, k=4)
        assert itda.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert itda(activations().to(dtype)).dtype == itda.dtype

    def test_settings_are_recorded(self):
        found = provenance_of(fit(activations(), d_sae=50, k=4, seed=5))
        record = found.recipe
        assert (record["d_sae"], record["k"], record["seed"], record["preset"]) == (50, 4, 5, "best")
        plain = json.loads(json.dumps(asdict(EnergyRule())))
        assert record["rule"] == {"name": "EnergyRule"} | plain
        assert "torch" in found.versions

    def test_records_say_what_defaults_were(self):
        records = [
            provenance_of(fit(activations(), d_sae=50, k=4, **options)).recipe
            for options in (dict(), dict(signed=False), dict(update=True), dict(preset="paper"))
        ]
        assert [r["method"] for r in records] == ["ols", "omp", "ols", "mp"]
        assert [r["rule"].get("update") for r in records] == [False, False, True, None]
        assert records[2]["rule"]["least_cosine"] == 0.9
        assert records[3]["rule"]["loss_threshold"] == 0.2

    def test_a_rule_of_ones_own_is_recorded_and_saved(self, tmp_path):
        rule = EnergyRule(near_duplicate=0.5, min_candidates=60)
        itda = fit(activations(), d_sae=20, k=4, rule=rule)
        assert not torch.equal(itda.W_dec, fit(activations(), d_sae=20, k=4).W_dec)
        itda.save_model(tmp_path)
        recipe = provenance_of(itda_lens.load(tmp_path)).recipe
        assert recipe["rule"]["near_duplicate"] == 0.5
        assert "preset" not in recipe
        named = fit(activations(), d_sae=20, k=4, rule="thorough")
        assert torch.equal(named.W_dec, fit(activations(), d_sae=20, k=4, preset="thorough").W_dec)

    @pytest.mark.parametrize("preset", ["best", "paper"])
    def test_every_rule_works_with_a_mean_l0(self, preset):
        x = activations(6000)
        itda = fit(x[:3000], d_sae=50, k=12, l0=4, preset=preset)
        assert itda.encode_sparse(x[3000:]).l0().double().mean() == pytest.approx(4, rel=0.08)

    @pytest.mark.parametrize("preset", ["best", "paper"])
    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    def test_scales(self, preset, scale):
        x = activations()
        plain, scaled = (fit(y, d_sae=20, k=4, preset=preset) for y in (x, x * scale))
        assert scaled.labels == plain.labels
        assert scaled.W_dec.isfinite().all()
        assert torch.allclose(scaled.W_dec, plain.W_dec, atol=1e-5)

    @pytest.mark.parametrize("scale", [1e-43, 1e-30, 1e-22, 1e19, 1e25, 1e37])
    def test_scales_whose_squares_cannot_be_computed_are_told(self, scale):
        x = activations()
        row = int((x.abs() == x.abs().max()).any(dim=-1).nonzero())
        with pytest.raises(ValueError, match=f"between 1e-15 and 1e\\+17 in size.* in row {row};"):
            fit(x * scale, d_sae=20, k=4)
        fit(x.double() * scale, d_sae=20, k=4)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_float8(self, dtype):
        x = activations().to(dtype)
        assert fit(x, d_sae=20, k=4).labels == fit(x.float(), d_sae=20, k=4).labels

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(x=torch.full((60, 4), torch.nan)), ValueError, "row 0 has NaN or infinite"),
            (dict(x=torch.eye(60) / (torch.eye(60)[7] == 0)), ValueError, "row 0 has NaN or infinite"),
            (dict(x=torch.zeros(0, 4)), ValueError, "at least one row, got none"),
            (dict(x=torch.zeros(4)), ValueError, r"shape \[n_tokens, d_in\], got \(4,\)"),
            (dict(x=torch.zeros(2, 3, 4)), ValueError, r"got \(2, 3, 4\)"),
            (dict(x=torch.zeros(60, 4, dtype=torch.long)), TypeError, "got torch.int64"),
            (dict(x={"x": torch.ones(9, 4)}), TypeError, "one table or array, got dict of 'x'"),
            (dict(d_sae=401), ValueError, "got d_sae=401 for 400 rows"),
            (dict(x=torch.ones(60, 4), d_sae=3, k=1), ValueError, "only 0 directions"),
            (dict(d_sae=0), ValueError, "d_sae must be at least 1"),
            (dict(d_sae=None), ValueError, "d_sae must be given"),
            (dict(k=51), ValueError, "k must be between 1 and d_sae=50, got 51"),
            (dict(k=0), ValueError, "got 0"),
            (dict(preset="fast"), ValueError, "preset must be one of"),
            (dict(method="lasso"), ValueError, "method must be one of"),
            (dict(seed=-1), ValueError, "seed must be at least 0"),
            (dict(batch_size=0), ValueError, "batch_size must be at least 1"),
            (dict(loss_threshold=0.1), ValueError, "loss_threshold is no setting of preset='best'"),
            (dict(rule="fast"), ValueError, "rule must be one of"),
            (dict(rule=3), ValueError, "or have a method selector, got 3"),
            (dict(rule="paper", preset="thorough"), ValueError, "give one of them"),
            (dict(rule=EnergyRule(), d_sae=None), ValueError, "d_sae must be given for this rule"),
            (dict(preset="paper", loss_threshold=1.5), ValueError, "loss_threshold must be between"),
            (dict(l0=0), ValueError, "l0 must be above 0 and at most k=4, got 0"),
            (dict(l0=4.5), ValueError, "at most k=4, got 4.5"),
            (dict(preset="paper", update=True), ValueError, "update is no setting of preset='paper'"),
            (dict(least_cosine=0.9), ValueError, "least_cosine is a setting of update=True only"),
            (dict(update=True, least_cosine=1.1), ValueError, "between 0 and 1, got 1.1"),
            (dict(update=True, least_cosine=float("nan")), ValueError, "between 0 and 1, got nan"),
            (dict(rtol=1.0), ValueError, "rtol must be at least 0 and below 1, got 1.0"),
            (dict(labels=[(0, 0, 0)]), ValueError, "1 labels for 400 rows"),
            (dict(labels=[("x", 0, 0)] * 400), TypeError, "labels must hold whole numbers"),
        ],
    )  # fmt: skip
    def test_bad_input(self, change, error, message):
        arguments = dict(x=activations(), d_sae=50, k=4) | change
        with pytest.raises(error, match=message):
            fit(arguments.pop("x"), **arguments)


@pytest.fixture(scope="module")
def built(tiny, texts):
    return build(tiny, texts, HOOKS, d_sae=60, k=4, context_size=16, progress=False)


class TestBuild:
    def test_one_dictionary_per_hook(self, built):
        assert list(built) == HOOKS
        for hook, itda in built.items():
            metadata = itda.cfg.metadata
            assert metadata.hook_name == hook
            assert metadata.model_name == "tiny-random"
            assert (metadata.context_size, metadata.prepend_bos) == (16, True)
            assert itda.cfg.d_in == 32
            assert itda.cfg.reshape_activations == "none"

    @pytest.mark.parametrize("hook", HOOKS)
    def test_labels_lead_back_to_the_activations(self, built, tiny, texts, hook):
        itda = built[hook]
        tokenization = Tokenization(tiny.tokenizer, Cutting(16))
        contexts = {(c.row, c.chunk): c for c in tokenization.contexts(texts)}
        for i, label in enumerate(itda.labels):
            assert label.position > 0
            assert texts[label.row][slice(*label.chars)] == label.token
            assert f"[[{label.token}]]" in label.context
            batch = tokenization.batch([contexts[label.row, label.chunk]])
            x = tiny.capture(batch.tokens, batch.attention_mask, [hook])[hook][0, label.position]
            assert torch.nn.functional.cosine_similarity(x - itda.b_dec, itda.W_dec[i], dim=0) > 0.9999

    @pytest.mark.parametrize("preset", ["best", "paper"])
    def test_bit_equal_again(self, tiny, texts, preset):
        threshold = 0.05 if preset == "paper" else None
        options = dict(d_sae=50, k=4, context_size=16, loss_threshold=threshold, progress=False)
        options["preset"] = preset
        first, second = (build(tiny, texts, HOOKS, **options) for _ in range(2))
        for hook in HOOKS:
            assert torch.equal(first[hook].W_dec, second[hook].W_dec)
            assert torch.equal(first[hook].b_dec, second[hook].b_dec)
            assert first[hook].labels == second[hook].labels

    def test_equals_fit_on_the_same_activations(self, built, tiny, texts):
        xs, places = [], []
        for batch in Tokenization(tiny.tokenizer, Cutting(16)).batches(texts, 16):
            captured = tiny.capture(batch.tokens, batch.attention_mask, [HOOKS[0]])[HOOKS[0]]
            xs.append(captured[batch.keep])
            places.append(batch.places())
        itda = fit(torch.cat(xs), d_sae=60, k=4, labels=Places.joined(places))
        assert torch.equal(itda.W_dec, built[HOOKS[0]].W_dec)
        assert itda.labels == built[HOOKS[0]].labels

    def test_max_tokens_cuts_exactly(self, tiny, texts):
        options = dict(d_sae=20, k=2, context_size=16, progress=False)
        record = build(tiny, texts, HOOKS[0], max_tokens=101, **options)[HOOKS[0]]
        assert record.cfg.metadata.itda_build["n_tokens"] == 101

    def test_the_paper_rule_stops_the_model_when_it_is_full(self, tiny, texts, monkeypatch):
        passes = []
        capture = type(tiny).capture

        def counted(self, *args):
            passes.append(1)
            return capture(self, *args)

        monkeypatch.setattr(type(tiny), "capture", counted)
        options = dict(preset="paper", loss_threshold=0.01, batch_size=2, progress=False)
        build(tiny, texts, HOOKS, d_sae=30, k=4, **options)
        assert 1 <= len(passes) < 10

    def test_fingerprint_does_not_depend_on_how_much_was_read(self, tiny, texts):
        options = dict(d_sae=20, k=2, context_size=16, progress=False)
        records = [
            build(tiny, texts, HOOKS[0], max_tokens=n, **options)[HOOKS[0]].cfg.metadata.itda_build
            for n in (100, 500)
        ]
        assert records[0]["texts_fingerprint"] == records[1]["texts_fingerprint"]
        assert records[0]["texts_read_sha256"] != records[1]["texts_read_sha256"]

    def test_records_where_the_model_can_be_loaded_from(self, built, tiny_folder):
        assert built[HOOKS[0]].cfg.metadata.itda_build["model"] == str(tiny_folder)

    def test_a_stream_is_read_once_and_only_as_far_as_needed(self, tiny, texts):
        def endless():
            while True:
                yield from texts

        options = dict(d_sae=20, k=2, context_size=16, progress=False)
        itda = build(tiny, endless(), HOOKS[0], max_tokens=500, **options)[HOOKS[0]]
        assert itda.cfg.metadata.itda_build["n_tokens"] == 500

    def test_per_head_hook(self, tiny, texts):
        hook = "blocks.1.attn.hook_z"
        itda = build(tiny, texts, hook, d_sae=40, k=4, context_size=16, progress=False)[hook]
        assert itda.cfg.reshape_activations == "hook_z"
        assert itda(torch.randn(2, 3, 4, 8)).shape == (2, 3, 4, 8)

    def test_per_head_hook_with_a_mean_l0(self, tiny, texts):
        hook = "blocks.1.attn.hook_z"
        options = dict(d_sae=40, k=8, l0=3, context_size=12, progress=False)
        itda = build(tiny, texts, hook, **options)[hook]
        assert itda.cfg.threshold > 0
        assert itda.hook_z_reshaping_mode
        assert itda.encode_sparse(torch.randn(5, 4, 8)).indices.shape == (5, 8)

    def test_special_tokens_only_when_asked_for(self, tiny, texts):
        options = dict(d_sae=60, k=4, context_size=16, progress=False)
        texts = [f"<eos> {text}" for text in texts]
        masked = build(tiny, texts, HOOKS[0], **options)[HOOKS[0]]
        assert all(label.position > 0 and label.token != "<eos>" for label in masked.labels)
        kept = build(tiny, texts, HOOKS[0], keep_special_tokens=True, **options)[HOOKS[0]]
        assert any(label.position == 0 for label in kept.labels)

    def test_progress_bar(self, tiny, texts, capsys, monkeypatch):
        monkeypatch.setattr(sys.modules["itda_lens.training.run"], "SECONDS_BETWEEN_FVU", 0)
        build(tiny, texts, HOOKS, d_sae=20, k=4, context_size=16, progress=True)
        shown = capsys.readouterr()
        assert "tok/s" in shown.err
        assert "atoms=20/20, FVU=0." in shown.err
        assert shown.out == ""

    def test_fewer_distinct_activations_than_atoms(self, tiny):
        with pytest.raises(ValueError, match="d_sae=60, but .* activations point in only"):
            build(tiny, ["the cat sat"] * 90, HOOKS, d_sae=60, k=4, progress=False)

    def test_non_finite_activations_are_told_with_their_place(self, tiny_folder, texts):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        model.model.layers[0].mlp.down_proj.weight.data[3] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinite activation at 'blocks.0.*text 0, chunk 0"):
            build(model, texts, HOOKS, d_sae=60, k=4, progress=False)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(texts=[]), "at least one text, got none"),
            (dict(texts=["", ""]), "no token that counts"),
            (dict(texts=["<eos>", "<pad>"]), "all were masked"),
            (dict(hook_names=[]), "one or more different names"),
            (dict(hook_names=[HOOKS[0], HOOKS[0]]), "one or more different names"),
            (dict(hook_names="blocks.7.hook_resid_post"), "no hook 'blocks.7.hook_resid_post'; near it"),
            (dict(hook_names="blocks.1.hook_attn_in"), "exists but never fired"),
            (dict(d_sae=10**6), "d_sae=1000000"),
            (dict(k=70), "k must be between 1 and d_sae=60"),
            (dict(max_tokens=0), "max_tokens must be at least 1"),
            (dict(max_tokens=59), "got d_sae=60 for 59 rows"),
            (dict(batch_size=0), "batch_size must be at least 1"),
            (dict(context_size=1), "context_size must be at least 2"),
            (dict(context_size=257), "at most the model's 256 tokens, got 257"),
            (dict(texts="word " * 200), "to use one text, pass"),
            (dict(model="no-such/model"), "neither a folder nor a model"),
        ],
    )  # fmt: skip
    def test_bad_input(self, tiny, texts, change, message):
        arguments = dict(model=tiny, texts=texts, hook_names=HOOKS, d_sae=60, k=4, progress=False)
        with pytest.raises(ValueError, match=message):
            build(**(arguments | change))


class TestOutput:
    def test_saves_each_hook_and_loads(self, tiny, texts, tmp_path):
        built = build(tiny, texts, HOOKS, d_sae=60, k=4, progress=False)
        with output_folder(tmp_path / "out") as folder:
            save_all(built, folder)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == HOOKS
        loaded = itda_lens.load(tmp_path / "out" / HOOKS[1])
        assert torch.equal(loaded.W_dec, built[HOOKS[1]].W_dec)

    def test_never_overwrites_unless_asked(self, tmp_path):
        target = tmp_path / "out"
        with output_folder(target) as folder:
            fit(activations(), d_sae=9, k=2).save_model(folder / "first")
        with pytest.raises(FileExistsError, match="exists"), output_folder(target):
            pass
        with output_folder(target, overwrite=True) as folder:
            fit(activations(), d_sae=9, k=2).save_model(folder / "second")
        assert [p.name for p in target.iterdir()] == ["second"]
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_never_overwrites_other_things(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").touch()
        with pytest.raises(FileExistsError, match="other things"), output_folder(tmp_path / "out", True):
            pass
        (tmp_path / "file").touch()
        with (
            pytest.raises((FileExistsError, NotADirectoryError)),
            output_folder(tmp_path / "file", True),
        ):
            pass
        other = tmp_path / "saes" / "mine"
        fit(activations(), d_sae=9, k=2).save_model(other)
        (other / "notes.txt").touch()
        with pytest.raises(FileExistsError, match="other"), output_folder(tmp_path / "saes", True):
            pass
        (other / "notes.txt").unlink()
        config = (other / "cfg.json").read_text()
        (other / "cfg.json").write_text(
            config.replace('"architecture": "itda"', '"architecture": "topk"')
        )
        with pytest.raises(FileExistsError, match="other"), output_folder(tmp_path / "saes", True):
            pass
        assert (tmp_path / "out" / "thesis.tex").exists()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_interrupt_leaves_nothing(self, tmp_path, error):
        with pytest.raises(error), output_folder(tmp_path / "out") as folder:  # noqa: PT012
            (folder / "half").touch()
            raise error
        assert list(tmp_path.iterdir()) == []

    def test_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="file"), output_folder(tmp_path / "file" / "out"):
            pass


def test_paper_preset_warns_when_its_threshold_gives_fewer_atoms(tiny, texts):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = dict(d_sae=300, k=8, preset="paper", loss_threshold=0.9, progress=False)
        itda = build(tiny, texts, HOOKS[0], **options)[HOOKS[0]]
    assert itda.cfg.d_sae < 300
    assert any(f"has {itda.cfg.d_sae} atoms, not 300" in str(w.message) for w in caught)


@pytest.mark.parametrize(
    "work",
    [
        lambda tiny, texts: fit(activations(), d_sae=50, k=8, l0=3, update=True),
        lambda tiny, texts: fit(activations(), d_sae=50, k=4, preset="thorough"),
        lambda tiny, texts: fit(activations(), d_sae=50, k=4, preset="paper"),
        lambda tiny, texts: fit(activations(), d_sae=50, k=4).prefix(20).nonnegative(),
        lambda tiny, texts: build(tiny, texts[:30], HOOKS, d_sae=20, k=4, progress=False),
        lambda tiny, texts: random_atoms(activations(), d_sae=20, k=4),
        lambda tiny, texts: principal_components(activations(), k=4),
        lambda tiny, texts: train_sae(activations(), d_sae=20, k=4, epochs=1),
    ],
)
def test_random_states_of_the_user_stay_as_they_are(tiny, texts, work):
    def states():  # not of Python's own `random`, which the type checks of these tests draw from
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()

    before = states()
    work(tiny, texts)
    assert states() == before

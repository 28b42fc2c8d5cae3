"""One pass over text, against figures that are counted by hand from dense codes."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import nn
from tqdm.auto import tqdm

from itda_lens import build, fit
from itda_lens.analysis import examples, examples_from
from itda_lens.analysis.label_scores import STRONG
from itda_lens.analysis.neighbours import firing_together
from itda_lens.analysis.streams import EntryTable, KeptPlaces
from itda_lens.records import Places
from itda_lens.sources import ArraySource, ModelSource, language_model, logit_weights
from itda_lens.training import collect

HOOK = "blocks.1.hook_resid_post"
N = 3


@pytest.fixture(scope="module")
def itda(tiny, texts):
    return build(tiny, texts[:40], HOOK, d_sae=40, k=4, context_size=12, progress=False)[HOOK]


@pytest.fixture(scope="module")
def held_out(tiny, texts):
    return collect(tiny, texts[40:], HOOK, context_size=12, progress=False)[HOOK]


@pytest.fixture(scope="module")
def codes(itda, held_out):
    with torch.no_grad():
        return itda.encode(held_out.values)


@pytest.fixture(scope="module")
def found(itda, tiny, texts):
    return examples(tiny, itda, texts[40:], n_examples=N, n_quantiles=2, progress=False)


class TestFigures:
    def test_columns(self, found, codes):
        active = codes != 0
        assert found.n_tokens == len(codes)
        np.testing.assert_array_equal(found.tokens, active.sum(dim=0))
        np.testing.assert_allclose(found.density, active.double().mean(dim=0))
        np.testing.assert_allclose(found.max_size, codes.abs().amax(dim=0), rtol=1e-5)
        share = codes.double().square()
        share = (share / share.sum(dim=1, keepdim=True)).mean(dim=0)
        np.testing.assert_allclose(found.energy, share, rtol=1e-5)
        assert found.energy.sum() == pytest.approx(1)
        for atom in active.any(dim=0).nonzero().flatten().tolist():
            own = codes[active[:, atom], atom]
            assert found.mean_size[atom] == pytest.approx(own.abs().mean().item(), rel=1e-5)
            assert found.negative[atom] == pytest.approx((own < 0).double().mean().item())

    def test_histogram(self, found, codes):
        for atom in range(codes.shape[1]):
            own = codes[:, atom][codes[:, atom] != 0].double().numpy()
            expected = [int(((own >= a) & (own < b)).sum()) for a, b in pairwise(found.edges)]
            assert list(found[atom].histogram) == expected
        spread = np.array([atom.histogram for atom in found]).sum(axis=0)
        assert (spread > 0).sum() >= 4  # not all in one bin

    def test_largest(self, found, codes, held_out):
        for atom in range(codes.shape[1]):
            own = codes[:, atom]
            for examples_found, sign in ((found[atom].top, 1), (found[atom].bottom, -1)):
                order = (sign * own).argsort(descending=True, stable=True)[:N]
                order = [row for row in order.tolist() if sign * own[row] > 0]
                assert [e.label for e in examples_found] == [held_out.labels[row] for row in order]
                expected = [own[row].item() for row in order]
                assert [e.coefficient for e in examples_found] == pytest.approx(expected)

    def test_samples_go_from_low_to_high(self, found, codes):
        for atom in found:
            values = [[e.coefficient for e in group] for group in atom.quantiles]
            flat = [value for group in values for value in group]
            assert flat == sorted(flat)
            assert len(flat) >= min(2, atom.tokens)
            own = codes[:, atom.atom]
            assert all(np.isclose(own.numpy(), value, rtol=1e-5).any() for value in flat)
        assert any(len(atom.quantiles) == 2 for atom in found)

    def test_unexplained(self, found, itda, held_out):
        with torch.no_grad():
            left = (held_out.values - itda(held_out.values)).square().sum(dim=1)
            left = left / (held_out.values - itda.b_dec).square().sum(dim=1)
        expected = np.quantile(left.double().numpy(), np.linspace(0, 1, 1001))
        np.testing.assert_allclose(found.unexplained, expected, rtol=1e-3, atol=1e-6)

    def test_neighbours(self, found, itda, codes):
        cosines = itda.W_dec @ itda.W_dec.T
        active = (codes != 0).double()
        correlation = np.corrcoef(active.T.numpy() + 1e-12 * np.random.rand(*active.T.shape))
        for atom in found:
            own = cosines[atom.atom].clone()
            own[atom.atom] = 0
            best = own.abs().topk(N).indices
            assert [n.cosine for n in atom.nearest] == pytest.approx(own[best].tolist(), abs=1e-5)
            for other in atom.firing_with:
                both = (active[:, atom.atom] * active[:, other.atom]).sum()
                assert other.share == pytest.approx((both / active[:, atom.atom].sum()).item())
                base = active[:, other.atom].mean()
                assert other.lift == pytest.approx((other.share / base).item())
                assert other.lift > 1
            phis = [correlation[atom.atom, other.atom] for other in atom.firing_with]
            assert phis == sorted(phis, reverse=True)
            if atom.tokens:
                rest = np.delete(correlation[atom.atom], atom.atom)
                assert phis[:1] == pytest.approx([rest.max()] if phis else [], abs=1e-6)

    def test_label_scores(self, found, itda, codes, held_out):
        tokens = [label.token for label in held_out.labels]
        share = codes.double().square()
        share /= share.sum(dim=1, keepdim=True)
        fires = (codes > 0) & (share >= STRONG)
        for atom in found:
            same = torch.tensor([token == itda.labels[atom.atom].token for token in tokens])
            hits = (same & fires[:, atom.atom]).sum().item()
            assert atom.score is not None
            assert atom.score.precision == pytest.approx(hits / same.sum().item())
            n = fires[:, atom.atom].sum().item()
            assert atom.score.recall == pytest.approx(hits / max(1, n))
            assert atom.score.f1 == pytest.approx(2 * hits / (same.sum().item() + n))
        own, shuffled = found.label_f1()
        assert own == pytest.approx(np.mean([atom.score.f1 for atom in found]))
        assert own > 3 * shuffled  # the tiny model's activations are mostly their own token


class TestStream:
    def test_batches_do_not_matter(self, itda, tiny, texts, found):
        other = examples(
            tiny, itda, texts[40:], n_examples=N, n_quantiles=2, batch_size=1, progress=False
        )
        for a, b in zip(found, other, strict=True):
            assert [e.label for e in a.top] == [e.label for e in b.top]
            assert [e.label for g in a.quantiles for e in g] == [e.label for g in b.quantiles for e in g]
            assert (a.tokens, a.negative, a.score, a.firing_with) == (
                b.tokens, b.negative, b.score, b.firing_with,
            )  # fmt: skip

    def test_the_same_again(self, itda, tiny, texts, found):
        again = examples(tiny, itda, texts[40:], n_examples=N, n_quantiles=2, progress=False)
        assert list(again) == list(found)

    def test_exactly_this_number_of_tokens(self, itda, tiny, texts):
        assert examples(tiny, itda, texts, max_tokens=51, progress=False).n_tokens == 51

    def test_a_table_keeps_the_best(self):
        rng = np.random.default_rng(0)
        table, all_of = EntryTable(5, 4), []
        for batch in range(20):
            m = int(rng.integers(0, 30))
            atom, priority = rng.integers(0, 5, m), rng.integers(0, 50, m).astype(float)
            row = batch * 100 + np.sort(rng.integers(0, 100, m))
            table.update(atom, priority, row, priority)
            all_of += zip(atom, -priority, row, strict=True)
        for atom in range(5):
            best = sorted(entry for entry in all_of if entry[0] == atom)[:4]
            assert table.row[atom].tolist() == [row for _, _, row in best]

    def test_memory_is_bounded(self, monkeypatch):
        """A long stream holds the places of entries and a little more."""
        monkeypatch.setattr("itda_lens.analysis.streams.COMPACT_ABOVE", 10)
        table, places = EntryTable(2, 3), KeptPlaces()
        for batch in range(200):
            row = np.arange(batch * 4, batch * 4 + 4)
            table.update(row % 2, row.astype(float), row, row.astype(float))
            places.add(batch * 4, Places.numbered(batch * 4, batch * 4 + 4), [table])
            assert places._held <= 2 * 6 + 10 + 4
        places.compact([table])
        assert places._held == 6
        assert list(places.at(table.row[0]).row) == [798, 796, 794]


def test_atoms_that_meet_less_often_than_by_chance_do_not_fire_together():
    """Atoms 0 and 1 share one token of eight, of which each has four: chance would be two."""
    fires = np.array([[0, 2], [0, 2], [0, 2], [0, 1], [1, 3], [1, 3], [1, 3], [3, 4]])
    with tqdm(disable=True) as bar:
        others, together, count = firing_together(fires, np.ones(fires.shape), 5, 3, bar)
    assert list(count) == [4, 4, 3, 4, 1]
    assert others.tolist() == [[2, -1, -1], [3, -1, -1], [0, -1, -1], [1, 4, -1], [3, -1, -1]]
    assert together[0].tolist() == [3, 0, 0]


class TestOtherDictionaries:
    def test_without_labels(self, itda, tiny, texts):
        sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=40, k=5))
        sae.cfg.metadata = copy.deepcopy(itda.cfg.metadata)
        found = examples(tiny, sae, texts[40:], progress=False)
        assert found.label_f1() is None
        assert all(atom.label is None and atom.score is None for atom in found)
        assert found.density.sum() == pytest.approx(5, rel=0.2)

    def test_rows_of_no_text(self):
        x = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))
        itda = fit(x, d_sae=8, k=2, progress=False)
        found = examples_from(ArraySource(x), itda, progress=False)
        assert found.n_tokens == 80
        assert all(atom.promoted == () and atom.score is None for atom in found)
        assert found[0].top[0].label.row >= 0

    def test_a_mirrored_view_has_no_rule_for_its_second_half(self, itda, tiny, texts):
        found = examples(tiny, itda.nonnegative(), texts[40:], progress=False)
        assert all((atom.score is None) == (atom.atom >= 40) for atom in found)
        assert not found.negative.any()

    def test_an_index_out_of_range(self, found):
        with pytest.raises(IndexError, match="atom must be below 40, got 40"):
            found[40]
        assert found[-1].atom == 39
        assert len(found[:3]) == 3


class TestLogits:
    def test_promoted_tokens(self, itda, tiny, found):
        weights = logit_weights(tiny, HOOK)
        logits = itda.W_dec.detach() @ weights
        logits -= logits.mean(dim=1, keepdim=True)
        atom = found[7]
        highest = logits[7].topk(N)
        assert [c.token for c in atom.promoted] == [tiny.tokenizer.decode([i]) for i in highest.indices]
        assert [c.change for c in atom.promoted] == pytest.approx(highest.values.tolist(), abs=1e-5)
        lowest = logits[7].topk(N, largest=False)
        assert [c.change for c in atom.suppressed] == pytest.approx(lowest.values.tolist(), abs=1e-5)

    def test_the_last_layers_logits_are_those_of_the_model(self, tiny_folder):
        """After the last layer the direct path is the whole path, up to the norm's division."""
        for loader in ("bridge", "hooked_transformer", "huggingface"):
            if loader == "hooked_transformer":
                from itda_lens.sources import register_with_transformer_lens

                register_with_transformer_lens(tiny_folder, "tiny-random-logits")
            name = "tiny-random-logits" if loader == "hooked_transformer" else str(tiny_folder)
            lm = language_model(name, loader=loader, device="cpu")
            hook = "blocks.2.hook_resid_post"
            tokens = torch.tensor([[0, 5, 9, 11]])
            mask = torch.ones_like(tokens, dtype=torch.bool)
            x = lm.capture(tokens, mask, [hook])[hook][0].cpu()
            with torch.no_grad():
                logits = lm.logits(tokens, mask)[0].cpu()
            direct = x @ logit_weights(lm, hook) / x.square().mean(dim=1, keepdim=True).sqrt()
            torch.testing.assert_close(direct, logits, rtol=1e-3, atol=1e-4)

    def test_gain_and_centring_of_a_norm(self):
        from itda_lens.sources.direct_path import _through

        torch.manual_seed(0)
        norm = nn.LayerNorm(6)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        weights = torch.randn(6, 9)
        x = torch.randn(6)
        sigma = x.var(correction=0).sqrt()
        expected = (norm(x) - norm.bias) @ weights
        torch.testing.assert_close(x @ _through(norm, weights) / sigma, expected, rtol=1e-3, atol=1e-3)

    def test_no_direct_path(self, tiny):
        assert logit_weights(tiny, "blocks.1.attn.hook_z") is None
        assert logit_weights(tiny, "nowhere") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n_examples=0), "n_examples must be at least 1, got 0"),
        (dict(n_quantiles=0), "n_quantiles must be at least 1"),
        (dict(seed=-1), "seed must be at least 0"),
        (dict(texts=[""]), "no token that counts"),
        (dict(max_tokens=0), "max_tokens must be at least 1"),
    ],
)
def test_bad_input(itda, tiny, texts, options, message):
    with pytest.raises(ValueError, match=message):
        examples(**(dict(model=tiny, sae=itda, texts=texts, progress=False) | options))


def test_another_width(tiny, texts):
    narrow = fit(torch.randn(99, 16), d_sae=9, k=2, metadata={"hook_name": HOOK})
    with pytest.raises(ValueError, match="width 32, but the sae has d_in=16"):
        examples(tiny, narrow, texts, progress=False)
    with pytest.raises(ValueError, match="width 32, but the sae has d_in=16"):
        examples_from(ModelSource(tiny, texts, HOOK), narrow, progress=False)

"""Evaluation and decomposition on the tiny model, against SAELens's own figures and closed forms."""

import copy

import pytest
import torch
from sae_lens import (
    HookedSAETransformer,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.evals import get_recons_loss
from sae_lens.training.activation_scaler import ActivationScaler

from itda_lens import build, fit
from itda_lens.analysis import decompose, evaluate
from itda_lens.records import Cutting
from itda_lens.sources import Tokenization, language_model, register_with_transformer_lens

HOOK = "blocks.1.hook_resid_post"
OTHER = {"hook_name": HOOK, "context_size": 99}


@pytest.fixture(scope="module")
def itda(tiny, texts):
    options = dict(d_sae=40, k=3, context_size=12, progress=False)
    return build(tiny, texts, HOOK, **options)[HOOK]


@pytest.fixture(scope="module")
def hooked(tiny_folder, tokenizer):
    register_with_transformer_lens(tiny_folder, "tiny-eval")
    return HookedSAETransformer.from_pretrained_no_processing("tiny-eval", device="cpu")


def test_figures_equal_saelens(itda, hooked, tokenizer, texts):
    # Contexts of one length: SAELens knows no padding.
    long = [text for text in texts if len(text.split()) >= 11]
    long = [" ".join(text.split()[:11]) for text in long]
    (ours,) = evaluate(hooked, itda, long, batch_size=len(long), tokenizer=tokenizer, progress=False)

    tokens = next(Tokenization(tokenizer, Cutting(12)).batches(long, len(long))).tokens
    special = tokenizer.all_special_ids
    with torch.no_grad():
        theirs = get_recons_loss(
            itda,
            hooked,
            ActivationScaler(),
            tokens,
            compute_kl=True,
            compute_ce_loss=True,
            ignore_tokens=special,
        )
    counted = ~torch.isin(tokens, torch.tensor(special))
    mean = {name: values[counted[:, : values.shape[1]]].mean().item() for name, values in theirs.items()}
    assert ours.ce_loss == pytest.approx(mean["ce_loss_without_sae"], rel=1e-5)
    assert ours.ce_loss_spliced == pytest.approx(mean["ce_loss_with_sae"], rel=1e-5)
    assert ours.ce_loss_zero == pytest.approx(mean["ce_loss_with_ablation"], rel=1e-5)
    assert ours.kl == pytest.approx(mean["kl_div_with_sae"], rel=1e-3, abs=1e-6)
    expected = (mean["ce_loss_with_ablation"] - mean["ce_loss_with_sae"]) / (
        mean["ce_loss_with_ablation"] - mean["ce_loss_without_sae"]
    )
    assert ours.ce_loss_score == pytest.approx(expected, rel=1e-3)
    assert ours.n_tokens == int(counted.sum())


def test_fvu_l0_and_alive_by_hand(itda, tiny, texts):
    (found,) = evaluate(tiny, itda, texts, progress=False)
    x = torch.cat(
        [
            tiny.capture(batch.tokens, batch.attention_mask, [HOOK])[HOOK][batch.keep]
            for batch in Tokenization(tiny.tokenizer, Cutting(12)).batches(texts, 8)
        ]
    )
    with torch.no_grad():
        codes = itda.encode(x)
        error = (x - itda(x)).square().sum()
    assert found.fvu == pytest.approx((error / (x - x.mean(dim=0)).square().sum()).item(), rel=1e-4)
    assert found.l0 == pytest.approx((codes != 0).sum(dim=1).float().mean().item())
    assert found.alive_fraction == pytest.approx((codes != 0).any(dim=0).float().mean().item())
    torch.testing.assert_close(found.feature_density, (codes != 0).float().mean(dim=0))
    assert found.n_tokens == len(x)


def test_a_perfect_dictionary_scores_perfectly(itda, tiny, texts):
    whole = type(itda)(itda.cfg.__class__(d_in=32, d_sae=32, k=32, method="omp", rtol=0))
    with torch.no_grad():
        whole.W_dec.copy_(torch.eye(32))
    whole.cfg.metadata = itda.cfg.metadata
    (found,) = evaluate(tiny, whole, texts, progress=False)
    assert found.fvu < 1e-9
    assert found.kl < 1e-6
    assert found.ce_loss_spliced == pytest.approx(found.ce_loss, rel=1e-6)


def test_logits_of_minus_infinity(itda, tiny, texts, monkeypatch):
    """Tokens that a model may not give: KL is what it is without them."""
    (plain,) = evaluate(tiny, itda, texts, progress=False)
    logits = type(tiny).logits
    for banned in (torch.finfo(torch.float32).min, -torch.inf):

        def without(*args, banned=banned):
            found = logits(*args)
            return torch.cat([found, torch.full_like(found[..., :5], banned)], dim=-1)

        monkeypatch.setattr(type(tiny), "logits", without)
        (found,) = evaluate(tiny, itda, texts, progress=False)
        assert found.kl == pytest.approx(plain.kl, rel=1e-4)
        assert found.ce_loss_spliced == pytest.approx(plain.ce_loss_spliced, rel=1e-4)


def test_per_head_hook(tiny, texts):
    hook = "blocks.1.attn.hook_z"
    itda = build(tiny, texts, hook, d_sae=40, k=16, context_size=12, progress=False)[hook]
    (found,) = evaluate(tiny, itda, texts, progress=False)
    assert 0 < found.fvu < 0.5
    assert len(decompose(tiny, itda, "the cat sat")) == 3


def test_other_saes_are_measured_beside(itda, tiny, texts):
    """TopK SAEs, one of them by heads, against the same figures by hand."""
    batches = list(Tokenization(tiny.tokenizer, Cutting(12)).batches(texts, 8))
    for hook, shape, options in (
        (HOOK, (32,), {}),
        ("blocks.1.attn.hook_z", (4, 8), dict(reshape_activations="hook_z")),
    ):
        x = torch.cat([tiny.capture(b.tokens, b.attention_mask, [hook])[hook][b.keep] for b in batches])
        sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=40, k=5, **options))
        sae.cfg.metadata = copy.deepcopy(itda.cfg.metadata)
        sae.cfg.metadata.hook_name = hook
        beside, found = evaluate(tiny, [itda, sae], texts, progress=False)
        assert found.hook_name == hook
        assert (found.k, found.d_sae, found.n_tokens) == (5, 40, len(x))
        with torch.no_grad():
            codes = sae.encode(x.reshape(-1, *shape))
            reconstruction = sae.decode(codes).reshape(x.shape)
        spread = (x - x.mean(dim=0)).square().sum()
        expected = ((x - reconstruction).square().sum() / spread).item()
        assert found.fvu == pytest.approx(expected, rel=1e-4)
        assert found.l0 == pytest.approx((codes != 0).sum(dim=1).float().mean().item())
        torch.testing.assert_close(found.feature_density, (codes != 0).float().mean(dim=0))
        assert found.ce_loss_spliced != found.ce_loss
        alone = evaluate(tiny, itda, texts, progress=False)[0]
        assert beside == alone


def test_what_cannot_be_measured_is_refused(itda, tiny, texts):
    cfg = TopKTrainingSAEConfig(d_in=32, d_sae=40, k=5)
    with pytest.raises(ValueError, match="got one of topk in training; save a trained SAE"):
        evaluate(tiny, [itda, TopKTrainingSAE(cfg)], texts, progress=False)
    transcoder = Transcoder(TranscoderConfig(d_in=32, d_sae=40, d_out=32, apply_b_dec_to_input=False))
    with pytest.raises(ValueError, match="dictionaries must be among .*, got one of transcoder"):
        evaluate(tiny, transcoder, texts, progress=False)
    scaled = TopKSAE(
        TopKSAEConfig(d_in=32, d_sae=40, k=5, normalize_activations="expected_average_only_in")
    )
    with pytest.raises(ValueError, match="expected_average_only_in.* must be folded"):
        evaluate(tiny, scaled, texts, progress=False)


def test_decompose(itda, tiny):
    found = decompose(tiny, itda, "the cat sat on the mat")
    assert [token.token for token in found] == ["the", "cat", "sat", "on", "the", "mat"]
    assert [token.position for token in found] == [1, 2, 3, 4, 5, 6]
    for token in found:
        sizes = [abs(component.coefficient) for component in token.components]
        assert sizes == sorted(sizes, reverse=True)
        assert 1 <= len(sizes) <= 3
        assert all(c.label == itda.labels[c.atom] for c in token.components)
        assert 0 < token.explained <= 1
    # The tiny model's activations are mostly their own token.
    assert sum(token.components[0].label.token == token.token for token in found) >= 4


@pytest.mark.parametrize("hook", [HOOK, "blocks.1.attn.hook_z"])
def test_decompose_by_another_sae(itda, tiny, hook):
    """Atoms without labels, by falling coefficient; figures are those of SAELens's own code."""
    heads = hook.endswith("hook_z")
    options = dict(reshape_activations="hook_z") if heads else {}
    sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=40, k=5, **options))
    sae.cfg.metadata = copy.deepcopy(itda.cfg.metadata)
    sae.cfg.metadata.hook_name = hook
    found = decompose(tiny, sae, "the cat sat")
    batch = next(Tokenization(tiny.tokenizer, Cutting(12)).batches(["the cat sat"], 1))
    x = tiny.capture(batch.tokens, batch.attention_mask, [hook])[hook][batch.keep]
    with torch.no_grad():
        heads_of_x = x.reshape(-1, 4, 8) if heads else x
        dense, reconstruction = sae.encode(heads_of_x), sae(heads_of_x).reshape(x.shape)
    explained = 1 - (x - reconstruction).square().sum(dim=1) / (x - sae.b_dec).square().sum(dim=1)
    assert [token.token for token in found] == ["the", "cat", "sat"]
    for i, token in enumerate(found):
        assert {c.atom: c.coefficient for c in token.components} == {
            atom: dense[i, atom].item() for atom in dense[i].nonzero().flatten().tolist()
        }
        sizes = [c.coefficient for c in token.components]
        assert sizes == sorted(sizes, reverse=True)
        assert all(c.label is None for c in token.components)
        assert token.explained == pytest.approx(explained[i].item(), abs=1e-5)


def test_decompose_without_labels(itda, tiny):
    bare = fit(torch.randn(99, 32), d_sae=9, k=2, metadata={"hook_name": HOOK})
    del bare.cfg.metadata.itda_labels
    assert all(c.label is None for token in decompose(tiny, bare, "the cat") for c in token.components)
    training = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=32, d_sae=40, k=5))
    with pytest.raises(ValueError, match="got one of topk in training"):
        decompose(tiny, training, "the cat")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, i, t: evaluate(m, [], t), "one or more, got none"),
        (lambda m, i, t: evaluate(m, i, [""]), "no token that counts"),
        (lambda m, i, t: evaluate(m, i, t, batch_size=0), "batch_size must be"),
        (lambda m, i, t: decompose(m, i, ""), "at least one token that counts"),
        (lambda m, i, t: decompose(m, i, "<eos>"), "at least one token that counts"),
        (lambda m, i, t: evaluate(m, fit(torch.randn(99, 32), d_sae=9, k=2), t), "names no hook_name"),
        (
            lambda m, i, t: evaluate(
                m, fit(torch.randn(99, 16), d_sae=9, k=2, metadata={"hook_name": HOOK}), t
            ),
            "width 32 .* but the dictionary has d_in=16",
        ),
        (
            lambda m, i, t: evaluate(m, [i, fit(torch.randn(99, 32), d_sae=9, k=2, metadata=OTHER)], t),
            "must agree in context_size, got 12 and 99",
        ),
    ],
)
def test_bad_input(itda, tiny, texts, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny, itda, texts)


def test_language_model_is_passed_through(tiny):
    assert language_model(tiny) is tiny

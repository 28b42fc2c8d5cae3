"""Codes and reconstructions of every kind of SAE in SAELens, against its own `encode` and `forward`."""

import copy

import pytest
import sae_lens
import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)

from itda_lens import ITDA, ITDAConfig, Label, fit
from itda_lens.sae import coded, labels_of, reconstructed, sparse_codes
from itda_lens.sae import codes as module

D_IN, D_SAE, HEADS = 24, 40, 4
KINDS = ["itda", "topk", "topk-rescaled", "jumprelu", "standard", "matching_pursuit"]
KINDS += ["abstopk"] if hasattr(sae_lens, "AbsTopKSAE") else []


def made(kind: str, **options) -> SAE:
    """An SAE of random weights, its atoms of any norm, with a bias that counts."""
    common = dict(d_in=D_IN, d_sae=D_SAE) | options
    if kind == "itda":
        sae = ITDA(ITDAConfig(**common, k=3, method="ols"))
    elif kind.startswith("topk"):
        sae = TopKSAE(TopKSAEConfig(**common, k=5, rescale_acts_by_decoder_norm=kind != "topk"))
    elif kind == "abstopk":
        sae = sae_lens.AbsTopKSAE(sae_lens.AbsTopKSAEConfig(**common, k=5))
    elif kind == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**common))
    elif kind == "standard":
        sae = StandardSAE(StandardSAEConfig(**common))
    else:
        sae = MatchingPursuitSAE(MatchingPursuitSAEConfig(**common, max_iterations=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if kind in ("itda", "matching_pursuit"):
            sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
    return sae


def expected(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SAELens's own dense code and reconstruction."""
    return sae.encode(x), sae(x)


@pytest.fixture
def x() -> torch.Tensor:
    return 3 * torch.randn(50, D_IN)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_are_those_of_the_sae(kind, dtype, normalize, x):
    sae = made(kind, dtype=str(dtype).removeprefix("torch."), normalize_activations=normalize)
    dense, reconstruction = expected(sae, x)
    codes = sparse_codes(sae, x)
    assert torch.equal(codes.to_dense(D_SAE).to(dtype), dense)
    found = reconstructed(sae, x)
    assert found.dtype == dtype
    assert torch.equal(found, reconstruction)
    assert torch.equal(codes.l0(), (dense != 0).sum(dim=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_by_slices(kind, x):
    """Slices of other sizes, each with its own fullest row, give the same codes and reconstructions."""
    sae = made(kind, normalize_activations="layer_norm")
    whole, parts = sparse_codes(sae, x), list(coded(sae, x, batch_size=7))
    assert [len(part.x) for part in parts] == [7] * 7 + [1]
    by_slices = sparse_codes(sae, x, batch_size=7)
    torch.testing.assert_close(by_slices.to_dense(D_SAE), whole.to_dense(D_SAE))
    torch.testing.assert_close(reconstructed(sae, x, batch_size=7), reconstructed(sae, x))
    torch.testing.assert_close(torch.cat([p.reconstruction for p in parts]), reconstructed(sae, x))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "itda"])
def test_slots(kind, x):
    """As many as the fullest row needs, the largest first, the others zero: as after a pursuit."""
    codes = sparse_codes(made(kind), x)
    used = codes.values != 0
    assert codes.indices.dtype == torch.int64
    assert codes.indices.shape[1] == codes.l0().max() > 0
    assert (codes.values.abs().diff(dim=1) <= 0).all()
    assert (codes.indices[~used] == 0).all()
    for row, mask in zip(codes.indices, used, strict=True):
        assert len(row[mask].unique()) == mask.sum()


def test_some_rows_have_fewer_nonzeros_than_others(x):
    assert sparse_codes(made("standard"), x).l0().unique().numel() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_nonzeros(kind, x):
    sae = made(kind)
    if kind in ("itda", "matching_pursuit"):
        x = sae.b_dec.expand(5, -1)
    else:
        sae.W_enc.zero_()
        sae.b_enc.zero_()
    codes = sparse_codes(sae, x)
    assert codes.indices.shape == (len(x), 3 if kind == "itda" else 0)
    assert (codes.l0() == 0).all()
    assert (codes.to_dense(D_SAE) == 0).all()
    assert (codes.decode(sae.W_dec) == 0).all()
    torch.testing.assert_close(reconstructed(sae, x), sae.b_dec.expand(len(x), -1))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind, x):
    sae = made(kind)
    codes = sparse_codes(sae, x[:0])
    assert len(codes.indices) == len(codes.values) == 0
    assert codes.to_dense(D_SAE).shape == (0, D_SAE)
    assert reconstructed(sae, x[:0]).shape == (0, D_IN)


@pytest.mark.parametrize("kind", KINDS)
def test_heads(kind, x):
    """Flat rows and rows by head give what SAELens makes of heads. The SAE still takes heads later."""
    heads = x.reshape(-1, HEADS, D_IN // HEADS)
    dense, reconstruction = expected(made(kind, reshape_activations="hook_z"), heads)
    for given in (x, heads):
        sae = made(kind, reshape_activations="hook_z")
        assert torch.equal(sparse_codes(sae, given).to_dense(D_SAE), dense)
        found = reconstructed(sae, given)
        assert found.shape == given.shape
        torch.testing.assert_close(found, reconstruction.reshape(given.shape))
        assert sae(heads[:, None]).shape == (50, 1, HEADS, D_IN // HEADS)
        torch.testing.assert_close(sae(heads), reconstruction)
        reconstructed(sae, x[:3])  # between two runs in a model
        torch.testing.assert_close(sae(heads), reconstruction)
    torch.testing.assert_close(reconstructed(copy.deepcopy(sae), x), reconstruction.flatten(1))


def test_a_wide_sae_takes_fewer_rows_at_once(x, monkeypatch):
    monkeypatch.setattr(module, "DENSE", 3 * D_SAE + 1)
    assert len(next(coded(made("topk"), x)).x) == 3
    assert len(next(coded(made("itda"), x)).x) == 50


def test_gradients_pass():
    x = torch.randn(5, D_IN, requires_grad=True)
    with torch.enable_grad():
        sparse_codes(made("topk"), x).values.sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).any()


def test_what_cannot_be_measured_is_refused(x):
    training = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=5))
    transcoder = Transcoder(
        TranscoderConfig(d_in=D_IN, d_sae=D_SAE, d_out=D_IN, apply_b_dec_to_input=False)
    )
    scaled = made("topk", normalize_activations="expected_average_only_in")
    for sae, message in (
        (training, "got one of topk in training; save a trained SAE"),
        (transcoder, "dictionaries must be among .*, got one of transcoder"),
        (scaled, "expected_average_only_in.* must be folded"),
    ):
        for call in (sparse_codes, reconstructed):
            with pytest.raises(ValueError, match=message):
                call(sae, x)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input(kind, x):
    sae = made(kind)
    for given in (x[:, 1:], x[None], x[0], torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"x must be rows of d_in=24 numbers"):
            sparse_codes(sae, given)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        sparse_codes(sae, x, batch_size=0)
    x[13, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite values, first in row 13"):
        reconstructed(sae, x, batch_size=5)


def test_labels_of(x):
    itda = fit(x, d_sae=10, k=2, labels=[Label(i) for i in range(len(x))])
    assert labels_of(itda) == itda.labels
    assert labels_of(made("itda")) is None
    assert labels_of(made("topk")) is None

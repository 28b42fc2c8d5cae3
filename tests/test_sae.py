"""ITDA as a SAELens SAE: the requirements of the host, held against the real library."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.constants import SPARSITY_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import _log_feature_sparsity
from sae_lens.training.upload_saes_to_huggingface import _validate_sae_path
from safetensors.torch import load_file

import itda_lens
from itda_lens import ITDA, ITDAConfig, fit
from itda_lens.pursuit import Coding, SparseCodes, encode
from itda_lens.sae import is_dictionary, save_sparsity
from itda_lens.sae.registration import register

D_IN, D_SAE, K = 16, 40, 5


def make(method="mp", dtype=torch.float32, **options) -> ITDA:
    x = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(0)) + 2
    metadata = dict(model_name="m", hook_name="h", context_size=8, prepend_bos=True)
    return fit(x.to(dtype), d_sae=D_SAE, k=K, method=method, metadata=metadata, **options)


@pytest.fixture
def itda() -> ITDA:
    return make()


def test_is_registered_once():
    assert SAE_CLASS_REGISTRY["itda"] == (ITDA, ITDAConfig)
    register()
    assert SAE_CLASS_REGISTRY["itda"] == (ITDA, ITDAConfig)


def test_refuses_a_different_class_of_the_same_name(monkeypatch):
    monkeypatch.setitem(SAE_CLASS_REGISTRY, "itda", (SAE, ITDAConfig))
    with pytest.raises(ValueError, match="another architecture 'itda'"):
        register()


def test_a_splice_makes_no_dense_code_unless_a_hook_looks_at_it(itda, monkeypatch):
    x = torch.randn(3, D_IN) + 2
    expected = itda.decode(itda.encode(x))
    seen = []

    def look(codes, hook):
        seen.append(codes)
        return 2 * codes

    with itda.hooks(fwd_hooks=[("hook_sae_acts_post", look)]):
        doubled = itda(x)
    assert seen[0].shape == (3, D_SAE)
    torch.testing.assert_close(doubled - itda.b_dec, 2 * (expected - itda.b_dec))
    monkeypatch.setattr(SparseCodes, "to_dense", None)
    torch.testing.assert_close(itda(x), expected)


@pytest.mark.parametrize("edit", [False, True])
def test_error_term_makes_a_splice_exact_but_for_edits(edit):
    itda = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        itda.use_error_term = True
    x = torch.randn(3, D_IN) + 2
    hooks = [("hook_sae_recons", lambda recons, hook: recons + 1)] if edit else []
    with itda.hooks(fwd_hooks=hooks):
        torch.testing.assert_close(itda(x), x + edit)


def test_gradients_of_a_splice_are_those_of_encode_and_decode(itda):
    x = (torch.randn(3, D_IN) + 2).requires_grad_()
    weights = torch.randn(3, D_IN)
    wanted = torch.autograd.grad((itda.decode(itda.encode(x)) * weights).sum(), (x, itda.W_dec))
    found = torch.autograd.grad((itda(x) * weights).sum(), (x, itda.W_dec))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "shape", [(D_IN,), (3, D_IN), (2, 3, D_IN), (2, 1, 3, D_IN), (1, 2, 1, 3, D_IN)]
)
@pytest.mark.parametrize("method", ["mp", "omp", "ols"])
def test_shapes_and_agreement_with_the_pursuit(method, shape):
    itda = make(method)
    x = torch.randn(shape) + 2
    dense = itda.encode(x)
    assert dense.shape == (*shape[:-1], D_SAE)
    codes = itda.encode_sparse(x)
    assert codes.indices.shape == (*shape[:-1], K)
    torch.testing.assert_close(codes.to_dense(D_SAE), dense)
    expected = encode(x - itda.b_dec, itda.W_dec.detach(), K, method=method).to_dense(D_SAE)
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-4)
    assert (dense != 0).sum(dim=-1).max() <= K
    torch.testing.assert_close(itda.decode(dense), dense @ itda.W_dec + itda.b_dec)
    torch.testing.assert_close(itda.decode_sparse(codes), itda.decode(dense))
    torch.testing.assert_close(itda(x), itda.decode(dense))


@pytest.mark.parametrize("method", ["mp", "omp", "ols"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
class TestNonNegative:
    def test_is_an_exact_view(self, method, dtype):
        itda = make(method).to(dtype=dtype)
        view = itda.nonnegative()
        x = (torch.randn(50, D_IN) + 2).to(dtype)
        signed, codes = itda.encode_sparse(x), view.encode_sparse(x)
        assert (signed.values < 0).any()
        assert view.cfg.d_sae == 2 * D_SAE == len(view.W_dec)
        assert (codes.values >= 0).all()
        assert torch.equal(codes.l0(), signed.l0())
        dense, signed_dense = view.encode(x), itda.encode(x)
        assert torch.equal(dense[:, :D_SAE] - dense[:, D_SAE:], signed_dense)
        # The sums run in another order: rounding of the dtype, 1e-6 in float32.
        tolerance = dict(rtol=0, atol=8 * torch.finfo(dtype).eps * x.abs().max().item())
        torch.testing.assert_close(view.decode(dense), itda.decode(signed_dense), **tolerance)
        torch.testing.assert_close(view(x), itda(x), **tolerance)

    def test_keeps_labels_with_a_sign_and_survives_a_file(self, method, dtype, tmp_path):
        view = make(method).to(dtype=dtype).nonnegative()
        view.save_model(tmp_path)
        loaded = itda_lens.load(tmp_path)
        x = torch.randn(5, D_IN).to(dtype)
        assert torch.equal(loaded.encode(x), view.encode(x))
        for i in range(D_SAE):
            assert loaded.labels[i].cosine == 1
            assert loaded.labels[D_SAE + i].cosine == -1
            assert loaded.labels[D_SAE + i].key == loaded.labels[i].key
        assert loaded.nonnegative() is loaded

    def test_hooks_and_gradients(self, method, dtype):
        view = make(method).to(dtype=dtype).nonnegative()
        x = torch.randn(5, D_IN).to(dtype).requires_grad_()
        halved = view.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda a, hook: a / 2)])
        tolerance = dict(rtol=0, atol=8 * torch.finfo(dtype).eps * x.detach().abs().max().item())
        torch.testing.assert_close(halved - view.b_dec, (view(x) - view.b_dec) / 2, **tolerance)
        view.encode(x).sum().backward()
        assert torch.isfinite(x.grad).all()
        assert (x.grad != 0).any()


def test_a_nonnegative_dictionary_is_its_own_view():
    itda = make(signed=False)
    assert itda.nonnegative() is itda


def test_a_view_is_a_copy_and_follows_the_configuration(itda):
    itda.cfg.k = 3
    view = itda.nonnegative()
    assert view.encode(torch.randn(9, D_IN)).count_nonzero(dim=-1).max() == 3
    view.W_dec.data.zero_()
    assert itda.W_dec.any()
    assert not itda.cfg.mirrored


def test_a_mirror_image_that_is_none_is_told(itda, tmp_path):
    view = itda.nonnegative()
    view.W_dec.data[-1] += 1
    view.save_model(tmp_path)
    with pytest.raises(ValueError, match="second half must be the negative of the first"):
        itda_lens.load(tmp_path)


def test_masked_tokens_and_atoms(itda):
    assert (itda.encode(itda.b_dec.detach()[None]) == 0).all()
    itda.b_dec.data.zero_()
    assert (itda.encode(torch.zeros(2, D_IN)) == 0).all()
    codes = itda.encode_sparse(50 * itda.W_dec.detach())
    assert (codes.l0() == 1).all()
    assert codes.indices[:, 0].tolist() == list(range(D_SAE))


def test_hooks_fire_and_edits_flow(itda):
    x = torch.randn(4, D_IN)
    _, cache = itda.run_with_cache(x)
    assert {
        f"hook_sae_{point}" for point in ("input", "acts_pre", "acts_post", "recons", "output")
    } <= set(cache)
    torch.testing.assert_close(cache["hook_sae_acts_post"], itda.encode(x))
    for name in ("hook_sae_acts_pre", "hook_sae_acts_post"):
        ablated = itda.run_with_hooks(x, fwd_hooks=[(name, lambda acts, hook: acts * 0)])
        torch.testing.assert_close(ablated, itda.b_dec.expand(4, D_IN))


def test_error_term_restores_the_input(itda):
    x = torch.randn(4, D_IN)
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        itda.use_error_term = True
    torch.testing.assert_close(itda(x), x)


def test_encoder_is_a_view_with_unit_norms(itda):
    assert itda.W_enc.shape == (D_IN, D_SAE)
    assert itda.W_enc.data_ptr() == itda.W_dec.data_ptr()
    torch.testing.assert_close(itda.W_enc.norm(dim=0), torch.ones(D_SAE))
    assert set(itda.state_dict()) == {"W_dec", "b_dec"}
    with pytest.raises(NotImplementedError):
        itda.fold_activation_whitening(torch.zeros(D_IN), torch.eye(D_IN), torch.eye(D_IN))


def test_folding_a_scaling_factor_keeps_the_function(itda):
    x = torch.randn(6, D_IN)
    codes, output = itda.encode(4 * x), itda(4 * x)
    itda.fold_activation_norm_scaling_factor(4.0)
    torch.testing.assert_close(itda.encode(x), codes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(4 * itda(x), output, atol=1e-4, rtol=1e-4)


class TestPrefix:
    @pytest.mark.parametrize("method", ["mp", "omp", "ols"])
    def test_is_the_dictionary_of_the_first_atoms(self, method, tmp_path):
        itda = make(method)
        first = itda.prefix(12)
        assert torch.equal(first.W_dec, itda.W_dec[:12])
        assert first.labels == itda.labels[:12]
        x = torch.randn(5, D_IN) + 2
        expected = encode(x - itda.b_dec, itda.W_dec[:12], K, method=method)
        torch.testing.assert_close(first.encode(x), expected.to_dense(12), atol=1e-4, rtol=1e-4)
        first.save_model(tmp_path)
        assert torch.equal(SAE.load_from_disk(tmp_path).encode(x), first.encode(x))

    def test_is_a_copy_with_no_more_nonzeros_than_atoms(self, itda):
        itda.calibrate(torch.randn(300, D_IN) + 2, 3.5)
        first = itda.prefix(3)
        assert (first.cfg.k, first.cfg.l0, first.cfg.d_sae) == (3, None, 3)
        assert first.cfg.threshold == itda.cfg.threshold > 0
        with torch.no_grad():
            first.W_dec.zero_()
        assert itda.W_dec[0].norm() > 0.9
        assert (itda.cfg.k, itda.cfg.d_sae) == (K, D_SAE)

    @pytest.mark.parametrize("m", [0, D_SAE + 1])
    def test_bad_input(self, itda, m):
        with pytest.raises(ValueError, match=f"m must be between 1 and d_sae=40, got {m}"):
            itda.prefix(m)
        with pytest.raises(ValueError, match="take the prefix first"):
            itda.nonnegative().prefix(5)


class TestCalibrate:
    def test_sets_the_mean_of_any_dictionary(self, itda):
        x = torch.randn(2000, D_IN) + 2
        before = itda.encode_sparse(x)
        threshold = itda.calibrate(x, 3.3, k=9)
        assert (itda.cfg.k, itda.cfg.threshold, itda.cfg.l0) == (9, threshold, 3.3)
        codes = itda.encode_sparse(x)
        assert codes.indices.shape == (2000, 9)
        assert codes.l0().double().mean() == pytest.approx(3.3, rel=0.01)
        assert itda.calibrate(x, 5, k=5) == 0
        assert torch.equal(itda.encode_sparse(x).indices, before.indices)

    def test_survives_files_views_and_scaling(self, itda, tmp_path):
        x = torch.randn(200, D_IN) + 2
        itda.calibrate(x.reshape(2, 100, D_IN), 2.5)
        codes = itda.encode(x)
        itda.save_model(tmp_path)
        assert torch.equal(SAE.load_from_disk(tmp_path).encode(x), codes)
        view = itda.nonnegative()
        torch.testing.assert_close(view.decode(view.encode(x)), itda(x))
        itda.fold_activation_norm_scaling_factor(4.0)
        torch.testing.assert_close(itda.encode_sparse(x / 4).to_dense(D_SAE), codes)

    def test_k_may_be_lowered_afterwards(self, itda, tmp_path):
        itda.calibrate(torch.randn(300, D_IN) + 2, 3.5)
        itda.cfg.k = 2
        itda.save_model(tmp_path)
        assert itda_lens.load(tmp_path).cfg.k == 2

    def test_a_row_does_not_depend_on_its_batch(self, itda):
        x = torch.randn(200, D_IN) + 2
        itda.calibrate(x, 2.5)
        assert torch.equal(itda.encode(x)[7], itda.encode(x[7]))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((torch.ones(4, D_IN), 0), "l0 must be above 0 and at most k=5, got 0"),
            ((torch.ones(4, D_IN), 6), "at most k=5, got 6"),
            ((torch.ones(4, D_IN), 3, D_SAE + 1), "k must be between 1 and the number of atoms"),
            ((torch.ones(4, 3), 3), "d_in=16 numbers per row"),
            ((torch.full((4, D_IN), torch.nan), 3), "NaN or infinite"),
        ],
    )
    def test_bad_input_changes_nothing(self, itda, arguments, message):
        with pytest.raises(ValueError, match=message):
            itda.calibrate(*arguments)
        assert (itda.cfg.k, itda.cfg.threshold, itda.cfg.l0) == (K, 0, None)


@pytest.mark.parametrize("method", ["mp", "omp", "ols"])
def test_gradients_given_the_support(method):
    itda = make(method, torch.float64)
    x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(itda.encode, x)
    assert torch.autograd.gradcheck(itda, x)
    itda.encode(x).sum().backward()
    assert itda.W_dec.grad is not None
    assert itda.b_dec.grad is not None


def test_follows_changes_of_the_weights(itda):
    x = torch.randn(5, D_IN)
    before = itda.encode(x)
    with torch.no_grad():
        itda.W_dec.copy_(itda.W_dec.flip(0))
    torch.testing.assert_close(itda.encode(x), before.flip(-1))
    itda.W_dec.data = itda.W_dec.data.flip(0).contiguous()
    torch.testing.assert_close(itda.encode(x), before)
    itda.W_dec.data.mul_(-1)
    torch.testing.assert_close(itda.encode(x), -before)


def fresh_copy(itda):
    fresh = ITDA(itda.cfg)
    fresh.load_state_dict(itda.state_dict())
    return fresh


def one_more(number):
    """The next number of its dtype: the smallest change that there is."""
    return torch.nextafter(number.float(), torch.tensor(9.0)) if number.dtype == torch.float32 else (
        number.view({2: torch.int16, 8: torch.int64}[number.itemsize]) + 1
    ).view(number.dtype)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_no_edit_of_the_weights_is_missed(itda, dtype, nonnegative):
    itda = itda.to(dtype=dtype)
    itda = itda.nonnegative() if nonnegative else itda
    x = torch.randn(30, D_IN) + 2
    edits = dict(
        through_data=lambda i: itda.W_dec.data[i].copy_(torch.randn(D_IN)),
        without_gradients=lambda i: itda.W_dec.index_copy_(
            0, torch.tensor([i]), torch.randn(1, D_IN, dtype=dtype)
        ),
        one_number=lambda i: itda.W_dec.data[i, i % D_IN].copy_(one_more(itda.W_dec.data[i, i % D_IN])),
        two_rows=lambda i: itda.W_dec.data[[i, i - 1]].copy_(itda.W_dec.data[[i - 1, i]].clone()),
        swapped=lambda i: itda.W_dec.data.copy_(itda.W_dec.data.roll(1, dims=0)),
        a_sign=lambda i: itda.W_dec.data[i].neg_(),
        all_signs=lambda i: itda.W_dec.data.neg_(),
        new_storage=lambda i: setattr(itda.W_dec, "data", itda.W_dec.data.clone().roll(i, dims=0)),
        numpy=lambda i: itda.W_dec.data.view(torch.uint8).numpy().__setitem__((i, 0), i),
        optimizer=lambda i: step(itda, x),
    )
    for i in range(1, 8):
        for edit in edits.values():
            with torch.no_grad():
                edit(i)
            found, wanted = itda.encode_sparse(x), fresh_copy(itda).encode_sparse(x)
            assert torch.equal(found.indices, wanted.indices)
            assert torch.equal(found.values, wanted.values)


@torch.enable_grad()
def step(itda, x):
    optimizer = torch.optim.SGD(itda.parameters(), lr=1e-3)
    (itda(x) - x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_derived_data_are_kept_while_nothing_changes(itda):
    itda.encode(torch.randn(2, D_IN))
    kept = itda._prepared
    itda.encode(torch.randn(3, D_IN))
    assert itda._prepared is kept
    itda.W_dec.data = itda.W_dec.data.clone()  # other memory, but the same numbers
    itda.encode(torch.randn(3, D_IN))
    assert itda._prepared is kept


class TestShapeOfWeights:
    def test_assigning_fewer_atoms_changes_nothing(self, itda):
        before = itda.W_dec
        for name, value in (("W_dec", before[:9]), ("W_enc", itda.W_enc[:, :9])):
            with pytest.raises(ValueError, match=f"{name} must"):
                setattr(itda, name, torch.nn.Parameter(value.detach()))
        assert itda.W_dec is before

    @pytest.mark.parametrize("rows", [D_SAE - 1, D_SAE + 1, 9])
    def test_weights_that_do_not_fit_the_configuration_are_told(self, itda, rows):
        itda.W_dec.data = torch.eye(D_IN).repeat(4, 1)[:rows]
        codes = SparseCodes(torch.zeros(2, K, dtype=torch.long), torch.ones(2, K))
        for call, value in (
            (itda.encode, torch.randn(2, D_IN)),
            (itda, torch.randn(2, D_IN)),
            (itda.decode, torch.randn(2, D_SAE)),
            (itda.decode_sparse, codes),
            (lambda x: itda.calibrate(x, 2), torch.randn(2, D_IN)),
        ):
            with pytest.raises(ValueError, match=rf"\(d_sae, d_in\) = \(40, 16\) .* got \({rows}, 16\)"):
                call(value)

    def test_encoder_may_be_assigned_what_it_is(self, itda):
        before = itda.encode(torch.ones(2, D_IN))
        itda.W_enc = torch.nn.Parameter(itda.W_dec.detach().T.clone())
        itda.W_enc = itda.W_dec.T
        assert torch.equal(itda.encode(torch.ones(2, D_IN)), before)
        assert set(itda.state_dict()) == {"W_dec", "b_dec"}
        for other in (2 * itda.W_enc, itda.W_enc.double(), itda.W_dec, None):
            with pytest.raises(ValueError, match="W_enc must be W_dec.T"):
                itda.W_enc = other


class TestFoldingNorms:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("nonnegative", [False, True])
    def test_unit_atoms_stay_bit_for_bit(self, itda, dtype, nonnegative, tmp_path):
        itda = make(dtype=torch.float64) if dtype == torch.float64 else itda.to(dtype=dtype)
        itda = itda.nonnegative() if nonnegative else itda
        before = itda.W_dec.detach().clone()
        itda.fold_W_dec_norm()
        assert torch.equal(itda.W_dec, before)
        assert torch.equal(itda.fold_and_get_W_dec_norm(), torch.ones(itda.cfg.d_sae, dtype=dtype))
        itda.save_model(tmp_path)
        assert torch.equal(SAE.load_from_disk(tmp_path, fold_W_dec_norm=True).W_dec, before)

    @pytest.mark.parametrize("method", ["mp", "omp", "ols"])
    @pytest.mark.parametrize("nonnegative", [False, True])
    def test_others_are_scaled_and_reconstructions_stay(self, method, nonnegative):
        itda = make(method, l0=3.0)
        itda = itda.nonnegative() if nonnegative else itda
        factors = (torch.rand(D_SAE) + 0.5).repeat(1 + nonnegative)
        itda.W_dec.data *= factors[:, None]
        x = torch.randn(30, D_IN) + 2
        codes, output = itda.encode(x), itda(x)
        norms = itda.fold_and_get_W_dec_norm()
        torch.testing.assert_close(norms, factors)
        torch.testing.assert_close(itda.W_dec.norm(dim=1), torch.ones(itda.cfg.d_sae))
        torch.testing.assert_close(itda.encode(x), codes * norms)
        torch.testing.assert_close(itda(x), output)


MADE = dict(
    fit=lambda itda, folder: make(),
    constructed=lambda itda, folder: ITDA(itda.cfg),
    prefix=lambda itda, folder: itda.prefix(30),
    nonnegative=lambda itda, folder: itda.nonnegative(),
    loaded=lambda itda, folder: itda_lens.load(folder),
    loaded_by_saelens=lambda itda, folder: SAE.load_from_disk(folder, dtype="float64"),
    cast=lambda itda, folder: itda.to(dtype=torch.float64),
    halved=lambda itda, folder: itda.bfloat16(),
)


@pytest.mark.parametrize("how", MADE)
def test_dictionaries_made_in_inference_mode_serve_afterwards(itda, how, tmp_path):
    itda.save_model(tmp_path)
    with torch.inference_mode():
        made = MADE[how](itda, tmp_path)
        made.encode(torch.randn(3, D_IN))
    before = made.W_dec.detach().clone()
    step(made, torch.randn(5, D_IN).to(made.dtype))
    assert not torch.equal(made.W_dec, before)
    made.W_dec.data *= 2
    made.fold_W_dec_norm()
    made.fold_activation_norm_scaling_factor(2.0)
    assert made.to(dtype=torch.float32).encode(torch.randn(3, D_IN)).dtype == torch.float32


def test_random_numbers_of_others_are_left_alone(itda, tmp_path):
    itda.save_model(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    weights = [ITDA(itda.cfg).W_dec for _ in range(2)]
    itda.prefix(9).nonnegative()
    itda_lens.load(tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(*weights)


def test_repr_says_what_it_is(itda):
    shown = dict(d_in=16, d_sae=40, k=5, method="mp", signed=True, dtype="float32", device="cpu")
    shown = ", ".join(f"{name}={value!r}" for name, value in shown.items())
    assert repr(itda) == f"ITDA({shown}, hook_name='h')"
    itda.calibrate(torch.randn(200, D_IN) + 2, 3)
    assert "l0=3.0, mirrored=True, hook_name='h'" in repr(itda.nonnegative())
    meta = ITDA(ITDAConfig(d_in=8, d_sae=20, k=2, device="meta"))
    assert "device='meta'" in repr(meta)
    assert "hook_name" not in repr(meta)


@pytest.mark.parametrize("change", ["bfloat16", "half", "double"])
def test_every_way_to_cast_is_told_to_the_configuration(itda, change, tmp_path):
    dtype = {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64}[change]
    itda = getattr(itda, change)()
    assert itda.W_dec.dtype == itda.dtype == dtype
    itda.save_model(tmp_path)
    loaded = itda_lens.load(tmp_path)
    assert loaded.W_dec.dtype == dtype
    x = torch.randn(4, D_IN)
    assert torch.equal(loaded.encode(x), itda.encode(x))


@pytest.mark.parametrize("method", ["mp", "omp", "ols"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_without_autocast(method, dtype):
    itda = make(method).to(dtype=dtype)
    x = (torch.randn(50, D_IN) + 2).to(dtype)
    with torch.no_grad():
        expected = itda.encode_sparse(x)
    with torch.autocast("cpu", torch.bfloat16):
        itda._prepared = None
        found = itda.encode_sparse(x)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_after_inference_mode(itda, dtype):
    itda = itda.to(dtype=dtype)
    with torch.inference_mode():
        itda.encode(torch.randn(2, D_IN))
    x = torch.randn(2, D_IN, requires_grad=True)
    itda.encode(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_weights_are_told(itda, tmp_path, value):
    itda.W_dec.data[2, 3] = value
    with pytest.raises(ValueError, match="W_dec has NaN or infinite"):
        itda.encode(torch.randn(2, D_IN))
    itda.save_model(tmp_path)
    with pytest.raises(ValueError, match="W_dec has NaN or infinite"):
        itda_lens.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_save_and_load_in_every_dtype(tmp_path, dtype, itda):
    labels = itda.labels
    itda = itda.to(dtype=dtype)
    itda.save_model(tmp_path)
    for loaded in (
        SAE.load_from_disk(tmp_path),
        itda_lens.load(tmp_path),
        ITDA.load_from_disk(tmp_path),
    ):
        assert type(loaded) is ITDA
        assert loaded.W_dec.dtype == loaded.dtype == dtype
        assert torch.equal(loaded.W_dec, itda.W_dec)
        assert loaded.labels == labels
        assert loaded.cfg.to_dict() == itda.cfg.to_dict()
        x = torch.randn(4, D_IN).to(dtype)
        assert torch.equal(loaded.encode(x), itda.encode(x))
        assert loaded(x).dtype == dtype
    half = itda_lens.load(tmp_path, dtype="bfloat16")
    assert half.labels == labels
    assert half.labels[0].row == labels[0].row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_atoms_still_code_themselves(itda, dtype):
    activations = 50 * itda.W_dec.detach() + itda.b_dec.detach()
    half = itda.to(dtype=dtype)
    codes = half.encode_sparse(activations)
    assert codes.indices[:, 0].tolist() == list(range(D_SAE))
    # b_dec and the activations are rounded too, so that some are more than an atom's rounding away.
    assert codes.l0().float().mean() < K
    assert (codes.values[:, 1:].abs() < 1).all()


def test_moves_between_dtypes_and_devices(itda):
    assert itda.to("cpu", torch.float64).encode(torch.randn(2, D_IN)).dtype == torch.float64
    meta = itda.to("meta")
    assert meta.W_dec.is_meta


def test_built_on_the_meta_device_has_no_buffers():
    meta = ITDA(ITDAConfig(d_in=8, d_sae=20, k=2, device="meta"))
    assert {name for name, _ in meta.named_parameters()} == {"W_dec", "b_dec"}
    assert not dict(meta.named_buffers())


def test_hook_z_reshaping():
    cfg = ITDAConfig(d_in=D_IN, d_sae=D_SAE, k=K, reshape_activations="hook_z")
    cfg.metadata = SAEMetadata(hook_name="blocks.0.attn.hook_z")
    itda = ITDA(cfg)
    z = torch.randn(2, 3, 4, 4)
    assert itda.encode(z).shape == (2, 3, D_SAE)
    assert itda(z).shape == z.shape
    flat = ITDA(ITDAConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    flat.load_state_dict(itda.state_dict())
    torch.testing.assert_close(itda(z).flatten(-2), flat(z.flatten(-2)))
    with pytest.raises(ValueError, match="d_in=16 numbers per row, got \\(2, 3, 4, 5\\)"):
        itda.encode(torch.randn(2, 3, 4, 5))


def test_without_b_dec(itda):
    itda.cfg.apply_b_dec_to_input = False
    x = torch.randn(3, D_IN)
    torch.testing.assert_close(itda.decode(itda.encode(x)), itda.encode(x) @ itda.W_dec)


def test_upload_finds_the_files_it_wants(itda, tmp_path):
    itda.save_model(tmp_path)
    _validate_sae_path(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {"W_dec", "b_dec"}


def test_from_dict(itda):
    again = ITDA.from_dict(itda.cfg.to_dict())
    assert type(again) is ITDA
    assert again.cfg == itda.cfg
    assert again.labels == itda.labels


def test_a_fresh_process_needs_only_the_import(itda, tmp_path):
    itda.save_model(tmp_path)
    code = (
        "import itda_lens, sys; from sae_lens import SAE;"
        "sae = SAE.load_from_disk(sys.argv[1]); print(type(sae).__name__, sae.labels[3].row)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["ITDA", str(itda.labels[3].row)]


class TestFiles:
    def test_failed_save_leaves_the_folder_as_it_was(self, itda, tmp_path, monkeypatch):
        itda.save_model(tmp_path)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

        def full_disk(*args, **kwargs):
            tmp_path.joinpath(f"sae_weights.safetensors.{1}.part").touch()
            tmp_path.joinpath(f"sae_weights.safetensors.{1}.part").unlink()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("itda_lens.sae.saved.save_file", full_disk)
        itda.W_dec.data.mul_(2)
        with pytest.raises(OSError, match="No space left"):
            itda.save_model(tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    def test_interrupt_between_the_files(self, itda, tmp_path, monkeypatch):
        def interrupt(self, text):
            self.touch()
            raise KeyboardInterrupt

        monkeypatch.setattr("pathlib.Path.write_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            itda.save_model(tmp_path / "new")
        assert list((tmp_path / "new").iterdir()) == []

    @pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
    def test_truncated_weights(self, itda, tmp_path, keep):
        weights, _ = itda.save_model(tmp_path)
        data = weights.read_bytes()
        weights.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
        with pytest.raises(ValueError, match="sae_weights.safetensors is truncated or damaged"):
            itda_lens.load(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"d_in": 3}', "\x00\x01"])
    def test_damaged_config(self, itda, tmp_path, content):
        _, config = itda.save_model(tmp_path)
        config.write_text(content)
        with pytest.raises(ValueError, match="cfg.json is truncated or damaged"):
            itda_lens.load(tmp_path)

    def test_incomplete_config(self, itda, tmp_path):
        _, config = itda.save_model(tmp_path)
        values = json.loads(config.read_text())
        del values["d_sae"]
        config.write_text(json.dumps(values))
        with pytest.raises(ValueError, match="not a complete config"):
            itda_lens.load(tmp_path)

    def test_config_of_another_dictionary(self, itda, tmp_path):
        _, config = itda.save_model(tmp_path)
        values = json.loads(config.read_text()) | {"d_sae": D_SAE + 1}
        config.write_text(json.dumps(values))
        with pytest.raises(ValueError, match="weights do not fit the config"):
            itda_lens.load(tmp_path)

    def test_another_architecture(self, itda, tmp_path):
        _, config = itda.save_model(tmp_path)
        values = json.loads(config.read_text()) | {"architecture": "topk"}
        config.write_text(json.dumps(values))
        with pytest.raises(ValueError, match="holds a 'topk' SAE, not an ITDA"):
            itda_lens.load(tmp_path)

    def test_missing(self, itda, tmp_path):
        with pytest.raises(FileNotFoundError, match="no folder"):
            itda_lens.load(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="no dictionary 'org/name/missing' on the hub"):
            itda_lens.load("org/name/missing")
        itda.save_model(tmp_path / "inside")
        with pytest.raises(FileNotFoundError, match="it holds dictionaries: .*inside"):
            itda_lens.load(tmp_path)

    def test_sparsity_is_what_saelens_writes(self, itda, tmp_path):
        itda.save_model(tmp_path)
        density = torch.linspace(0, 1, D_SAE)
        save_sparsity(tmp_path, density)
        (written,) = load_file(tmp_path / SPARSITY_FILENAME).items()
        assert written[0] == "sparsity"
        assert torch.equal(written[1], _log_feature_sparsity(density))
        assert is_dictionary(tmp_path)
        with pytest.raises(ValueError, match="feature_density must be between 0 and 1"):
            save_sparsity(tmp_path, density * 2)
        # It belongs to the weights that it was measured with.
        itda.save_model(tmp_path)
        assert not (tmp_path / SPARSITY_FILENAME).exists()

    def test_damaged_labels(self, itda):
        itda.cfg.metadata.itda_labels = itda.cfg.metadata.itda_labels[:-8]
        with pytest.raises(ValueError, match="damaged labels"):
            itda.labels  # noqa: B018
        itda.cfg.metadata.itda_labels = None
        for error in (ValueError, AttributeError):
            with pytest.raises(error, match="carries no labels"):
                itda.labels  # noqa: B018
        assert not hasattr(itda, "labels")
        assert getattr(itda, "labels", None) is None
        with pytest.raises(AttributeError, match="no attribute 'lables'"):
            itda.lables  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=0), "k must be at least 1, got 0"),
        (dict(k=41), "k must be between 1 and d_sae=40, got 41"),
        (dict(method="lasso"), "method must be one of"),
        (dict(rtol=1.0), "rtol must be"),
        (dict(l0=0.0), "l0 must be above 0 and finite, or None, got 0.0"),
        (dict(threshold=-1.0), "threshold must be at least 0 and finite, got -1"),
        (dict(threshold=float("inf")), "threshold must be at least 0 and finite, got inf"),
        (dict(l0=True), "l0 must be above 0 and finite, or None, got True"),
        (dict(l0="3"), "l0 must be above 0 and finite, or None, got '3'"),
        (dict(k=True), "k must be a whole number, at least 1, got True"),
        (dict(k=4.0), "k must be a whole number, at least 1, got 4.0"),
        (dict(signed="yes"), "signed must be True or False, got 'yes'"),
        (dict(method="ols", signed=False), "method must be 'mp' or 'omp' for signed=False"),
        (dict(threshold="0"), "threshold must be a number, at least 0 and finite, got '0'"),
        (dict(d_in=0), "d_in must be at least 1"),
        (dict(d_sae=True), "d_sae must be at least 1 and a whole number, got True"),
        (dict(d_sae=40.0), "d_sae must be at least 1 and a whole number, got 40.0"),
        (dict(d_sae=41, mirrored=True), "d_sae must be even for mirrored=True, got 41"),
        (dict(k=21, mirrored=True), "k must be between 1 and d_sae / 2=20, got 21"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        ITDAConfig(**(dict(d_in=D_IN, d_sae=D_SAE, k=K) | change))


def test_numpy_s_numbers_in_a_config_can_be_saved(tmp_path):
    numbers = dict(d_in=np.int64(8), d_sae=np.int32(20), k=np.int64(2), l0=np.float32(1.5))
    cfg = ITDAConfig(**numbers, rtol=np.float32(0.25), signed=np.bool_(False), threshold=np.float64(1))
    itda = ITDA(cfg)
    itda.save_model(tmp_path)
    assert itda_lens.load(tmp_path).cfg.coding == cfg.coding == Coding(2, "mp", False, 0.25, 1.0)


@pytest.mark.parametrize("bad", [torch.eye(D_IN).to_sparse(), torch.eye(D_IN).to(torch.float8_e4m3fn)])
def test_activations_that_no_pursuit_takes(itda, bad):
    for call in (itda.encode, itda.encode_sparse, itda, lambda x: itda.calibrate(x, 2)):
        with pytest.raises(TypeError, match="x must be a (dense|floating-point) tensor"):
            call(bad)


def test_weights_of_a_dtype_that_no_pursuit_takes(itda):
    itda.W_dec.data = itda.W_dec.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="W_dec must be float16, .* got torch.float8_e4m3fn"):
        itda.encode(torch.randn(2, D_IN))


def test_bad_activations(itda):
    with pytest.raises(ValueError, match="d_in=16 numbers per row, got \\(2, 17\\)"):
        itda.encode(torch.zeros(2, 17))
    with pytest.raises(ValueError, match="NaN or infinite values, first in row 1"):
        itda.encode(torch.stack([torch.zeros(D_IN), torch.full((D_IN,), torch.inf)]))


def test_importing_twice_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()

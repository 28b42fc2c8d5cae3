"""The pursuits against slow float64 loops, scikit-learn and scipy, and their invariants."""

import copy
import math
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import caching
from scipy.optimize import nnls
from sklearn.linear_model import orthogonal_mp_gram

from itda_lens.pursuit import (
    Coding,
    GramRows,
    Method,
    PreparedAtoms,
    SparseCodes,
    calibrate_out_of_fold,
    calibrate_threshold,
    calibration,
    compiled,
    encode,
    first_nonfinite_row,
    gram_matrix,
    gram_rows,
    inner_products,
    kernels,
    least_squares,
    matching,
    methods,
    orthogonal,
    precision,
)
from itda_lens.pursuit.gram import leave_out

METHODS = ("mp", "omp", "ols")
SIGNED = [(method, True) for method in METHODS]
PURSUITS = [*SIGNED, ("mp", False), ("omp", False)]
SEARCH = {"mp": matching.search, "omp": orthogonal.search, "ols": least_squares.search}
FORMS = ("compiled", "gram", "gemm")

# float32 pursuits against float64 references: 20 steps over rows of norm about 5 leave some 1e-6 each.
FLOAT32_ATOL = 1e-4
FLOAT64_ATOL = 1e-9


def problem(n=60, d=16, rows=40, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.nn.functional.normalize(atoms, dim=1).to(dtype)


def run(x, atoms, k, form="compiled", **options):
    pursuit = {name: options[name] for name in ("method", "signed") if name in options}
    grams = dict(compiled=gram_matrix(atoms, **pursuit), gram=atoms @ atoms.T, gemm=None)
    return encode(x, atoms, k, gram=grams[form], **options)


def slow_mp(x, atoms, k, signed):
    """Textbook loop over rows and steps in float64; dense codes."""
    codes = np.zeros((len(x), len(atoms)))
    for i, row in enumerate(x.double().numpy()):
        residual = row.copy()
        for _ in range(k):
            correlations = atoms.double().numpy() @ residual
            j = int(np.argmax(np.abs(correlations) if signed else correlations))
            c = correlations[j]
            if not signed and c <= 0:
                break
            codes[i, j] += c
            residual -= c * atoms[j].double().numpy()
    return torch.from_numpy(codes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mp_equals_the_slow_loop(form, signed, dtype):
    x, atoms = problem(dtype=dtype)
    codes = run(x, atoms, 8, form, signed=signed, rtol=0)
    atol = FLOAT64_ATOL if dtype == torch.float64 else FLOAT32_ATOL
    expected = slow_mp(x, atoms, 8, signed).to(dtype)
    torch.testing.assert_close(codes.to_dense(len(atoms)), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_omp_equals_scikit_learn(form):
    x, atoms = problem()
    codes = run(x, atoms, 7, form, method="omp", rtol=0).to_dense(len(atoms))
    expected = orthogonal_mp_gram((atoms @ atoms.T).numpy(), (atoms @ x.T).numpy(), n_nonzero_coefs=7)
    torch.testing.assert_close(codes, torch.from_numpy(expected.T), atol=FLOAT64_ATOL, rtol=0)


def slow_ols(x, atoms, k, threshold):
    """Forward and backward by solving for each support anew, in float64; dense codes."""
    x, atoms = x.double().numpy(), atoms.double().numpy()
    codes = np.zeros((len(x), len(atoms)))

    def fit(row, support):
        values, *_ = np.linalg.lstsq(atoms[support].T, row, rcond=None)
        return values, np.square(row - values @ atoms[support]).sum()

    for i, row in enumerate(x):
        support, error = [], row @ row
        while len(support) < k + -(-k // 4):
            others = [j for j in range(len(atoms)) if j not in support]
            errors = [fit(row, [*support, j])[1] for j in others]
            if error - min(errors) < (0.85 * threshold) ** 2:
                break
            support, error = [*support, others[int(np.argmin(errors))]], min(errors)
        while support:
            errors = [fit(row, [a for a in support if a != j])[1] for j in support]
            if len(support) <= k and min(errors) - error >= threshold**2:
                break
            error = min(errors)
            del support[int(np.argmin(errors))]
        codes[i, support] = fit(row, support)[0]
    return torch.from_numpy(codes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("k", "threshold"), [(1, 0.0), (6, 0.0), (6, 0.8), (12, 0.8), (12, 30.0)])
def test_ols_equals_the_slow_loop(form, k, threshold):
    x, atoms = problem(n=50, d=24, rows=25)
    found = run(x, atoms, k, form, method="ols", rtol=0, threshold=threshold)
    expected = slow_ols(x, atoms, k, threshold)
    torch.testing.assert_close(found.to_dense(50), expected, atol=FLOAT64_ATOL, rtol=0)
    if (k, threshold) == (12, 0.8):
        assert 0 < found.l0().min() < found.l0().max()


def test_ols_leaves_less_than_omp_with_as_many_atoms():
    x, atoms = problem(n=400, d=64, rows=200)
    errors = [(x - run(x, atoms, 12, method=method).decode(atoms)).square().sum() for method in METHODS]
    assert errors[2] < 0.99 * errors[1] < errors[0]


@pytest.mark.parametrize("form", FORMS)
def test_ols_never_holds_two_atoms_that_are_nearly_the_same(form):
    x, atoms = problem(n=20, d=32, rows=30)
    twins = torch.nn.functional.normalize(atoms + 0.005 * x[:20], dim=1)
    codes = run(x, torch.cat([atoms, twins]), 16, form, method="ols", rtol=0).to_dense(40)
    assert not ((codes[:, :20] != 0) & (codes[:, 20:] != 0)).any()
    assert ((codes != 0).sum(dim=1) == 16).all()


@pytest.mark.parametrize("form", FORMS)
def test_non_negative_omp_converges_to_non_negative_least_squares(form):
    x, atoms = problem()
    codes = run(x, atoms, 50, form, method="omp", signed=False, rtol=0).to_dense(len(atoms))
    assert (codes >= 0).all()
    for row, code in zip(x, codes, strict=True):
        # Coefficients may be others: sixty atoms in sixteen dimensions have several best fits.
        expected, _ = nnls(atoms.T.numpy(), row.numpy())
        np.testing.assert_allclose(code.numpy() @ atoms.numpy(), expected @ atoms.numpy(), atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_non_negative_omp_finds_the_one_non_negative_fit(form):
    """With fewer atoms than dimensions there is one, and it does not reach zero."""
    x, atoms = problem(n=12, d=16)
    codes = run(x, atoms, 12, form, method="omp", signed=False, rtol=0).to_dense(len(atoms))
    for row, code in zip(x, codes, strict=True):
        expected, residual = nnls(atoms.T.numpy(), row.numpy())
        assert residual > 0.1
        np.testing.assert_allclose(code.numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_non_negative_omp_is_the_least_squares_fit_on_its_support(k):
    x, atoms = problem()
    codes = run(x, atoms, k, method="omp", signed=False, rtol=0)
    assert (codes.values >= 0).all()
    assert codes.values.any()
    for i, row in enumerate(x):
        support = codes.indices[i][codes.values[i] > 0]
        fit = torch.linalg.lstsq(atoms[support].T, row).solution
        torch.testing.assert_close(codes.values[i][codes.values[i] > 0], fit)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_recovers_codes_in_an_orthonormal_dictionary(method, form):
    values, atoms = problem(n=24, d=24, rows=10)
    atoms = torch.linalg.qr(atoms).Q
    code = values * (values.abs() >= values.abs().topk(5).values[:, -1:])
    found = run(code @ atoms, atoms, 5, form, method=method, rtol=0).to_dense(24)
    torch.testing.assert_close(found, code, atol=FLOAT64_ATOL, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    d=st.integers(1, 12),
    rows=st.integers(1, 9),
    k=st.integers(1, 40),
    pursuit=st.sampled_from(PURSUITS),
    form=st.sampled_from(FORMS),
)
def test_invariants(seed, n, d, rows, k, pursuit, form):
    method, signed = pursuit
    x, atoms = problem(n, d, rows, seed=seed)
    k = min(k, n)
    options = dict(form=form, method=method, signed=signed)
    codes = run(x, atoms, k, **options)
    residual = x - codes.decode(atoms)
    norm = x.norm(dim=-1)

    assert codes.indices.shape == codes.values.shape == (rows, k)
    assert (codes.l0() <= k).all()
    assert (residual.norm(dim=-1) <= norm * (1 + 1e-9)).all()
    for row, value in zip(codes.indices, codes.values, strict=True):
        used = row[value != 0].tolist()
        assert len(set(used)) == len(used)
    if not signed:
        assert (codes.values >= 0).all()
    if method != "mp":
        inner = (atoms[codes.indices] @ residual[..., None]).squeeze(-1) * (codes.values != 0)
        # Near-dependent supports amplify rounding; 1e-6 is far below any coefficient that matters.
        assert (inner.abs() <= 1e-6 * norm[:, None]).all()
    if k > 1:
        fewer = run(x, atoms, k - 1, **options)
        # Non-negative OMP gives slots up for good; what OLS drops depends on how far it went before.
        if pursuit not in (("omp", False), ("ols", True)):
            before = (x - fewer.decode(atoms)).norm(dim=-1)
            assert (residual.norm(dim=-1) <= before + 1e-9 * norm).all()

    if method == "ols" and form != "compiled" and least_squares.most_held(k, n, d) >= d:
        return  # whatever comes last leaves nothing then, so that rounding decides what it is
    order = torch.randperm(rows)
    shuffled = run(x[order], atoms, k, **options)
    torch.testing.assert_close(shuffled.to_dense(n), codes.to_dense(n)[order], atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_ties_and_duplicates_go_to_the_lowest_index(method, form):
    # Small integers and unit vectors: every product is exact, so ties are ties in every form.
    atoms = torch.eye(4)[[0, 0, 1, 2, 1, 3]]
    x = torch.tensor([[2.0, 2.0, 0.0, 0.0], [0.0, -3.0, 3.0, 1.0]])
    codes = run(x, atoms, 6, form, method=method, rtol=0)
    assert codes.indices[0][codes.values[0] != 0].tolist() == [0, 2]
    assert codes.indices[1][codes.values[1] != 0].tolist() == [2, 3, 5]
    torch.testing.assert_close(codes.decode(atoms), x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("method", "signed"), PURSUITS)
def test_zero_gives_zero_and_an_atom_gives_itself(method, form, signed):
    x, atoms = problem(n=300, d=64, dtype=torch.float32)
    x = torch.cat([torch.zeros(1, 64), 100 * atoms[7:8], 1e-6 * atoms[5:6]])
    codes = run(x, atoms, 20, form, method=method, signed=signed)
    assert codes.l0().tolist() == [0, 1, 1]
    assert codes.indices[1:, 0].tolist() == [7, 5]
    torch.testing.assert_close(codes.values[1:, 0], torch.tensor([100.0, 1e-6]))


@pytest.mark.parametrize("method", METHODS)
def test_relative_residual_stops_early_and_independently_of_scale(method):
    x, atoms = problem()
    codes = run(x, atoms, 16, method=method, rtol=0.5)
    assert (codes.l0() < 16).all()
    residual = (x - codes.decode(atoms)).norm(dim=-1)
    assert (residual <= 0.5 * x.norm(dim=-1)).all()
    scaled = run(x * 2.0**20, atoms, 16, method=method, rtol=0.5)
    assert torch.equal(scaled.indices, codes.indices)


@pytest.mark.parametrize(("method", "signed"), [pursuit for pursuit in PURSUITS if pursuit[0] != "ols"])
@pytest.mark.parametrize("form", FORMS)
def test_threshold_ends_a_row_before_the_first_small_correlation(method, signed, form):
    x, atoms = problem(rows=30)
    threshold = 1.2
    found = run(x, atoms, 16, form, method=method, signed=signed, rtol=0, threshold=threshold)
    lengths = []
    for row in range(len(x)):
        one = x[row : row + 1]
        expected = torch.zeros(1, len(atoms), dtype=x.dtype)
        for steps in range(1, 17):
            correlations = (one - expected @ atoms) @ atoms.T
            if (correlations.abs() if signed else correlations).max() < threshold:
                break
            expected = run(one, atoms, steps, "gemm", method=method, signed=signed, rtol=0)
            expected = expected.to_dense(len(atoms))
        code = found.to_dense(len(atoms))[row]
        torch.testing.assert_close(code, expected[0], atol=FLOAT64_ATOL, rtol=0)
        lengths.append(int(found.l0()[row]))
    assert min(lengths) < max(lengths)  # the threshold ended some rows, not others


@pytest.mark.parametrize(("method", "signed"), PURSUITS)
@pytest.mark.parametrize("l0", [0.5, 4.0, 9.3])
def test_calibration_meets_the_mean(method, signed, l0):
    x, atoms = problem(n=300, d=40, rows=800, dtype=torch.float32)
    x = x * torch.linspace(0.2, 5, len(x))[:, None]  # some rows are worth more than others
    options = dict(method=method, signed=signed)
    gram = gram_matrix(atoms, **options)
    threshold = calibrate_threshold(x, atoms, l0, 30, gram=gram, **options)
    codes = encode(x, atoms, 30, threshold=threshold, gram=gram, **options)
    assert codes.l0().double().mean().item() == pytest.approx(l0, rel=0.01)
    fixed = encode(x, atoms, max(1, round(l0)), gram=gram, **options)
    if l0 > 1:  # what the rule is for: less error from as many nonzeros
        error, before = ((x - c.decode(atoms)).square().sum() for c in (codes, fixed))
        assert error < before
    assert threshold == calibrate_threshold(x, atoms, l0, 30, gram=gram, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(6))
def test_calibration_on_few_rows_takes_the_nearest_step(method, seed):
    """The mean L0 of twenty rows moves in steps of a twentieth, which no power law foretells."""
    x, atoms = problem(n=100, d=24, rows=20, seed=seed, dtype=torch.float32)
    threshold = calibrate_threshold(x, atoms, 3.3, 12, method=method)
    codes = encode(x, atoms, 12, method=method, threshold=threshold)
    assert codes.l0().double().mean().item() == pytest.approx(3.3, abs=0.051)


@pytest.mark.parametrize(("method", "signed"), PURSUITS)
@pytest.mark.parametrize("budget", [None, 60 * 50 * 2])  # whole Gram matrices, or rows, or none
def test_calibration_out_of_fold_codes_no_row_by_its_own_fold(method, signed, budget, monkeypatch):
    x, atoms = problem(n=70, d=24, rows=1200, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    folds = torch.randint(3, (len(x),), generator=generator)
    atom_folds = torch.randint(-1, 4, (len(atoms),), generator=generator)
    for fold in range(3):  # without that rule they need one nonzero fewer
        own = atoms[atom_folds == fold]
        x[folds == fold] += 10 * own.repeat(100, 1)[: (folds == fold).sum()]
    options = dict(method=method, signed=signed)
    if budget is not None:
        monkeypatch.setattr(calibration, "GRAM_BUDGET_BYTES", 3 * budget)
    threshold = calibrate_out_of_fold(x, folds, atoms, atom_folds, 4, 12, **options)
    l0s = []
    for fold in range(3):
        others = atoms[atom_folds != fold]
        l0s.append(encode(x[folds == fold], others, 12, threshold=threshold, **options).l0())
    assert torch.cat(l0s).double().mean().item() == pytest.approx(4, rel=0.01)
    everything = calibrate_threshold(x, atoms, 4, 12, **options)
    assert abs(everything / threshold - 1) > 0.05


def test_calibration_out_of_fold_is_calibration_where_no_atom_is_in_a_fold():
    x, atoms = problem(n=70, d=24, rows=1200, dtype=torch.float32)
    nowhere = torch.full((70,), -1)
    found = calibrate_out_of_fold(x, torch.zeros(1200, dtype=torch.long), atoms, nowhere, 4, 12)
    assert found == calibrate_threshold(x, atoms, 4, 12, gram=gram_matrix(atoms))


def test_calibration_out_of_fold_with_fewer_atoms_left_than_k():
    x, atoms = problem(n=8, d=24, rows=300, dtype=torch.float32)
    in_one = (torch.arange(8) > 3).long()
    found = calibrate_out_of_fold(x, torch.ones(300, dtype=torch.long), atoms, in_one, 2, 8)
    codes = encode(x, atoms[:4], 4, threshold=found)
    assert codes.l0().double().mean().item() == pytest.approx(2, rel=0.01)
    with pytest.raises(ValueError, match=r"k must be between 1 and the number of atoms \(8\), got 9"):
        calibrate_out_of_fold(x, in_one, atoms, in_one, 2, 9)
    with pytest.raises(ValueError, match="must leave atoms for the rows of fold 1, got all in it"):
        calibrate_out_of_fold(x, torch.ones(300).long(), atoms, torch.ones(8).long(), 2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 3), (2, 7), (9, 10), (10, 10)])
def test_leave_out(dtype, start, stop):
    whole = torch.arange(100).reshape(10, 10).to(dtype)
    kept = [i for i in range(10) if not start <= i < stop]
    assert torch.equal(leave_out(whole, start, stop), whole[kept][:, kept])


@pytest.mark.parametrize("method", METHODS)
def test_calibration_without_need(method):
    x, atoms = problem()
    assert calibrate_threshold(x, atoms, 5, 5, method=method) == 0
    # Rows that are atoms never need more than one.
    assert calibrate_threshold(3 * atoms, atoms, 4, 8, method=method) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(l0=0), "l0 must be above 0 and at most k=8, got 0"),
        (dict(l0=9), "at most k=8, got 9"),
        (dict(l0=float("nan")), "got nan"),
        (dict(x=torch.zeros(0, 16)), "x must have at least one row"),
        (dict(x=torch.zeros(2, 16)), "x must have a row that is not zero"),
        (dict(x=torch.full((2, 16), torch.inf)), "NaN or infinite"),
    ],
)
def test_calibration_of_bad_input(change, message):
    x, atoms = problem(dtype=torch.float32)
    arguments = dict(x=x, atoms=atoms, l0=4, k=8) | change
    with pytest.raises(ValueError, match=message):
        calibrate_threshold(**arguments)


@pytest.mark.parametrize(("method", "signed"), PURSUITS)
def test_k_equal_to_the_number_of_atoms_and_more_atoms_than_dimensions(method, signed):
    x, atoms = problem(n=30, d=6, rows=5)
    codes = run(x, atoms, 30, method=method, signed=signed, rtol=0)
    assert torch.isfinite(codes.values).all()
    if method == "omp" and signed:
        torch.testing.assert_close(codes.decode(atoms), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (2, 1, 3, 16), (0, 16), (2, 0, 16)])
def test_any_batch_shape(method, shape):
    _, atoms = problem()
    x = torch.randn(shape, dtype=torch.float64)
    codes = run(x, atoms, 4, method=method)
    assert codes.indices.shape == codes.values.shape == (*shape[:-1], 4)
    assert codes.decode(atoms).shape == shape
    flat = run(x.reshape(-1, 16), atoms, 4, method=method)
    assert torch.equal(codes.values.reshape(-1, 4), flat.values)


@pytest.mark.parametrize(("method", "signed"), PURSUITS)
@pytest.mark.parametrize("form", ["compiled", "gemm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(method, signed, form, dtype):
    x, atoms = problem(dtype=dtype)
    codes = run(x, atoms, 5, form, method=method, signed=signed)
    assert codes.values.dtype == torch.float32
    expected = run(x.float(), atoms.float(), 5, form, method=method, signed=signed)
    assert torch.equal(codes.values, expected.values)
    grams = [gram_matrix(rows, method=method, signed=signed) for rows in (atoms, atoms.float())]
    assert torch.equal(*grams)
    assert grams[0].dtype == grams[1].dtype


@pytest.mark.parametrize("method", METHODS)
def test_non_contiguous_rows_and_many_chunks(method):
    x, atoms = problem(rows=300)
    wide = torch.stack([x, x], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    torch.testing.assert_close(
        run(wide, atoms, 4, method=method).to_dense(60),
        torch.cat([run(row[None], atoms, 4, method=method).to_dense(60) for row in x]),
    )


@pytest.mark.parametrize(("method", "signed"), PURSUITS)
def test_gradients_given_the_support(method, signed):
    x, atoms = problem(n=20, d=8, rows=3)
    x.requires_grad_()
    atoms.requires_grad_()

    def dense(x, atoms):
        unit = torch.nn.functional.normalize(atoms, dim=1)
        return encode(x, unit, 3, method=method, signed=signed).to_dense(20)

    with torch.no_grad():
        plain = dense(x, atoms)
    assert torch.equal(dense(x, atoms), plain)
    assert torch.autograd.gradcheck(dense, (x, atoms))


def float64_search(x, atoms, k, method, signed=True, rtol=1e-3):
    """Picks and coefficients of the torch loops in float64, without a Gram matrix."""
    return SEARCH[method](x.double(), atoms.double(), None, k, signed, rtol, 0.0)


@pytest.mark.parametrize(("method", "signed"), PURSUITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "n", [1, 511, 1300]
)  # no multiple of the kernels' blocks; less than one; several
def test_compiled_picks_are_those_of_float64(method, signed, dtype, n):
    x, atoms = problem(n=n, d=48, rows=67, dtype=dtype)
    k = min(n, 20)
    gram = gram_matrix(atoms, method=method, signed=signed)
    assert gram.dtype == torch.int16
    picks, values = compiled.search(x, atoms, gram, Coding(k, method, signed))
    expected, coefficients = float64_search(x, atoms, k, method, signed)
    assert torch.equal(picks, expected)
    atol = FLOAT64_ATOL if dtype == torch.float64 else FLOAT32_ATOL
    torch.testing.assert_close(values.double(), coefficients, atol=atol, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_pursuit_follows_a_residual_far_below_the_precision_of_its_gram_matrix(method):
    x, atoms = problem(n=700, d=12, rows=20)
    gram = gram_matrix(atoms)
    # OLS holds up to 10 then; with 12, whatever comes last would leave nothing, and all atoms be equal.
    k = {"mp": 120, "omp": 12, "ols": 8}[method]
    picks, values = compiled.search(x, atoms, gram, Coding(k, method, rtol=1e-10))
    expected, coefficients = float64_search(x, atoms, k, method, rtol=1e-10)
    assert torch.equal(picks, expected)
    torch.testing.assert_close(values, coefficients, atol=FLOAT64_ATOL, rtol=0)
    left = x - SparseCodes(picks.clamp(min=0), values).decode(atoms)
    assert method == "ols" or (left.norm(dim=1) < 1e-6 * x.norm(dim=1)).all()


def test_compiled_omp_on_nearly_dependent_atoms_is_that_of_float64():
    # Coefficients a hundred times as large as the activation: their fixed point is a coarse one.
    x, atoms = problem(n=8, d=24, rows=40)
    twins = torch.nn.functional.normalize(atoms + 0.01 * x[:8], dim=1)
    x, atoms = x[8:], torch.cat([atoms, twins])
    picks, values = compiled.search(x, atoms, gram_matrix(atoms), Coding(16, "omp", rtol=0))
    expected, coefficients = float64_search(x, atoms, 16, "omp", rtol=0.0)
    assert torch.equal(picks, expected)
    assert values.abs().max() > 30
    torch.testing.assert_close(values, coefficients, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_pursuit_ends_where_nothing_is_left(method):
    x = torch.zeros(3, 8, dtype=torch.float64)
    x[0, 2], x[1, :3], x[2, :2] = 3.0, torch.tensor([0.1, -0.7, 0.3]), torch.tensor([1.0, 1e-9])
    atoms = torch.eye(8, dtype=torch.float64)
    picks, values = compiled.search(x, atoms, gram_matrix(atoms), Coding(5, method, rtol=0))
    dense = SparseCodes(picks.clamp(min=0), values).to_dense(8)
    torch.testing.assert_close(dense, x, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_compiled_omp_of_exact_codes_without_a_least_residual(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(10, 8, dtype=torch.float64)
    x[:, torch.randperm(8, generator=generator)[:3]] = torch.randn(
        10, 3, generator=generator, dtype=torch.float64
    )
    atoms = torch.eye(8, dtype=torch.float64)
    codes = encode(x, atoms, 5, method="omp", rtol=0.0, gram=gram_matrix(atoms))
    torch.testing.assert_close(codes.to_dense(8), x, atol=1e-14, rtol=0)


def test_gram_rows_made_in_inference_mode_serve_outside_and_under_autocast():
    x, atoms = problem(n=60, d=8, dtype=torch.float32)
    with torch.inference_mode():
        rows = gram_matrix(atoms, 20 * 60 * 2)
    assert isinstance(rows, GramRows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = encode(x, atoms, 5, gram=rows)
    assert torch.equal(codes.indices, run(x, atoms, 5).indices)


def test_interrupted_gram_rows_are_never_another_atom_s(monkeypatch):
    x, atoms = problem(n=60, d=8, dtype=torch.float32)
    rows = gram_matrix(atoms, 20 * 60 * 2)
    codes = encode(x, atoms, 5, gram=rows)
    with monkeypatch.context() as patch:
        patch.setattr(gram_rows, "fixed_point", interrupt)
        rows.turn += 1
        with pytest.raises(KeyboardInterrupt):
            rows.add((rows.slots < 0).nonzero().flatten()[:15])
    assert (rows.slots >= 0).sum() == 5
    again = encode(x, atoms, 5, gram=rows)
    assert torch.equal(again.values, codes.values)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("n_slots", [1, 2, 7])
def test_sums_of_packed_gram_rows_are_exact_up_to_the_stated_rounding_of_coefficients(n_slots):
    generator = np.random.default_rng(0)
    gram = generator.integers(-32767, 32768, (600, 600)).astype(np.int16)
    c = generator.normal(size=n_slots)
    c /= 30 * np.linalg.norm(c)  # so that no sum is above 1, as in a pursuit
    packed, packed_c = np.zeros((2, 4, 512), np.int32), np.full(4, 7, np.int32)
    for slot in range(n_slots):
        kernels.pack_row(packed, slot, gram, 20 * slot, 600)
    unit, lost = kernels.pack_coefficients(c, n_slots, 3.0, packed_c)
    rounded = np.rint(3 * c * unit)
    assert lost == pytest.approx(np.linalg.norm(rounded / unit - 3 * c), rel=1e-6)
    assert np.abs(rounded).max() <= 32767
    sums = np.empty((2, 512), np.int32)
    for block in range(2):
        kernels.packed_sums(sums[block], packed[block], packed_c, (n_slots + 1) // 2)
    expected = rounded @ gram[: 20 * n_slots : 20].astype(np.float64)
    assert np.array_equal(sums.flatten()[:600], expected)


def test_kernels_on_a_processor_without_vector_instructions_for_pairs_of_integers(tmp_path):
    x, atoms = problem(n=600, d=32, rows=10)
    torch.save((x, atoms), tmp_path / "problem.pt")
    script = (
        "import sys, torch\n"
        "from itda_lens.pursuit import encode, gram_matrix\n"
        "x, atoms = torch.load(sys.argv[1] + '/problem.pt')\n"
        "codes = encode(x, atoms, 9, method='ols', gram=gram_matrix(atoms))\n"
        "torch.save(codes.to_dense(600), sys.argv[1] + '/codes.pt')\n"
    )
    generic = dict(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, **generic}, check=True
    )
    codes = torch.load(tmp_path / "codes.pt")
    expected = run(x, atoms, 9, method="ols").to_dense(600)
    torch.testing.assert_close(codes, expected, atol=FLOAT64_ATOL, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_code_does_not_depend_on_what_is_computed_beside_it(method):
    x, atoms = problem(n=600, d=32, rows=50, dtype=torch.float32)
    larger = torch.cat([atoms, atoms[:40].flip(1)])
    corner = gram_matrix(larger)[:600, :600]
    inside = gram_matrix(larger.roll(40, dims=0))[40:, 40:]
    codes = run(x, atoms, 9, method=method)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        variants = [run(x, atoms, 9, method=method)]
    finally:
        torch.set_num_threads(threads)
    for gram in (corner, inside, corner.T):
        variants.append(encode(x, atoms, 9, method=method, gram=gram))
    rows = [run(row[None], atoms, 9, method=method) for row in x]
    variants.append(SparseCodes(*(torch.cat(parts) for parts in zip(*rows, strict=True))))
    for variant in variants:
        assert torch.equal(variant.indices, codes.indices)
        assert torch.equal(variant.values, codes.values)


@pytest.fixture(params=["older settings", "newer settings"])
def reduced_precision(request):
    """bfloat16 allowed in matrix products, by each of torch's ways to say so, which do not mix."""
    products = getattr(torch.backends.mkldnn, "matmul", None)
    if request.param == "older settings":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        yield torch.get_float32_matmul_precision
        torch.set_float32_matmul_precision(before)
    elif hasattr(products, "fp32_precision"):
        before = products.fp32_precision
        products.fp32_precision = "bf16"
        yield lambda: products.fp32_precision
        products.fp32_precision = before
    else:
        pytest.skip("this torch has the older settings only")


@pytest.mark.parametrize("method", METHODS)
def test_compiled_codes_survive_reduced_precision_of_matrix_products(method, reduced_precision):
    x, atoms = problem(n=600, d=32, rows=50, dtype=torch.float32)
    allowed = reduced_precision()
    codes = run(x, atoms, 9, method=method)
    assert reduced_precision() == allowed
    expected = encode(x.double(), atoms.double(), 9, method=method)
    assert torch.equal(codes.indices, expected.indices)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1e12, 1e19, 1e30])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("method", "signed"), PURSUITS)
def test_picks_do_not_depend_on_scale(method, signed, form, scale):
    x, atoms = problem(n=600, d=32, rows=20, dtype=torch.float32)
    options = dict(form=form, method=method, signed=signed)
    # The nearest power of two: every form then does the same arithmetic, but for exponents.
    scale = 2.0 ** round(math.log2(scale))
    for threshold in (0.0, 0.5):
        codes = run(x, atoms, 9, threshold=threshold, **options)
        scaled = run(x * scale, atoms, 9, threshold=threshold * scale, **options)
        assert torch.equal(codes.indices, scaled.indices)
        torch.testing.assert_close(scaled.values / scale, codes.values, rtol=1e-5, atol=0)


def test_numbers_whose_squares_overflow_are_refused():
    x, atoms = problem()
    with pytest.raises(ValueError, match=r"x must be at most 1e\+150 in size, got .*e\+160"):
        encode(x * 1e160, atoms, 3)


def test_without_numba_the_torch_loops_take_over(monkeypatch):
    x, atoms = problem(dtype=torch.float32)
    codes = run(x, atoms, 5)
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    assert gram_matrix(atoms).dtype == torch.float32
    torch.testing.assert_close(run(x, atoms, 5).to_dense(60), codes.to_dense(60), atol=1e-5, rtol=0)


INTERPRETED = """
import torch
from itda_lens.pursuit import Coding, PreparedAtoms, calibrate_threshold, encode

generator = torch.Generator().manual_seed(0)
x, atoms = (torch.randn(rows, 8, generator=generator) for rows in (40, 30))
atoms = torch.nn.functional.normalize(atoms, dim=1)
for method, signed in (("mp", True), ("omp", True), ("ols", True), ("mp", False), ("omp", False)):
    prepared = PreparedAtoms(atoms, Coding(4, method, signed))
    assert prepared.gram.dtype == torch.float32
    expected = encode(x, atoms, 4, method=method, signed=signed)
    torch.testing.assert_close(prepared.encode(x).to_dense(30), expected.to_dense(30))
    assert calibrate_threshold(x, atoms, 2, 4, method=method, signed=signed) > 0
"""


def test_numba_may_be_told_not_to_compile():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        env=dict(os.environ, NUMBA_DISABLE_JIT="1"), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0


@pytest.mark.parametrize("ending", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("content", [b"", b"x" * 3000, "half"])
def test_a_damaged_cache_of_compiled_loops_is_replaced(ending, content, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def loaded():
        kernels._tell.cache_clear()
        function = kernels.jit(kernels.squared_norm.py_func)
        assert function(np.arange(4.0)) == 14
        return sum(function.stats.cache_hits.values())

    assert loaded() == 0
    assert loaded() == 1
    (file,) = tmp_path.rglob(ending)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert loaded() == 0
    assert "cannot be read" in caplog.text
    assert loaded() == 1


def test_a_full_disk_stops_no_loop(tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    kernels._tell.cache_clear()
    assert kernels.jit(kernels.squared_norm.py_func)(np.arange(4.0)) == 14
    assert "cannot be written" in caplog.text


def test_fixed_point_products_keep_their_stated_error():
    _, atoms = problem(n=300, d=24)
    fixed = inner_products(atoms, atoms, torch.int16).double() / 32767
    assert (fixed - atoms @ atoms.T).abs().max() <= 1.6e-5


def test_decode_is_differentiable():
    x, atoms = problem(n=20, d=8, rows=3)
    codes = encode(x, atoms, 3)
    values = codes.values.clone().requires_grad_()
    atoms = atoms.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, a: codes._replace(values=v).decode(a), (values, atoms))


def test_gram_respects_its_budget(monkeypatch):
    _, atoms = problem()
    assert isinstance(gram_matrix(atoms, 60 * 60 * 2), torch.Tensor)
    assert len(gram_matrix(atoms, 60 * 60 * 2 - 1)) == 59
    monkeypatch.setitem(methods.PURSUITS, "omp", replace(methods.PURSUITS["omp"], loop=None))
    assert isinstance(gram_matrix(atoms, 60 * 60 * 8, method="omp"), torch.Tensor)
    assert gram_matrix(atoms, 60 * 60 * 8 - 1, method="omp") is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("capacity", [12, 40, 599])
def test_codes_do_not_depend_on_how_many_gram_rows_fit(method, capacity):
    x, atoms = problem(n=600, d=32, rows=150, dtype=torch.float32)
    codes = run(x, atoms, 9, method=method)
    rows = gram_matrix(atoms, capacity * 600 * 2, method=method)
    for _ in range(2):  # empty; then with rows of the first time
        found = encode(x, atoms, 9, method=method, gram=rows)
        assert torch.equal(found.indices, codes.indices)
        assert torch.equal(found.values, codes.values)
    held = (rows.slots >= 0).nonzero().flatten()
    assert len(held) <= capacity == len(rows)
    expected = inner_products(atoms[held], atoms, torch.int16)
    # Products of some rows may be summed in another order than those of all.
    assert (rows.rows[rows.slots[held]].int() - expected.int()).abs().max() <= 1


def test_gram_rows_that_are_still_there_are_not_computed_again(monkeypatch):
    x, atoms = problem(n=600, d=32, rows=50, dtype=torch.float32)
    rows = gram_matrix(atoms, 500 * 600 * 2)
    encode(x, atoms, 9, gram=rows)
    computed = []
    monkeypatch.setattr(rows, "add", lambda missing: computed.extend(missing.tolist()))
    encode(x, atoms, 9, gram=rows)
    assert not computed


def test_gram_rows_unused_for_longest_make_room():
    _, atoms = problem(n=10, d=8)
    rows = gram_matrix(atoms, 4 * 10 * 2)
    rows.turn = 1
    rows.add(torch.tensor([3, 5]))
    rows.turn = 2
    rows.add(torch.tensor([7, 1]))
    rows.used[rows.slots[3]] = rows.turn = 3
    rows.add(torch.tensor([0]))
    assert (rows.slots >= 0).nonzero().flatten().tolist() == [0, 1, 3, 7]


def test_a_copy_of_gram_rows_begins_empty():
    x, atoms = problem(n=60, d=8)
    rows = gram_matrix(atoms, 20 * 60 * 2)
    codes = encode(x, atoms, 5, gram=rows)
    copied = copy.deepcopy(rows)
    assert len(copied) == 20
    assert (copied.slots == -1).all()
    assert torch.equal(encode(x, atoms, 5, gram=copied).values, codes.values)


def test_gram_rows_without_room_for_one_code():
    x, atoms = problem(n=60, d=8)
    with pytest.raises(ValueError, match="room for at least 5 rows at k=5, got 4"):
        encode(x, atoms, 5, gram=gram_matrix(atoms, 4 * 60 * 2))
    with pytest.raises(ValueError, match="room for at least 7 rows at k=5, got 6"):
        encode(x, atoms, 5, method="ols", gram=gram_matrix(atoms, 6 * 60 * 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(k=0), ValueError, "k must be at least 1, got 0"),
        (dict(k=61), ValueError, r"between 1 and the number of atoms \(60\), got 61"),
        (dict(method="lasso"), ValueError, "method must be one of .* got 'lasso'"),
        (dict(method="ols", signed=False), ValueError, "'mp' or 'omp' for signed=False, got 'ols'"),
        (dict(rtol=-0.1), ValueError, "rtol must be at least 0"),
        (dict(threshold=-1.0), ValueError, "threshold must be at least 0 and finite, got -1"),
        (dict(threshold=float("nan")), ValueError, "threshold must be at least 0 and finite, got nan"),
        (dict(x=torch.zeros(3, 17)), ValueError, "16 numbers per row .* got \\(3, 17\\)"),
        (
            dict(x=torch.zeros(3, 16, dtype=torch.long)),
            TypeError,
            "x must be a dense tensor of float16, .* got torch.int64",
        ),
        (dict(x=torch.zeros(3, 16).to(torch.float8_e4m3fn)), TypeError, "x must be .*float8_e4m3fn"),
        (dict(x=torch.eye(16).to_sparse()), TypeError, "x must be a dense .* layout torch.sparse_coo"),
        (dict(x=torch.zeros(3, 16, dtype=torch.complex64)), TypeError, "x must be .*complex64"),
        (dict(x=np.zeros((3, 16))), TypeError, "x must be a dense tensor .*, got ndarray"),
        (dict(atoms=torch.eye(16).to_sparse()), TypeError, "atoms must be .* torch.sparse_coo"),
        (
            dict(x=torch.zeros(3, 16, device="meta")),
            ValueError,
            "atoms must be on the device of x, meta",
        ),
        (dict(x=torch.full((3, 16), torch.nan)), ValueError, "NaN or infinite values, first in row 0"),
        (dict(x=torch.eye(16) / torch.eye(16)[3]), ValueError, "NaN or infinite"),
        (dict(gram=torch.zeros(3, 3)), ValueError, "gram must have shape"),
        (dict(atoms=torch.zeros(3)), ValueError, "atoms must have shape"),
    ],
)
def test_bad_input(change, error, message):
    x, atoms = problem(dtype=torch.float32)
    arguments = dict(x=x, atoms=atoms, k=3) | change
    with pytest.raises(error, match=message):
        encode(arguments.pop("x"), arguments.pop("atoms"), arguments.pop("k"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=0), "k must be at least 1, got 0"),
        (dict(k=-3), "k must be at least 1, got -3"),
        (dict(k=True), "k must be a whole number, at least 1, got True"),
        (dict(k=3.0), "k must be a whole number, at least 1, got 3.0"),
        (dict(k="3"), "k must be a whole number, at least 1, got '3'"),
        (dict(k=None), "k must be a whole number, at least 1, got None"),
        (dict(method="lasso"), r"method must be one of \('mp', 'omp', 'ols'\), got 'lasso'"),
        (dict(method=None), "method must be one of .*, got None"),
        (dict(method=["mp"]), r"method must be one of .*, got \['mp'\]"),
        (dict(signed=1), "signed must be True or False, got 1"),
        (dict(signed="no"), "signed must be True or False, got 'no'"),
        (dict(method="ols", signed=False), "method must be 'mp' or 'omp' for signed=False, got 'ols'"),
        (dict(rtol=1), "rtol must be at least 0 and below 1, got 1.0"),
        (dict(rtol=math.nan), "rtol must be at least 0 and below 1, got nan"),
        (dict(rtol="0.1"), "rtol must be a number, at least 0 and below 1, got '0.1'"),
        (dict(rtol=False), "rtol must be a number, at least 0 and below 1, got False"),
        (dict(threshold=-1), "threshold must be at least 0 and finite, got -1.0"),
        (dict(threshold=math.inf), "threshold must be at least 0 and finite, got inf"),
        (dict(threshold=None), "threshold must be a number, at least 0 and finite, got None"),
        (dict(threshold=1j), "threshold must be a number, at least 0 and finite, got 1j"),
    ],
)
def test_bad_coding(change, message):
    with pytest.raises(ValueError, match=message):
        Coding(**(dict(k=3, method="mp") | change))


def test_coding_takes_numpy_s_numbers_and_holds_python_s():
    coding = Coding(np.int64(3), "mp", np.bool_(False), np.float32(0.5), np.float64(2))
    assert coding == Coding(3, "mp", False, 0.5, 2.0)
    assert [type(value) for value in vars(coding).values()] == [int, str, bool, float, float]
    coding.check_atoms(3)
    with pytest.raises(ValueError, match=r"k must be between 1 and the number of atoms \(2\), got 3"):
        coding.check_atoms(2)
    with pytest.raises(ValueError, match="k must be between 1 and d_sae=2, got 3"):
        coding.check_atoms(2, "d_sae")


def test_a_new_pursuit_is_one_row(monkeypatch):
    def first(x, atoms, gram, k, signed, rtol, threshold):
        """The first atom, whatever x is."""
        picks = torch.full((len(x), k), -1)
        picks[:, 0] = 0
        coefficients = x.new_zeros(len(x), k)
        coefficients[:, 0] = x @ atoms[0]
        return picks, coefficients

    row = replace(methods.PURSUITS["mp"], search=first, loop=None, on_gpu=None, nonnegative=False)
    monkeypatch.setitem(methods.PURSUITS, "first", row)
    x, atoms = problem(dtype=torch.float32)
    prepared = PreparedAtoms(atoms, Coding(4, "first"))
    assert prepared.gram.dtype == torch.float32
    rows = x.clone().requires_grad_()
    codes = prepared.encode(rows)
    assert torch.equal(codes.values[:, 0].detach(), x @ atoms[0])
    codes.values.sum().backward()
    torch.testing.assert_close(rows.grad, atoms[0].expand_as(x))
    with pytest.raises(ValueError, match="method must be 'mp' or 'omp' for signed=False, got 'first'"):
        Coding(4, "first", signed=False)


def test_every_pursuit_has_a_row():
    assert get_args(Method) == tuple(methods.PURSUITS) == METHODS
    for name in METHODS:
        assert Coding(3, name).method == name
    for call in (gram_matrix, lambda atoms, method: encode(atoms, atoms, 3, method=method)):
        with pytest.raises(ValueError, match="method must be one of .* got 'lasso'"):
            call(torch.eye(4), method="lasso")


@pytest.mark.parametrize(("method", "signed"), PURSUITS)
@pytest.mark.parametrize("budget", [None, 60 * 60, 10])  # a whole Gram matrix, some rows, or too few
def test_prepared_atoms_and_parts_of_them(method, signed, budget, monkeypatch):
    x, atoms = problem(dtype=torch.float32)
    coding = Coding(6, method, signed, threshold=0.1)
    options = dict(method=method, signed=signed, threshold=0.1)
    if budget == 10 and methods.PURSUITS[method].has_loop(signed):
        with pytest.raises(ValueError, match="gram must have room for at least"):
            PreparedAtoms(atoms, coding, budget)
        return
    prepared = PreparedAtoms(atoms, coding, budget)
    fresh = gram_matrix(atoms, budget, method=method, signed=signed)
    assert torch.equal(prepared.encode(x).values, encode(x, atoms, 6, gram=fresh, **options).values)
    indices = torch.randperm(60)[:50]
    if isinstance(prepared.gram, torch.Tensor):
        monkeypatch.setattr("itda_lens.pursuit.prepared.gram_matrix", None)  # none is computed again
    cut = torch.cat([atoms[:7], atoms[20:]])
    for part, own in (
        (prepared.keeping(indices), atoms[indices]),
        (prepared.without(7, 20), cut),
        (prepared.keeping(indices[:4]), atoms[indices[:4]]),
    ):
        assert torch.equal(part.atoms, own)
        assert len(part) == len(own)
        assert part.coding == replace(coding, k=min(6, len(own)))
        expected = encode(x, own, part.coding.k, **options)
        torch.testing.assert_close(part.encode(x).to_dense(len(own)), expected.to_dense(len(own)))
    fewer = prepared.with_coding(replace(coding, k=2, threshold=0.0))
    assert fewer.gram is prepared.gram
    assert fewer.encode(x).l0().max() == 2


def test_another_pursuit_gets_its_own_gram_matrix(monkeypatch):
    only_signed = replace(methods.PURSUITS["omp"].loop, nonnegative=False)
    monkeypatch.setitem(methods.PURSUITS, "omp", replace(methods.PURSUITS["omp"], loop=only_signed))
    _, atoms = problem(dtype=torch.float32)
    prepared = PreparedAtoms(atoms, Coding(6, "omp"))
    other = prepared.with_coding(Coding(6, "omp", signed=False))
    assert (prepared.gram.dtype, other.gram.dtype) == (torch.int16, torch.float32)
    with pytest.raises(ValueError, match="int16 does not serve method='omp', signed=False"):
        PreparedAtoms.with_gram(atoms, Coding(6, "omp", signed=False), prepared.gram)
    with pytest.raises(ValueError, match="k must be between"):
        prepared.with_coding(Coding(61))
    with pytest.raises(ValueError, match="k must be between"):
        PreparedAtoms(atoms, Coding(61))
    with pytest.raises(ValueError, match="k must be at least 1"):
        prepared.keeping(torch.arange(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_first_nonfinite_row(dtype):
    largest = torch.finfo(dtype).max
    x = torch.ones(50, 8, dtype=dtype)
    assert first_nonfinite_row(x) is None
    x[7] = largest  # a sum that overflows
    x[8, ::2], x[8, 1::2] = largest, -largest
    assert first_nonfinite_row(x) is None
    x[40, 3] = torch.nan
    assert first_nonfinite_row(x) == 40
    x[30, 0], x[30, 1] = torch.inf, -torch.inf
    assert first_nonfinite_row(x) == 30
    assert first_nonfinite_row(x[:0]) is None


@pytest.mark.parametrize("share", [1.01, 1.03, 1.1])
def test_calibration_gives_up_soon_where_the_mean_cannot_be_had(share, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 16, generator=generator)
    atoms = torch.nn.functional.normalize(torch.randn(64, 16, generator=generator), dim=-1)
    most = encode(x, atoms, 8, rtol=0.5).l0().double().mean().item()
    trials = []

    plain = PreparedAtoms.encode

    def counted(self, x):
        trials.append(len(x))
        return plain(self, x)

    monkeypatch.setattr(PreparedAtoms, "encode", counted)
    assert calibrate_threshold(x, atoms, share * most, 8, rtol=0.5) == 0
    assert sum(n == 2000 for n in trials) < 25


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="this torch has the older settings only"
)
def test_precision_that_is_inherited_goes_on_being_inherited():
    products = torch.backends.mkldnn.matmul
    before = torch.backends.fp32_precision, products.fp32_precision
    try:
        products.fp32_precision = "none"
        for allowed in ("bf16", "ieee"):
            torch.backends.fp32_precision = allowed
            precision.float32_products(torch.randn(3, 2), torch.randn(4, 2))
            assert products.fp32_precision == allowed
    finally:
        torch.backends.fp32_precision, products.fp32_precision = before


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def half_products():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


AROUND = dict(
    autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    half_products=half_products,
    default_float64=lambda: default_dtype(torch.float64),
    default_float16=lambda: default_dtype(torch.float16),
)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("method", "signed"), PURSUITS)
@pytest.mark.parametrize("around", AROUND)
def test_settings_around_a_pursuit_do_not_matter(around, method, signed, form, gradients):
    x, atoms = problem(n=60, d=16, dtype=torch.float32)

    def everything():
        rows = x.clone().requires_grad_(gradients)
        matrix = gram_matrix(atoms, method=method, signed=signed)
        if form == "gram":
            matrix = inner_products(atoms, atoms, torch.float32)
        gram = None if form == "gemm" else matrix
        codes = encode(rows, atoms, 9, method=method, signed=signed, gram=gram)
        return matrix, *codes, codes.decode(atoms)

    expected = everything()
    with AROUND[around]():
        found = everything()
    for wanted, got in zip(expected, found, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_codes_of_nearly_dependent_atoms_under_autocast_with_gradients():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(6, 64, generator=generator)
    data = torch.randn(2064, 6, generator=generator) @ basis
    data = data + 0.02 * torch.randn(data.shape, generator=generator)
    x, atoms = data[:64], torch.nn.functional.normalize(data[64:], dim=1)
    for method in METHODS:
        with torch.autocast("cpu", torch.bfloat16):
            codes = encode(x.clone().requires_grad_(), atoms, 16, method=method)
        left = (x - codes.decode(atoms)).square().sum() / (x - x.mean(0)).square().sum()
        assert left < 1e-3


@pytest.mark.parametrize(("method", "signed"), PURSUITS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_change_no_bit_of_a_code(method, signed, form):
    x, atoms = problem(n=600, d=32, rows=50, dtype=torch.float32)
    options = dict(form=form, method=method, signed=signed)
    plain = run(x, atoms, 9, **options)
    with_gradients = run(x.clone().requires_grad_(), atoms, 9, **options)
    assert torch.equal(with_gradients.indices, plain.indices)
    assert torch.equal(with_gradients.values, plain.values)


def test_precision_is_given_back_when_threads_overlap_and_after_errors():
    torch.set_float32_matmul_precision("medium")
    try:
        inside, leave = threading.Event(), threading.Event()
        cpu = torch.device("cpu")

        def stay():
            with precision.full_precision(cpu):
                inside.set()
                leave.wait()

        thread = threading.Thread(target=stay)
        with precision.full_precision(cpu):
            thread.start()
            inside.wait()
        assert not thread.join(0.01)
        leave.set()
        thread.join()
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError), precision.full_precision(cpu):
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_whole_gram_matrices_are_mirror_images():
    _, atoms = problem(n=700, d=20, dtype=torch.float32)
    table = gram_matrix(atoms)
    assert torch.equal(table, table.T)
    whole = inner_products(atoms, atoms, torch.int16)
    assert (table - whole).abs().max() <= 1  # products of other shapes may round otherwise
    assert (table.diagonal() >= 32766).all()


FORKED = """
import os, threading, torch
from itda_lens.pursuit import encode, gram_matrix, precision

atoms = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
x, gram = torch.randn(20, 8), gram_matrix(atoms)
before = encode(x, atoms, 4, gram=gram)
held = threading.Event()


def hold():  # as a thread that encodes does
    with precision._switching:
        held.set()
        threading.Event().wait()


threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    same = torch.equal(encode(x, atoms, 4, gram=gram).values, before.values)
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_encodes_too():
    # Workers that load data are forked, and have none of their parent's threads.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED],
        env=dict(os.environ, OMP_NUM_THREADS="1"), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0

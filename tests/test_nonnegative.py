"""Non-negative OMP: the compiled loop, the torch form, and a slow loop over scipy's least squares."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from itda_lens.pursuit import Coding, SparseCodes, compiled, encode, gram_matrix, kernels, orthogonal

FORMS = ("compiled", "gram", "gemm")


def problem(n=300, d=24, rows=40, dtype=torch.float64, seed=0):
    """Atoms and rows that share a direction, so that many coefficients meet the constraint."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.3
    x = torch.randn(rows, d, generator=generator, dtype=torch.float64) + 0.2
    return x.to(dtype), torch.nn.functional.normalize(atoms, dim=1).to(dtype)


def run(x, atoms, k, form="compiled", **options):
    compiled_gram = gram_matrix(atoms, method="omp", signed=False)
    assert compiled_gram.dtype == torch.int16
    gram = dict(compiled=compiled_gram, gram=atoms @ atoms.T, gemm=None)[form]
    return encode(x, atoms, k, method="omp", signed=False, gram=gram, **options)


def slow(x, atoms, k, rtol, least=1e-12):
    """Codes by the definition: the best new atom, then the fit on all picks.

    And how often an atom that a fit had dropped came back.
    """
    codes, came_back = np.zeros((len(x), len(atoms))), 0
    atoms = atoms.double().numpy()
    for i, row in enumerate(x.double().numpy()):
        picked: list[int] = []
        coefficients = np.zeros(0)
        for _ in range(k):
            residual = row - coefficients @ atoms[picked]
            correlations = atoms @ residual
            correlations[picked] = -np.inf
            best = int(correlations.argmax())
            if correlations[best] <= least * np.linalg.norm(row):
                break
            if np.linalg.norm(residual) <= rtol * np.linalg.norm(row):
                break
            dropped = coefficients == 0
            picked.append(best)
            coefficients, _ = nnls(atoms[picked].T, row)
            came_back += int((coefficients[:-1][dropped] > 0).sum())
        codes[i, picked] = coefficients
    return torch.from_numpy(codes), came_back


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 7, 20])
def test_it_equals_the_slow_loop(form, k):
    x, atoms = problem()
    expected, came_back = slow(x, atoms, k, rtol=1e-3)
    found = run(x, atoms, k, form).to_dense(len(atoms))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    if k == 20:
        assert ((found != 0).sum(dim=1) < k).double().mean() > 0.5  # fits drop atoms
        assert came_back > 0  # and take some back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 511, 1300])  # no multiple of the kernels' blocks; several
def test_compiled_picks_are_those_of_float64(dtype, n):
    x, atoms = problem(n=n, d=48, rows=67, dtype=dtype)
    k = min(n, 20)
    gram = gram_matrix(atoms, method="omp", signed=False)
    picks, values = compiled.search(x, atoms, gram, Coding(k, "omp", signed=False))
    expected, coefficients = orthogonal.search(x.double(), atoms.double(), None, k, False, 1e-3, 0.0)
    assert torch.equal(picks, expected)
    atol = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(values.double(), coefficients, atol=atol, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_ties_and_duplicates_go_to_the_lowest_index(form):
    atoms = torch.eye(4)[[0, 0, 1, 2, 1, 3]]  # every product is exact, so that ties are ties
    x = torch.tensor([[2.0, 2.0, 0.0, 0.0], [0.0, -3.0, 3.0, 1.0], [-1.0, -1.0, -1.0, -1.0]])
    codes = run(x, atoms, 6, form, rtol=0)
    used = [row[values != 0].tolist() for row, values in zip(*codes, strict=True)]
    assert used == [[0, 2], [3, 5], []]


@pytest.mark.parametrize("form", FORMS)
def test_nearly_dependent_atoms(form):
    x, atoms = problem(n=8, d=24, rows=40)
    twins = torch.nn.functional.normalize(atoms + 0.01 * x[:8], dim=1)
    atoms = torch.cat([atoms, twins, atoms])
    found = run(x[8:], atoms, 24, form, rtol=0).to_dense(24)
    expected, _ = slow(x[8:], atoms[:16], 16, rtol=0)
    assert not found[:, 16:].any()
    torch.testing.assert_close(found[:, :16], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("capacity", [20, 120])
def test_codes_do_not_depend_on_how_many_gram_rows_fit_or_on_threads(capacity):
    x, atoms = problem(n=600, d=32, rows=150, dtype=torch.float32)
    codes = run(x, atoms, 15)
    rows = gram_matrix(atoms, capacity * 600 * 2, method="omp", signed=False)
    threads = torch.get_num_threads()
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            found = encode(x, atoms, 15, method="omp", signed=False, gram=rows)
            assert torch.equal(found.indices, codes.indices)
            assert torch.equal(found.values, codes.values)
    finally:
        torch.set_num_threads(threads)
    alone = [run(row[None], atoms, 15) for row in x]
    assert torch.equal(torch.cat([one.values for one in alone]), codes.values)


@pytest.mark.parametrize("form", FORMS)
def test_threshold_and_scale(form):
    x, atoms = problem(dtype=torch.float32)
    codes = run(x, atoms, 12, form, threshold=0.5)
    larger = run(1024 * x, atoms, 12, form, threshold=512.0)
    assert torch.equal(codes.indices, larger.indices)
    assert torch.equal(1024 * codes.values, larger.values)
    assert codes.l0().min() < codes.l0().max()
    residual = x - codes.decode(atoms)
    dense = codes.to_dense(len(atoms))
    wanted = (residual @ atoms.T).masked_fill(dense > 0, 0)
    ended_early = codes.l0() < run(x, atoms, 12, form).l0()
    assert ended_early.any()
    assert (wanted[ended_early] < 0.5 + 1e-4).all()


def test_the_fit_within_the_loop_is_that_of_scipy():
    """`_constrain` alone, on problems in which a fit drops several atoms and takes some back."""
    generator = np.random.default_rng(0)
    changed = 0
    for _ in range(300):
        atoms = generator.normal(size=(7, 8)) + 0.4
        row = generator.normal(size=8)
        products, targets = atoms @ atoms.T, atoms @ row
        before, _ = nnls(atoms[:6].T, row)
        if targets[6] - products[6, :6] @ before <= 1e-6:
            continue  # the pursuit would not have picked it
        positive, c = np.append(before > 0, True), np.append(before, 0.0)
        inverse, fit = np.zeros((7, 7)), np.zeros(7)
        assert kernels._factorise(products, positive, inverse, 1e-12, 7)
        kernels._solve(inverse, targets, positive, fit, 7)
        step = (fit - c)[6] / inverse[6, 6]
        c[:] = fit
        changed += kernels._constrain(products, targets, positive, c, inverse, step, 1e-12, 1e-12, 7)
        expected, _ = nnls(atoms.T, row)
        np.testing.assert_allclose(c, expected, atol=1e-9)
        np.testing.assert_array_equal(positive, expected > 0)
    assert changed > 30


def test_gradients_and_decoding():
    x, atoms = problem(rows=5, n=30)
    x.requires_grad_(True)
    codes = run(x, atoms, 6)
    assert (codes.values >= 0).all()
    reconstruction = SparseCodes(codes.indices, codes.values).decode(atoms)
    reconstruction.square().sum().backward()
    # The reconstruction is a projection, so the gradient of its square is twice itself.
    torch.testing.assert_close(x.grad, 2 * reconstruction.detach())

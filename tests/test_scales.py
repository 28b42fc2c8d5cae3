"""Activations of any size: coded as a float64 pursuit codes them at size 1, or refused at once."""

import warnings

import pytest
import torch
from torch import Tensor

from itda_lens import ITDA, ITDAConfig
from itda_lens.pursuit import PURSUITS, encode, gram_matrix

D_IN, D_SAE, K = 16, 40, 5
KINDS = [("mp", True), ("mp", False), ("omp", True), ("omp", False), ("ols", True)]
HALVES = [torch.float16, torch.bfloat16]
SIZES = {
    torch.float64: [1e140, 1e19, 1e-22, 1e-40, 1e-150, 1e-300],
    torch.float32: [1e33, 1e19, 1e-22, 1e-36, 1e-40],
    torch.bfloat16: [1e33, 1e19, 1e-22, 1e-36],
    torch.float16: [1e4, 1e-3],
}


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


ATOMS = torch.nn.functional.normalize(drawn(D_SAE, D_IN, seed=1), dim=1)
ROWS = drawn(8, D_IN, seed=2)
ROWS[3] = 0


def at_size_one(
    x: Tensor, sizes: Tensor, atoms: Tensor, method: str, signed: bool, threshold: float = 0.0
) -> Tensor:
    """Dense codes by the torch form in float64, of rows that are divided by their sizes first."""
    rows = (x.double().T / sizes).T
    picks, values = PURSUITS[method].search(rows, atoms.double(), None, K, signed, 1e-3, threshold)
    dense = rows.new_zeros(len(x), len(atoms) + 1)
    dense.scatter_add_(1, picks.masked_fill(picks < 0, len(atoms)), values)
    return (dense[:, :-1].T * sizes).T


def assert_rows_close(found: Tensor, wanted: Tensor, x: Tensor, tolerance: float) -> None:
    """Each row of codes within a share of the size of its own activation."""
    sizes = x.double().abs().amax(dim=-1).clamp(min=1e-320)
    errors = (found.double() - wanted).abs().amax(dim=-1)
    assert (errors <= tolerance * sizes).all(), (errors / sizes).tolist()


@pytest.mark.parametrize("form", ["compiled", "float", "none"])
@pytest.mark.parametrize(("method", "signed"), KINDS)
@pytest.mark.parametrize("dtype", SIZES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_pursuit(dtype, method, signed, form):
    """Whole batches of one size, and rows of several sizes beside ordinary and zero ones."""
    atoms = ATOMS.to(torch.promote_types(dtype, torch.float32))
    gram = gram_matrix(atoms, method=method, signed=signed) if form == "compiled" else None
    gram = atoms @ atoms.T if form == "float" else gram
    mixed = ROWS.clone()
    for row, size in zip((0, 2, 4, 5, 6, 7), SIZES[dtype], strict=False):
        mixed[row] *= size
    coding = dict(method=method, signed=signed, gram=gram)
    # float32 has 16 binary digits left for 1e-40.
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for size in SIZES[dtype]:
        x = (ROWS * size).to(dtype)
        sizes = torch.full((len(x),), size, dtype=torch.float64)
        for share in (0.0, 0.7):
            found = encode(x, atoms, K, threshold=share * size, **coding).to_dense(D_SAE)
            wanted = at_size_one(x, sizes, atoms, method, signed, share)
            assert_rows_close(found, wanted, x, tolerance)
            assert not found[3].any()
    x = mixed.to(dtype)
    sizes = x.double().abs().amax(dim=-1).masked_fill(mixed.amax(dim=-1) == 0, 1)
    found = encode(x, atoms, K, **coding).to_dense(D_SAE)
    assert_rows_close(found, at_size_one(x, sizes, atoms, method, signed), x, tolerance)


def test_thresholds_that_no_square_fits():
    for method in ("mp", "omp", "ols"):
        for gram in (None, gram_matrix(ATOMS, method=method)):
            codes = encode(ROWS, ATOMS, K, method=method, gram=gram, threshold=1e300)
            assert not codes.values.any()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e34), (torch.bfloat16, 1e34)])
def test_too_large_is_told(dtype, most):
    with pytest.raises(ValueError, match=r"x must be at most 1e\+34 in size, got"):
        encode((ROWS * most * 10).to(dtype), ATOMS.float(), K)


def dictionary(dtype: torch.dtype, **settings) -> ITDA:
    itda = ITDA(ITDAConfig(d_in=D_IN, d_sae=D_SAE, k=K, method="ols", **settings))
    with torch.no_grad():
        itda.W_dec.copy_(ATOMS)
    return itda.to(dtype)


@pytest.mark.parametrize("way", ["encode", "encode_sparse", "forward", "calibrate"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_dictionary_in_half_precision(dtype, way):
    """Activations of a wider dtype that it cannot hold are refused, all or none of them being zero."""
    itda = dictionary(dtype)
    run = {"calibrate": lambda x: itda.calibrate(x, 2.0)}.get(way) or getattr(itda, way)
    large, small = (1e5, 1e-22) if dtype == torch.float16 else (1e39, 1e-42)
    x = ROWS.float() if dtype == torch.float16 else ROWS
    with pytest.raises(ValueError, match=r"x must be at most .* in size for a dictionary in b?float16"):
        run(x * large)
    with pytest.raises(ValueError, match=r"x must be at least .* in size for a dictionary in b?float16"):
        run(x * small)
    x[5] *= small  # one among others becomes zero
    if way == "encode":
        assert not itda.encode(x)[5].any()
    run(x)
    run(torch.zeros_like(x[:2])) if way != "calibrate" else None


def test_coefficients_that_float16_cannot_hold():
    itda = dictionary(torch.float16)
    x = (60_000 * ATOMS[:1] / ATOMS[0].abs().max()).float()
    assert itda.encode_sparse(x).values.max() > 65_504
    with pytest.raises(ValueError, match="coefficients must be at most 6.55e.04 in size for a dict"):
        itda.encode(x)
    assert itda(x).isfinite().all()


@pytest.mark.parametrize("size", [1e19, 1.0, 1e-22, 1e-36])
@pytest.mark.parametrize("way", ["constant_norm_rescale", "layer_norm"])
def test_normalised_activations(way, size):
    """SAELens's normalisations at any size, with a zero row among the others."""
    itda = dictionary(torch.float32, normalize_activations=way)
    exact = dictionary(torch.float64, normalize_activations=way)
    if way == "layer_norm":
        size = max(size, 1.0)  # its epsilon is 1e-5: smaller ones are not normalised
    x = (ROWS * size).float()
    out = itda(x)
    assert_rows_close(out, exact(x.double()), x, 1e-5)
    assert not out[3].any()
    codes = itda.encode(x)
    ordinary = itda.encode(ROWS.float())
    torch.testing.assert_close(codes, ordinary, atol=2e-2 if way == "layer_norm" else 1e-4, rtol=1e-3)


def test_normalisation_in_half_precision():
    """Activations whose norms float16 cannot hold."""
    itda = dictionary(torch.float16, normalize_activations="constant_norm_rescale")
    x = (ROWS * 20_000).clamp(-60_000, 60_000).half()
    assert (x.float().norm(dim=-1) > 65_504).any()
    error = (itda(x).float() - x.float()).norm() / x.float().norm()
    assert 0 < error < 0.7


@pytest.mark.parametrize("norm", [1e-29, 1e-20, 1e20, 1e29])
def test_atoms_of_any_norm(norm):
    """Atoms that folding or training made long or short, all of them or one."""
    wanted, x = dictionary(torch.float32)(ROWS.float()), ROWS.float()
    for rows in (slice(None), slice(3, 4)):
        itda = dictionary(torch.float32)
        itda.W_dec.data[rows] *= norm
        torch.testing.assert_close(itda(x), wanted, atol=1e-4, rtol=1e-4)
        itda.W_dec.data[rows] *= 1e6 if norm > 1 else 1e-6
        if norm in (1e-29, 1e29):
            with pytest.raises(ValueError, match="W_dec must have rows of zeros, or of norms between"):
                itda(x)
    itda.W_dec.data[:] = ATOMS
    itda.W_dec.data[3] = 0
    assert itda(x).isfinite().all()


def test_weights_that_are_not_finite_are_named():
    itda = dictionary(torch.float32)
    for name in ("b_dec", "W_dec"):
        getattr(itda, name).data.flatten()[2] = torch.nan
        with pytest.raises(ValueError, match=f"{name} has NaN or infinite values"):
            itda(ROWS.float())
        getattr(itda, name).data.flatten()[2] = 0


def test_tensors_that_are_none_of_the_dictionary():
    itda, x = dictionary(torch.float32), ROWS.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: a prototype
        nested = torch.nested.nested_tensor([x[:2], x[:3]], layout=torch.strided)
    with pytest.raises(TypeError, match="x must be a dense tensor .*, got a nested tensor"):
        itda.encode(nested)
    with pytest.raises(ValueError, match="x must be on the device of the dictionary, cpu, got meta"):
        itda.encode(x.to("meta"))
    with pytest.raises(TypeError, match="W_dec must be a Parameter, got NoneType"):
        itda.W_dec = None
    codes = itda.encode_sparse(x)
    with pytest.raises(ValueError, match="codes must have indices and values of one shape"):
        itda.decode_sparse(codes._replace(values=codes.values[:, :2]))

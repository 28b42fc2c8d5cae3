"""torch.func, forward-mode and second derivatives of codes and reconstructions, against differences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from itda_lens import ITDA, ITDAConfig
from itda_lens.pursuit import PreparedAtoms, encode, gram_matrix

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own forward mode

D_IN, D_SAE, STEP = 4, 8, 1e-6
KINDS = [("mp", True), ("mp", False), ("omp", True), ("omp", False), ("ols", True)]
ROWS = torch.randn(2, D_IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def atoms_of(dtype=torch.float64) -> Tensor:
    drawn = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=1).to(dtype)


def differences(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian of a function at x, by central differences: of shape [*output, *x.shape]."""
    steps = STEP * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    columns = [(function(x + step) - function(x - step)) / (2 * STEP) for step in steps]
    return torch.stack(columns, dim=-1).unflatten(-1, x.shape)


def assert_derivatives(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Each way to a first or second derivative of `function` gives what differences give."""
    first = differences(function, x)
    assert first.abs().max() > 0.1
    along = torch.tensordot(first, x, dims=x.ndim)

    def forward_mode() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent

    ways = [jacrev(function)(x), jacfwd(function)(x), torch.autograd.functional.jacobian(function, x)]
    for found in ways:
        torch.testing.assert_close(found, first, atol=1e-6, rtol=1e-5)
    for found in (jvp(function, (x,), (x,))[1], forward_mode()):
        torch.testing.assert_close(found, along, atol=1e-6, rtol=1e-5)

    def cubes(x: Tensor) -> Tensor:
        return function(x).pow(3).sum()

    second = differences(grad(cubes), x)
    ways = [hessian(cubes), jacrev(jacrev(cubes)), jacrev(jacfwd(cubes)), jacfwd(jacfwd(cubes))]
    ways += [lambda x: torch.autograd.functional.hessian(cubes, x)]
    for way in ways:
        torch.testing.assert_close(way(x), second, atol=1e-4, rtol=1e-4)


def assert_mapped(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """`vmap` gives what a loop gives, nested, beside derivatives, and over any dimension."""
    wanted = torch.stack([function(row) for row in x])
    torch.testing.assert_close(vmap(function)(x), wanted)
    twice = torch.stack([x, 2 * x], dim=1)
    both = torch.stack([function(x), function(2 * x)], dim=1)
    torch.testing.assert_close(vmap(function, in_dims=1, out_dims=1)(twice), both)
    torch.testing.assert_close(vmap(vmap(function))(twice), both)

    def cubes(row: Tensor) -> Tensor:
        return function(row).pow(3).sum()

    torch.testing.assert_close(vmap(grad(cubes))(x), torch.stack([grad(cubes)(row) for row in x]))


@pytest.mark.parametrize("form", ["compiled", "float", "none"])
@pytest.mark.parametrize(("method", "signed"), KINDS)
def test_pursuits(method, signed, form):
    atoms = atoms_of()
    gram = gram_matrix(atoms, method=method, signed=signed) if form == "compiled" else None
    gram = atoms @ atoms.T if form == "float" else gram

    def dense(x: Tensor, atoms: Tensor = atoms) -> Tensor:
        return encode(x, atoms, 3, method=method, signed=signed, gram=gram).to_dense(D_SAE)

    assert_derivatives(dense, ROWS)
    assert_mapped(dense, ROWS)


def dictionary(method, signed, **settings) -> ITDA:
    cfg = ITDAConfig(
        d_in=D_IN, d_sae=D_SAE, k=3, method=method, signed=signed, dtype="float64", **settings
    )
    itda = ITDA(cfg)
    with torch.no_grad():
        itda.b_dec.copy_(0.1 * torch.randn(D_IN))
        itda.W_dec.copy_(atoms_of())
    return itda


@pytest.mark.parametrize("settings", [{}, dict(threshold=0.5), dict(normalize_activations="layer_norm")])
@pytest.mark.parametrize(("method", "signed"), KINDS)
def test_dictionaries(method, signed, settings):
    itda = dictionary(method, signed, **settings)
    for function in (itda.encode, itda, itda.nonnegative()):
        assert_mapped(function, ROWS)
    assert_derivatives(itda, ROWS)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("method", "signed"), KINDS)
def test_by_the_weights(method, signed, scaled):
    """Atoms of any norm: what a longer atom explains is what the atom explains."""
    itda = dictionary(method, signed)
    weights = atoms_of() * (torch.rand(D_SAE, 1, dtype=torch.float64) + 0.5 if scaled else 1)

    def reconstruction(atoms: Tensor) -> Tensor:
        return functional_call(itda, {"W_dec": atoms}, (ROWS,))

    assert_derivatives(reconstruction, weights)
    with pytest.raises(ValueError, match="vmap must not map over the atoms"):
        vmap(reconstruction)(weights[None])
    assert itda(ROWS).isfinite().all()  # nothing that was prepared inside is left behind


def test_atoms_prepared_inside():
    atoms = atoms_of()

    def coded(x: Tensor) -> Tensor:
        gram = gram_matrix(torch.nn.functional.normalize(atoms + 0 * x[:1], dim=1), method="omp")
        return encode(x, atoms, 3, method="omp", gram=gram).to_dense(D_SAE)

    torch.testing.assert_close(jacrev(coded)(ROWS), differences(coded, ROWS), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="vmap must not map over the atoms"):
        vmap(gram_matrix)(atoms[None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("method", "signed"), KINDS)
def test_values_are_the_same_bits(method, signed, dtype):
    """Whoever asks for derivatives gets the codes and sums that others get."""
    itda = dictionary(method, signed).to(dtype)
    x = ROWS.to(dtype)
    with torch.no_grad():
        codes, out = itda.encode(x), itda(x)
    for transformed in (lambda f: vmap(f)(x), lambda f: jvp(f, (x,), (x,))[0], lambda f: f(x)):
        assert torch.equal(transformed(itda.encode), codes)
        assert torch.equal(transformed(itda), out)


def test_errors_inside_a_transform():
    itda = dictionary("ols", True)
    bad = ROWS.clone()
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match="x has NaN or infinite values, first in row 1"):
        vmap(itda)(bad)
    with pytest.raises(ValueError, match="x has NaN or infinite values, first in row 1"):
        grad(lambda x: itda(x).sum())(bad)


def test_rows_of_a_table_that_does_not_hold_all():
    atoms = atoms_of()
    from itda_lens.pursuit import Coding

    prepared = PreparedAtoms(atoms, Coding(3, "ols"), budget_bytes=D_SAE * 2 * 6)
    assert_mapped(lambda x: prepared.encode(x).to_dense(D_SAE), ROWS)

"""The compiled pursuit for GPUs: on a GPU where there is one, otherwise in Triton's interpreter."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from packaging.version import Version

import itda_lens
from itda_lens.pursuit import PURSUITS, encode, gpu, gram, gram_matrix, matching
from itda_lens.pursuit.fixed_point import fixed_point

triton = pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

INTERPRETED = [
    # numpy, in the interpreter, for sums and maxima of lanes that hold no number
    "ignore:.*encountered in:RuntimeWarning",
]
pytestmark = [pytest.mark.filterwarnings(warning) for warning in INTERPRETED]


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Data on DEVICE go to the kernel, on a CPU too."""
    monkeypatch.setattr(gpu, "serves", lambda device: device.type == DEVICE.type)
    gpu._works.cache_clear()
    yield
    gpu._works.cache_clear()


def problem(n=300, d=24, b=6, dtype=torch.float32):
    atoms = torch.nn.functional.normalize(torch.randn(n, d, dtype=dtype), dim=1)
    return torch.randn(b, d, dtype=dtype).to(DEVICE), atoms.to(DEVICE)


def expected(x, atoms, k, signed=True, rtol=1e-3, threshold=0.0):
    return matching.search(x.double(), atoms.double(), None, k, signed, rtol, threshold)


def assert_same(found, reference, x):
    assert torch.equal(found[0], reference[0])
    assert found[1].dtype == x.dtype
    scale = x.double().norm(dim=1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(
        found[1] / scale, reference[1] / scale, atol=1e-6, rtol=0, check_dtype=False
    )


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("n", "d", "k"),
    [(300, 24, 7), (1025, 33, 12), (1024, 16, 5), (40, 7, 1), (9, 5, 9), (1, 3, 1), (2500, 8, 20)],
)
def test_picks_are_those_of_a_float64_pursuit(n, d, k, signed):
    x, atoms = problem(n, d)
    found = gpu.search(x, atoms, fixed_point(atoms, atoms), k, signed, 1e-3, 0.0)
    assert_same(found, expected(x, atoms, k, signed), x)


def test_float64_atoms_and_rows():
    x, atoms = problem(dtype=torch.float64)
    found = gpu.search(x, atoms, fixed_point(atoms, atoms), 8, True, 1e-3, 0.0)
    reference = expected(x, atoms, 8)
    assert torch.equal(found[0], reference[0])
    torch.testing.assert_close(found[1], reference[1], atol=1e-12, rtol=0)


def test_correlations_are_computed_anew_when_the_residual_is_small():
    # In few dimensions the residual of a long pursuit is far below the rounding of the Gram matrix.
    x, atoms = problem(n=60, d=3, b=2, dtype=torch.float64)
    picks, coefficients = gpu.search(x, atoms, fixed_point(atoms, atoms), 24, True, 0.0, 0.0)
    reference = expected(x, atoms, 24, rtol=0.0)
    assert torch.equal(picks[:, :10], reference[0][:, :10])
    residual = x.clone()
    for t in range(24):
        residual -= coefficients[:, t, None] * atoms[picks[:, t].clamp(min=0)]
    assert (residual.norm(dim=1) < 1e-9 * x.norm(dim=1)).all()


def test_ties_and_duplicates_go_to_the_lowest_atom():
    x, atoms = problem(n=50, d=6)
    atoms = torch.cat([atoms, atoms, atoms])
    x = torch.cat([x, 3 * atoms[70:72], -atoms[[149]]])
    picks, coefficients = gpu.search(x, atoms, fixed_point(atoms, atoms), 6, True, 1e-3, 0.0)
    assert picks.max() < 50
    assert picks[-3:, 0].tolist() == [20, 21, 49]
    assert (picks[-3:, 1:] == -1).all()
    assert (coefficients[-3:, 1:] == 0).all()


@pytest.mark.parametrize("place", [200, 10 + gpu.LANES])
def test_what_the_gram_matrix_cannot_tell_apart_is_settled_in_float64(place):
    # Two atoms whose correlations differ by 1e-9; rounding the Gram matrix may change them by 1e-5. They
    # are in different lanes, or in one.
    _, atoms = problem(n=place + 3, d=12, dtype=torch.float64)
    p, w = torch.eye(12, dtype=torch.float64, device=DEVICE)[:2]
    atoms[:, :2] = 0
    atoms /= atoms.norm(dim=1, keepdim=True)
    atoms[[10, place]] = torch.stack([p * (1 - 1e-12) ** 0.5 + 1e-6 * w, p])
    x = 5 * atoms[[7]] + p - 1e-3 * w
    x = torch.cat([x, x + 2e-3 * w])
    found = gpu.search(x, atoms, fixed_point(atoms, atoms), 2, True, 1e-3, 0.0)[0]
    assert found.tolist() == [[7, place], [7, 10]]


def test_zero_rows_thresholds_and_tolerances():
    x, atoms = problem()
    x[2] = 0
    threshold = expected(x, atoms, 8)[1].abs()[0, 4].item() * 1.0001
    for rtol, least in ((1e-3, threshold), (0.6, 0.0)):
        found = gpu.search(x, atoms, fixed_point(atoms, atoms), 8, True, rtol, least)
        assert_same(found, expected(x, atoms, 8, rtol=rtol, threshold=least), x)
        assert (found[0][2] == -1).all()
    stopped = gpu.search(x, atoms, fixed_point(atoms, atoms), 8, True, 1e-3, threshold)[0]
    assert (stopped[0] >= 0).sum() == 4


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_picks_do_not_depend_on_scale(scale):
    x, atoms = problem()
    table = fixed_point(atoms, atoms)
    assert torch.equal(
        *(gpu.search(rows, atoms, table, 8, True, 1e-3, 0.0)[0] for rows in (x, x * scale))
    )


def test_corners_of_larger_gram_matrices_and_strided_inputs():
    x, atoms = problem()
    larger = torch.zeros(400, 400, dtype=torch.int16, device=DEVICE)
    larger[:300, :300] = fixed_point(atoms, atoms)
    reference = expected(x, atoms, 5)
    for table in (larger[:300, :300], larger[:300, :300].T):
        assert_same(gpu.search(x, atoms, table, 5, True, 1e-3, 0.0), reference, x)
    wide = torch.stack([x, x], dim=2)[:, :, 0]
    assert_same(gpu.search(wide, atoms, fixed_point(atoms, atoms), 5, True, 1e-3, 0.0), reference, x)


def test_encode_runs_the_kernel(monkeypatch):
    x, atoms = problem()
    calls = []
    counted = replace(PURSUITS["mp"], on_gpu=lambda *args: calls.append(1) or gpu.search(*args))
    monkeypatch.setitem(PURSUITS, "mp", counted)
    table = gram_matrix(atoms)
    assert isinstance(table, torch.Tensor)
    assert table.dtype == torch.int16
    found = encode(x.requires_grad_(), atoms, 6, gram=table)
    assert calls == [1]
    exact = encode(x.detach().double(), atoms.double(), 6)
    assert torch.equal(found.indices, exact.indices)
    found.values.sum().backward()
    assert x.grad is not None
    assert gram_matrix(atoms, budget_bytes=1000) is None  # then the GEMM form
    assert gram_matrix(atoms, method="omp").dtype == torch.float32


def test_dictionaries_run_on_it(monkeypatch):
    x = torch.randn(600, 16).to(DEVICE)
    with monkeypatch.context() as patch:
        if DEVICE.type == "cpu":  # all of `fit` would take minutes in the interpreter
            patch.setattr(gpu, "serves", lambda device: False)
        itda = itda_lens.fit(x, d_sae=48, k=4, method="mp")
    codes = itda.encode_sparse(x[:20])
    assert itda._prepared.gram.dtype == torch.int16
    weights = itda.W_dec.double()
    exact = encode((x[:20] - itda.b_dec).double(), weights / weights.norm(dim=1, keepdim=True), 4)
    assert torch.equal(codes.indices, exact.indices)


def test_a_kernel_that_fails_or_is_wrong_is_not_used(monkeypatch, caplog):
    x, atoms = problem()
    reference = expected(x, atoms, 5)

    def failing(*args):
        raise RuntimeError("no ptxas")

    def wrong(*args):
        return matching.search(args[0] * 2, args[1], None, *args[3:])

    for search, message in ((failing, "no ptxas"), (wrong, "computes other codes")):
        monkeypatch.setattr(gpu, "search", search)
        gpu._works.cache_clear()
        caplog.clear()
        table = gram_matrix(atoms)
        assert table.dtype == torch.float32
        assert message in caplog.text
        codes = encode(x, atoms, 5, gram=table)
        torch.testing.assert_close(codes.values.sum(1).double(), reference[1].sum(1), atol=1e-5, rtol=0)


def test_the_kernel_is_tried_for_each_kind_of_problem(monkeypatch):
    tried = []
    search = gpu.search
    monkeypatch.setattr(
        gpu, "search", lambda x, *args: tried.append((x.shape[1], x.dtype)) or search(x, *args)
    )
    for d, dtype in ((6, torch.float32), (6, torch.float64), (9, torch.float32), (6, torch.float32)):
        assert gram_matrix(problem(n=10, d=d, dtype=dtype)[1]).dtype == torch.int16
    each = [(6, torch.float32), (6, torch.float64), (9, torch.float32)]
    assert tried == [kind for kind in each for _ in ("signed", "unsigned")]


def test_memory_that_is_short_says_nothing_about_the_kernel(monkeypatch):
    def short(*args):
        raise torch.cuda.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "search", short)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            gram_matrix(problem()[1])
    assert gram_matrix(problem()[1]).dtype == torch.int16


def test_rows_on_demand_are_for_cpus(monkeypatch):
    monkeypatch.setattr(gpu, "serves", lambda device: False)
    x, atoms = problem()
    rows = gram.GramRows(atoms.cpu(), 300 * 2 * 20)
    monkeypatch.setattr(gpu, "serves", lambda device: True)
    with pytest.raises(ValueError, match="gram must be a tensor on a GPU, got GramRows"):
        encode(x, atoms, 5, gram=rows)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from itda_lens.pursuit import gpu, triton_kernels

kernel = triton_kernels.matching_rows
for capability, width, real, signed in (
    (80, 1024, "*fp32", True), (90, 4096, "*fp64", False), (90, gpu.WIDEST, "*fp32", True)
):
    types = dict(correlations="*fp32", x=real, energies="*fp64", atoms=real, gram="*i16", picks="*i64",
                 coefficients="*fp64", n="i32", d="i32", k="i32", pitch="i32", rtol="*fp64",
                 threshold="*fp64", error_0="*fp64", error_g="*fp64")
    constants = dict(SIGNED=signed, GRAM_SCALE=32767, REFRESH=4, ROUNDING=2.4e-7,
                     BLOCK=gpu.LANES, BLOCK_D=width, ROWS=max(1, gpu.TILE // width))
    signature = types | dict.fromkeys(constants, "constexpr")
    assert list(signature) == kernel.arg_names
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, places),
                              target=GPUTarget("cuda", capability, 32),
                              options=dict(num_warps=gpu.WARPS))
    print(len(compiled.asm["cubin"]))
"""


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.9"), reason="the compiler's own interface changes"
)
def test_the_kernel_compiles_to_machine_code_without_a_gpu(tmp_path):
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(size) > 1000 for size in done.stdout.split()] == 3 * [True]

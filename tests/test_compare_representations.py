"""CKA, SVCCA, regression and relative representations: closed forms, references, invariances."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import LinearRegression

from itda_lens.compare import (
    Moments,
    RunningMoments,
    RunningRelative,
    layer_matching_accuracy,
    linear_cka,
    linear_regression_r2,
    relative_representation,
    relative_similarity,
    similarity_matrix,
    svcca,
)

EXACT = 1e-9
"""Both sides are computed in float64; only the order of sums differs."""

MEASURES = {
    "cka": lambda x, y: linear_cka(Moments.of(x, y)),
    "svcca": lambda x, y: svcca(Moments.of(x, y)),
    "regression": lambda x, y: linear_regression_r2(Moments.of(x, y)),
    "relative": relative_similarity,
}


def related(n=200, d_x=7, d_y=5, noise=0.5, seed=0):
    """Two views of the same tokens, off centre, of uneven scale."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x = draw(n, d_x) * torch.linspace(0.2, 3, d_x) + 5
    return x, x @ draw(d_x, d_y) + noise * draw(n, d_y) - 2


def rotation(d, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def test_cka_is_the_kernel_form():
    """HSIC of the linear kernels, with the centring matrix written out."""
    x, y = related()
    centre = torch.eye(200, dtype=torch.float64) - 1 / 200
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert linear_cka(Moments.of(x, y)) == pytest.approx(expected.item(), abs=EXACT)


def test_cka_closed_form():
    """Two orthogonal coordinates of variance ratio s^2, one of which is kept: 1 / sqrt(1 + s^-4)."""
    x = torch.tensor([[3.0, 1], [3, -1], [-3, 1], [-3, -1]], dtype=torch.float64)
    assert linear_cka(Moments.of(x, x[:, :1])) == pytest.approx(1 / math.sqrt(1 + 3**-4), abs=EXACT)
    assert linear_cka(Moments.of(x[:, :1], x[:, 1:])) == pytest.approx(0, abs=EXACT)


def test_regression_is_least_squares():
    x, y = related()
    fitted = LinearRegression().fit(x.numpy(), y.numpy())
    error = y - torch.from_numpy(fitted.predict(x.numpy()))
    expected = 1 - error.square().sum() / (y - y.mean(dim=0)).square().sum()
    assert linear_regression_r2(Moments.of(x, y)) == pytest.approx(expected.item(), abs=EXACT)
    assert linear_regression_r2(Moments.of(y, x)) != pytest.approx(expected.item(), abs=0.01)


def test_cca_is_sklearns():
    x, y = related(d_x=4, d_y=3)
    a, b = CCA(n_components=3, scale=False, max_iter=20_000, tol=1e-14).fit_transform(
        x.numpy(), y.numpy()
    )
    expected = np.mean([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(3)])
    # An iterative solver, which stops when it moves by less than its tolerance.
    assert svcca(Moments.of(x, y), keep=1.0) == pytest.approx(expected, abs=1e-5)


def test_svcca_drops_small_components():
    generator = torch.Generator().manual_seed(0)
    shared, *others = torch.randn(3, 400, 1, generator=generator, dtype=torch.float64)
    x, y = (torch.cat([10 * shared, 0.1 * other], dim=1) for other in others)
    assert svcca(Moments.of(x, y)) == pytest.approx(1, abs=1e-3)
    assert svcca(Moments.of(x, y), keep=1.0) < 0.6


def test_relative_closed_form():
    anchors = torch.tensor([[2.0, 0], [0, 5]])
    x = torch.tensor([[1.0, 0], [1, 1]])
    half = math.sqrt(0.5)
    expected = torch.tensor([[1.0, 0], [half, half]], dtype=torch.float64)
    torch.testing.assert_close(relative_representation(x, anchors), expected)
    # The second model swaps the two directions of the first token only.
    running = RunningRelative([anchors], [anchors])
    running.update([x], [torch.tensor([[0.0, 1], [1, 1]])])
    assert running.values().item() == pytest.approx((0 + 1) / 2)
    shifted = relative_representation(x + 7, anchors + 7, centred=True)
    torch.testing.assert_close(shifted, relative_representation(x, anchors, centred=True))


@pytest.mark.parametrize("name", MEASURES)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_invariances(name, scale, seed):
    """To scaling and rotation of either side, and to the order of the coordinates."""
    x, y = related(seed=seed)
    measure = MEASURES[name]
    expected = measure(x, y)
    assert measure(scale * x @ rotation(7, seed), y) == pytest.approx(expected, abs=1e-6)
    assert measure(x, scale * y @ rotation(5, seed)) == pytest.approx(expected, abs=1e-6)
    assert measure(x[:, torch.randperm(7)], y) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["cka", "svcca", "regression"])
def test_the_order_of_tokens_and_the_origin_do_not_matter(name):
    x, y = related()
    order = torch.randperm(len(x))
    assert MEASURES[name](x[order] + 100, y[order] - 3) == pytest.approx(MEASURES[name](x, y), abs=1e-8)


@pytest.mark.parametrize("name", MEASURES)
def test_ends_of_the_scale(name):
    """One for a rotated copy; less for noise than for relatives; between 0 and 1."""
    x, y = related()
    noise = torch.randn(200, 5, dtype=torch.float64)
    measure = MEASURES[name]
    assert measure(x, x @ rotation(7)) == pytest.approx(1, abs=1e-6)
    assert 0 <= measure(x, noise) < measure(x, y) <= 1


def test_cca_and_regression_do_not_see_an_invertible_map():
    x, y = related()
    mixed = x @ (torch.randn(7, 7, dtype=torch.float64) + 3 * torch.eye(7, dtype=torch.float64))
    assert linear_regression_r2(Moments.of(mixed, y)) == pytest.approx(
        linear_regression_r2(Moments.of(x, y)), abs=1e-6
    )
    assert svcca(Moments.of(mixed, y), keep=1) == pytest.approx(
        svcca(Moments.of(x, y), keep=1), abs=1e-6
    )
    assert linear_cka(Moments.of(mixed, y)) != pytest.approx(linear_cka(Moments.of(x, y)), abs=0.01)
    # Nor an outlier coordinate, as residual streams have them.
    large = x * torch.tensor([1e4] + [1.0] * 6)
    assert linear_regression_r2(Moments.of(large, y)) == pytest.approx(
        linear_regression_r2(Moments.of(x, y)), abs=1e-6
    )
    assert svcca(Moments.of(large, y), 1.0) == pytest.approx(svcca(Moments.of(x, y), 1.0), abs=1e-6)


@pytest.mark.parametrize("batch", [1, 64, 200])
def test_streams_of_several_layers(batch):
    """Whatever the batches, and far from the origin: what the whole tensors give, pair by pair."""
    x, y = related()
    xs, ys = [x, 1e4 + x[:, :3]], [y, y[:, :2], x + 1e4]
    running = RunningMoments()
    for start in range(0, 200, batch):
        running.update(
            [part[start : start + batch] for part in xs], [p[start : start + batch] for p in ys]
        )
    for i, left in enumerate(xs):
        for j, right in enumerate(ys):
            found, expected = running.pair(i, j), Moments.of(left, right)
            assert found.n == expected.n == 200
            for mine, whole in zip(found[1:], expected[1:], strict=True):
                torch.testing.assert_close(mine, whole, rtol=1e-7, atol=1e-6)
    relative = RunningRelative([x[:20], x[20:40]], [y[:20]])
    for rows, others in zip(x.split(batch), y.split(batch), strict=True):
        relative.update([rows, rows], [others])
    for i, anchors in enumerate((x[:20], x[20:40])):
        whole = RunningRelative([anchors], [y[:20]])
        whole.update([x], [y])
        assert relative.values()[i, 0].item() == pytest.approx(whole.values().item(), abs=EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_only_rounded_once(dtype):
    x, y = (part.to(dtype) for part in related())
    for measure in MEASURES.values():
        assert measure(x, y) == pytest.approx(measure(x.double(), y.double()), abs=EXACT)


def test_degenerate_sides_are_zero():
    constant, x = torch.ones(10, 3), torch.randn(10, 2)
    for measure in (linear_cka, svcca, linear_regression_r2):
        assert measure(Moments.of(constant, x)) == 0
        assert measure(Moments.of(x, constant)) == 0
    assert relative_similarity(torch.zeros(10, 3), x) == 0
    # A coordinate that repeats another, or nearly, is not counted twice.
    doubled = torch.cat([x, x, x + 1e-9], dim=1)
    assert linear_regression_r2(Moments.of(doubled, x)) == pytest.approx(1)
    assert svcca(Moments.of(doubled, x), keep=1.0) == pytest.approx(1)


def test_layer_matching():
    layers = [torch.randn(300, 6, dtype=torch.float64) for _ in range(4)]
    rotated = [layer @ rotation(6, i) for i, layer in enumerate(layers)]
    matrix = similarity_matrix(layers, rotated, MEASURES["cka"])
    assert matrix.shape == (4, 4)
    assert layer_matching_accuracy(matrix) == 1
    assert layer_matching_accuracy(matrix[[1, 0, 2, 3]]) == 0.5
    # Ties share the hit: of equal layers, each is as likely to be the one.
    assert layer_matching_accuracy(torch.ones(4, 4)) == 0.25
    assert layer_matching_accuracy(torch.tensor([[1.0, 1.0], [0.0, 2.0]])) == 0.75


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Moments.of(torch.randn(3, 2), torch.randn(4, 2)), "of the same n >= 1 tokens"),
        (lambda: Moments.of(torch.randn(0, 2), torch.randn(0, 2)), "of the same n >= 1 tokens"),
        (lambda: Moments.of(torch.full((3, 2), math.nan), torch.randn(3, 2)), "must be finite"),
        (lambda: RunningMoments().pair(0, 0), "call update first"),
        (lambda: RunningMoments().update([], [torch.randn(3, 2)]), "xs and ys must have a layer each"),
        (
            lambda: svcca(Moments.of(torch.randn(3, 2), torch.randn(3, 2)), keep=0),
            "keep must be above 0",
        ),
        (lambda: relative_similarity(torch.randn(3, 2), torch.randn(4, 2)), "of the same n >= 1 tokens"),
        (
            lambda: relative_similarity(torch.randn(3, 2), torch.randn(3, 2), n_anchors=0),
            "n_anchors must",
        ),
        (lambda: RunningRelative([torch.randn(3, 2)], [torch.randn(2, 2)]), "anchors_y must be"),
        (lambda: layer_matching_accuracy(torch.ones(2, 3)), "one to one"),
        (lambda: layer_matching_accuracy(torch.full((2, 2), math.nan)), "must not hold NaN"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_stream_cannot_change_its_layers():
    running = RunningMoments()
    running.update([torch.randn(5, 3)], [torch.randn(5, 2)])
    with pytest.raises(ValueError, match="those of the first batch"):
        running.update([torch.randn(5, 4)], [torch.randn(5, 2)])
    relative = RunningRelative([torch.randn(5, 3)], [torch.randn(5, 2)])
    with pytest.raises(ValueError, match="those of the anchors, got widths"):
        relative.update([torch.randn(5, 3)] * 2, [torch.randn(5, 2)])

"""Similarity of representations: CKA, SVCCA, regression, relative representations.

These measures compare activations directly, without dictionaries; label similarity is compared with
them. Both sides must be activations of the same tokens.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itda_lens.compare.moments import Moments, check_layers
from itda_lens.pursuit import first_nonfinite_row
from itda_lens.records import at_least, checked

RANK_TOLERANCE = 1e-12
"""Eigenvalues below this share of the largest count as no variance. A coordinate that repeats another is
off by rounding of float32, 1e-7 of its size, and the square of that counts here. The limit is low enough
for the rest of a residual stream to count beside outlier coordinates a thousand times larger."""

DEFAULT_ANCHORS = 256
"""Number of anchor tokens."""


@checked
def linear_cka(moments: Moments) -> float:
    """||X^T Y||^2 / (||X^T X|| ||Y^T Y||), Frobenius norms (Kornblith et al. 2019).

    It does not change if either side is rotated, or scaled as a whole. It is 0 if a side does not vary.
    """
    scale = moments.xx.norm() * moments.yy.norm()
    return _share(moments.xy.square().sum(), scale)


@checked
def svcca(moments: Moments, keep: float = 0.99) -> float:
    """Mean canonical correlation of the leading principal components (Raghu et al. 2017).

    As in Kornblith et al. (2019), each side keeps the fewest components that hold the share `keep` of
    its variance, and the sum of the canonical correlations is divided by the smaller number of
    components. The result does not change with rotation or scaling. With keep=1 it is CCA, which does
    not change with any invertible linear map.

    Raises:
        ValueError: `keep` is not in (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
    x, y = _whitening(moments.xx, keep), _whitening(moments.yy, keep)
    fewest = min(x.shape[1], y.shape[1])
    if fewest == 0:
        return 0.0
    correlations = torch.linalg.svdvals(x.T @ moments.xy @ y).clamp(max=1)
    return (correlations.sum() / fewest).item()


@checked
def linear_regression_r2(moments: Moments) -> float:
    """R^2 of the best linear map from X to Y, over all coordinates of Y (Kornblith et al. 2019).

    It is measured on the tokens that the map was fitted on, so give many more tokens than X is wide. It
    is not symmetric. It does not change with any invertible linear map of X, or with rotation or scaling
    of Y.
    """
    explained = (_whitening(moments.xx, 1.0).T @ moments.xy).square().sum()
    return _share(explained, moments.yy.trace())


@checked
def relative_representation(
    x: Float[Tensor, "n d"], anchors: Float[Tensor, "m d"], centred: bool = False
) -> Float[Tensor, "n m"]:
    """Cosines of activations with anchors (Moschella et al. 2022), in float64 inside.

    Args:
        centred: subtract the mean of the anchors first; the paper does not.

    Raises:
        ValueError: no rows, NaN or infinite values, or different widths.
    """
    for name, rows in (("x", x), ("anchors", anchors)):
        if len(rows) == 0 or first_nonfinite_row(rows) is not None:
            raise ValueError(f"{name} must be one row or more of finite numbers")
    if x.shape[1] != anchors.shape[1]:
        raise ValueError(f"x and anchors must be of one width, got {x.shape[1]} and {anchors.shape[1]}")
    x, anchors = x.double(), anchors.double()
    if centred:
        centre = anchors.mean(dim=0)
        x, anchors = x - centre, anchors - centre
    return _unit(x) @ _unit(anchors).T


class RunningRelative:
    """Mean cosine between relative representations of the same tokens, over a stream.

    There is one mean for every pair of layers of two models, as in `RunningMoments`. It does not change
    with rotation or scaling of either side.

    Args:
        anchors_x, anchors_y: activations of the same anchor tokens at every layer of either model.
        centred: as for `relative_representation`.

    Raises:
        ValueError: no layers or anchors, or different numbers of anchors.
    """

    @checked
    def __init__(
        self,
        anchors_x: Sequence[Float[Tensor, "m _"]],
        anchors_y: Sequence[Float[Tensor, "m _"]],
        centred: bool = False,
    ) -> None:
        check_layers(anchors_x, anchors_y, "anchors_x and anchors_y")
        self._anchors = (list(anchors_x), list(anchors_y))
        self._centred = centred
        self._sums = torch.zeros(len(anchors_x), len(anchors_y), dtype=torch.float64)
        self.n = 0

    @checked
    def update(self, xs: Sequence[Float[Tensor, "n _"]], ys: Sequence[Float[Tensor, "n _"]]) -> None:
        """Add the activations of the next tokens: of each layer of one model, and of the other.

        Raises:
            ValueError: no rows, different numbers of rows, other layers than the anchors', NaN or
                infinite values.
        """
        check_layers(xs, ys, "xs and ys")
        widths = [[layer.shape[1] for layer in side] for side in (xs, ys)]
        if widths != [[layer.shape[1] for layer in side] for side in self._anchors]:
            raise ValueError(f"xs and ys must be layers like those of the anchors, got widths {widths}")
        left, right = (
            [
                _unit(relative_representation(layer, own, self._centred))
                for layer, own in zip(side, anchors, strict=True)
            ]
            for side, anchors in zip((xs, ys), self._anchors, strict=True)
        )
        for i, x in enumerate(left):
            for j, y in enumerate(right):
                self._sums[i, j] += (x * y).sum().cpu()
        self.n += len(xs[0])

    def values(self) -> Float[Tensor, "layers_x layers_y"]:
        """The mean cosines so far, float64; NaN before any token."""
        return self._sums / self.n if self.n else self._sums * float("nan")


def draw_anchors(n: int, n_anchors: int, seed: int) -> Int[Tensor, " m"]:
    """Which of `n` tokens are anchors: `n_anchors` of them, all if there are fewer.

    Raises:
        ValueError: n_anchors is below 1.
    """
    if n_anchors < 1:
        raise ValueError(f"n_anchors must be at least 1, got {n_anchors}")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:n_anchors]


@checked
def relative_similarity(
    x: Float[Tensor, "n d_x"],
    y: Float[Tensor, "n d_y"],
    n_anchors: int = DEFAULT_ANCHORS,
    seed: int = 0,
    centred: bool = False,
) -> float:
    """Mean cosine between relative representations of two whole tensors, with anchors from their rows.

    Args:
        n_anchors: how many tokens are anchors; all, if there are fewer.
        seed: seed of the draw. Use one seed for all figures that are to be compared.
        centred: as for `relative_representation`.

    Raises:
        ValueError: no tokens, different numbers of them, NaN or infinite values, or n_anchors below 1.
    """
    at_least(0, seed=seed)
    check_layers([x], [y], "x and y")
    drawn = draw_anchors(len(x), n_anchors, seed)
    running = RunningRelative([x[drawn.to(x.device)]], [y[drawn.to(y.device)]], centred)
    running.update([x], [y])
    return running.values().item()


def _whitening(covariance: Float[Tensor, "d d"], keep: float) -> Float[Tensor, "d m"]:
    """Columns W with W^T C W = 1: the fewest principal components that hold `keep` of the variance."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    if values[0] <= 0:
        return vectors[:, :0]
    positive = values.clamp(min=0)
    before = positive.cumsum(dim=0) - positive
    kept = (before < keep * positive.sum()) & (values > RANK_TOLERANCE * values[0])
    return vectors[:, kept] / values[kept].sqrt()


def _unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _share(part: Tensor, whole: Tensor) -> float:
    return (part / whole).clamp(0, 1).item() if whole > 0 else 0.0

"""Similarity of representations: CKA, SVCCA, regression, relative representations.

They look at activations, not at dictionaries: what label similarity is held against. Both sides are
activations of the same tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.compare.moments import Moments

RANK_TOLERANCE = 1e-7
"""Eigenvalues below this share of the largest are rounding of float32 activations, no variance."""


def linear_cka(moments: Moments) -> float:
    """||X^T Y||^2 / (||X^T X|| ||Y^T Y||), Frobenius norms (Kornblith et al. 2019).

    Does not change with rotation, or scaling as a whole, of either side. 0 if a side does not vary.
    """
    scale = moments.xx.norm() * moments.yy.norm()
    return _share(moments.xy.square().sum(), scale)


def svcca(moments: Moments, keep: float = 0.99) -> float:
    """Mean canonical correlation of the leading principal components (Raghu et al. 2017).

    As in Kornblith et al. (2019): a side keeps the fewest components that hold `keep` of its variance;
    the sum of the canonical correlations is divided by the smaller number of components. Does not change
    with rotation or scaling; with keep=1 it is CCA, which does not with any invertible linear map.

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


def linear_regression_r2(moments: Moments) -> float:
    """R^2 of the best linear map from X to Y, over all coordinates of Y (Kornblith et al. 2019).

    On the tokens that it was fitted on: give many more of them than X is wide. Not symmetric. Does not
    change with any invertible linear map of X, or with rotation or scaling of Y.
    """
    explained = (_whitening(moments.xx, 1.0).T @ moments.xy).square().sum()
    return _share(explained, moments.yy.trace())


def relative_representation(
    x: Float[Tensor, "n d"], anchors: Float[Tensor, "m d"], centred: bool = False
) -> Float[Tensor, "n m"]:
    """Cosines of activations with anchors (Moschella et al. 2022), in float64 inside.

    Args:
        centred: subtract the mean of the anchors first; the paper does not.
    """
    x, anchors = x.double(), anchors.double()
    if centred:
        centre = anchors.mean(dim=0)
        x, anchors = x - centre, anchors - centre
    return _unit(x) @ _unit(anchors).T


class RunningRelative:
    """Mean cosine between the relative representations of the same tokens in two models, over a stream.

    Does not change with rotation or scaling of either side.

    Args:
        anchors_x, anchors_y: activations of the same anchor tokens in either model, [m, d_x], [m, d_y].
        centred: as for `relative_representation`.

    Raises:
        ValueError: no anchors, or different numbers of them.
    """

    def __init__(
        self, anchors_x: Float[Tensor, "m d_x"], anchors_y: Float[Tensor, "m d_y"], centred: bool = False
    ) -> None:
        if not 0 < len(anchors_x) == len(anchors_y):
            raise ValueError(
                f"both sides need the same anchors, got {len(anchors_x)} and {len(anchors_y)}"
            )
        self._anchors = (anchors_x, anchors_y)
        self._centred = centred
        self._sum = 0.0
        self.n = 0

    def update(self, x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> None:
        """Add the next tokens' activations.

        Raises:
            ValueError: different numbers of tokens.
        """
        if len(x) != len(y):
            raise ValueError(f"x and y must be of the same tokens, got {len(x)} and {len(y)}")
        a, b = (
            _unit(relative_representation(side, anchors, self._centred))
            for side, anchors in zip((x, y), self._anchors, strict=True)
        )
        self._sum += (a * b).sum().item()
        self.n += len(x)

    def value(self) -> float:
        """The mean cosine so far; NaN before any token."""
        return self._sum / self.n if self.n else float("nan")


def relative_similarity(
    x: Float[Tensor, "n d_x"],
    y: Float[Tensor, "n d_y"],
    n_anchors: int = 256,
    seed: int = 0,
    centred: bool = False,
) -> float:
    """`RunningRelative` of activations that are there as a whole, with anchors drawn among them.

    Args:
        n_anchors: how many tokens, all if there are fewer.
        seed: of the draw; the same for all that is to be compared.

    Raises:
        ValueError: no tokens, or different numbers of them, or n_anchors below 1.
    """
    if n_anchors < 1:
        raise ValueError(f"n_anchors must be at least 1, got {n_anchors}")
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x and y must be of the same tokens, got {len(x)} and {len(y)}")
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n_anchors]
    running = RunningRelative(x[drawn.to(x.device)], y[drawn.to(y.device)], centred)
    for rows, others in zip(x.split(8192), y.split(8192), strict=True):
        running.update(rows, others)
    return running.value()


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

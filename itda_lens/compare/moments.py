"""Covariances of activations of the same tokens, whole or over a stream: for CKA, CCA and regression."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.records import checked


class Moments(NamedTuple):
    """Sums of products of the centred activations of two representations, float64.

    Attributes:
        n: tokens.
        xx: X^T X, [d_x, d_x].
        yy: Y^T Y, [d_y, d_y].
        xy: X^T Y, [d_x, d_y].
    """

    n: int
    xx: Float[Tensor, "d_x d_x"]
    yy: Float[Tensor, "d_y d_y"]
    xy: Float[Tensor, "d_x d_y"]

    @classmethod
    @checked
    def of(cls, x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> "Moments":
        """The moments of two tensors that are there as a whole.

        Raises:
            ValueError: they have no rows, different numbers of rows, NaN or infinite values.
        """
        check_layers([x], [y], "x and y")
        return cls(len(x), products(x, x), products(y, y), products(x, y))


def products(
    x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"], rows: int = 8192
) -> Float[Tensor, "d_x d_y"]:
    """X^T Y of the centred activations, float64, `rows` of them at a time."""
    mean_x, mean_y = (side.mean(dim=0, dtype=torch.float64) for side in (x, y))
    total = mean_x.new_zeros(len(mean_x), len(mean_y))
    for part, other in zip(x.split(rows), y.split(rows), strict=True):
        total.addmm_((part.double() - mean_x).T, other.double() - mean_y)
    return total


class RunningMoments:
    """The moments of every pair of layers of two models, updated batch by batch.

    Memory is 8 bytes for each pair of coordinates, (n_x d_x)(n_y d_y) for the pairs of layers and
    n_x d_x^2 + n_y d_y^2 for the layers' own, whatever the number of tokens: 0.8 GB for two models of
    twelve layers of width 768.
    """

    def __init__(self) -> None:
        self.n = 0
        self._shifts: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._own: list[Tensor] = []
        self._cross: list[list[Tensor]] = []
        self._n_x = 0

    @checked
    def update(self, xs: Sequence[Float[Tensor, "n _"]], ys: Sequence[Float[Tensor, "n _"]]) -> None:
        """Add the activations of the next tokens: of each layer of one model, and of the other.

        Raises:
            ValueError: no layers or rows, different numbers of rows, other layers or widths than before,
                NaN or infinite values.
        """
        check_layers(xs, ys, "xs and ys")
        widths = [layer.shape[1] for layer in (*xs, *ys)]
        if self._shifts and (len(xs), widths) != (self._n_x, [len(s) for s in self._shifts]):
            raise ValueError(
                f"xs and ys must be layers like those of the first batch, got widths {widths}"
            )
        layers = [layer.double() for layer in (*xs, *ys)]
        if not self._shifts:
            # Any fixed point near the mean keeps the sums of squares from cancelling.
            self._n_x = len(xs)
            self._shifts = [layer.mean(dim=0) for layer in layers]
            self._sums = [torch.zeros_like(shift) for shift in self._shifts]
            self._own = [shift.new_zeros(len(shift), len(shift)) for shift in self._shifts]
            self._cross = [
                [x.new_zeros(len(x), len(y)) for y in self._shifts[self._n_x :]]
                for x in self._shifts[: self._n_x]
            ]
        layers = [layer - shift for layer, shift in zip(layers, self._shifts, strict=True)]
        for i, layer in enumerate(layers):
            self._sums[i] += layer.sum(dim=0)
            self._own[i].addmm_(layer.T, layer)
        for x, row in zip(layers[: self._n_x], self._cross, strict=True):
            for y, cross in zip(layers[self._n_x :], row, strict=True):
                cross.addmm_(x.T, y)
        self.n += len(layers[0])

    @checked
    def pair(self, i: int, j: int) -> Moments:
        """The moments of layer `i` of the first model and layer `j` of the second.

        Raises:
            ValueError: nothing was added yet, or there is no such layer.
        """
        if self.n == 0:
            raise ValueError("moments of no activations: call update first")
        for name, index, count in (("i", i, self._n_x), ("j", j, len(self._sums) - self._n_x)):
            if not 0 <= index < count:
                raise ValueError(f"{name} must be between 0 and {count - 1}, got {index}")
        j_all = self._n_x + j
        x, y = self._sums[i], self._sums[j_all]
        return Moments(
            self.n,
            self._own[i] - torch.outer(x, x) / self.n,
            self._own[j_all] - torch.outer(y, y) / self.n,
            self._cross[i][j] - torch.outer(x, y) / self.n,
        )


def check_layers(xs: Sequence[Tensor], ys: Sequence[Tensor], name: str) -> None:
    """Refuse sides without layers, and layers that are not [n, width] of the same n >= 1 tokens.

    Raises:
        ValueError: a side is of this kind, or holds NaN or infinite values.
    """
    if not xs or not ys:
        raise ValueError(f"{name} must have a layer each at least, got {len(xs)} and {len(ys)}")
    shapes = [tuple(layer.shape) for layer in (*xs, *ys)]
    if any(len(shape) != 2 or shape[0] != shapes[0][0] or shape[0] == 0 for shape in shapes):
        raise ValueError(f"{name} must be [n, width], of the same n >= 1 tokens, got {shapes}")
    for layer in (*xs, *ys):
        if not torch.isfinite(layer).all():
            raise ValueError(f"{name} must be finite, but one has NaN or infinite values")

"""The sparse code of a batch of activations: which atoms, and how much of each."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itda_lens.pursuit.transforms import differentiated, rowwise, with_derivative

CANCELLATION = 1e-4
"""Once a residual has less than this share of its row's energy, its energy is computed from the
residual, since tracking it by subtraction has become inexact."""


class SparseCodes(NamedTuple):
    """Coefficients of a batch of activations over the atoms of a dictionary.

    A row's used slots come first, in the order in which the pursuit picked the atoms, and name
    distinct atoms. An unused slot has value 0 (and index 0), so that sums over slots need no mask.

    Attributes:
        indices: atom of each slot, int64.
        values: coefficient of each slot, signed unless the pursuit was non-negative.
    """

    indices: Int[Tensor, "*batch k"]
    values: Float[Tensor, "*batch k"]

    def l0(self) -> Int[Tensor, "*batch"]:
        """Nonzero coefficients of each row."""
        return (self.values != 0).sum(dim=-1)

    def to_dense(self, d_sae: int) -> Float[Tensor, "*batch d_sae"]:
        """The codes as dense rows of `d_sae` coefficients; differentiable in `values`."""
        dense = self.values.new_zeros(*self.values.shape[:-1], d_sae)
        return dense.scatter_add(-1, self.indices, self.values)

    def mirrored(self, n: int) -> "SparseCodes":
        """The codes over the atoms `[D, -D]`, with n atoms in D: no coefficient is negative there."""
        return SparseCodes(self.indices + n * (self.values < 0), self.values.abs())

    def decode(self, atoms: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Sum of each row's atoms times their coefficients, read by gather, in `values`' dtype."""
        return gather_sum(self.indices, self.values, atoms)


def checked_energy(
    energy: Float[Tensor, " b"],
    start: Float[Tensor, " b"],
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    picks: Int[Tensor, "b t"],
    coefficients: Float[Tensor, "b t"],
) -> Float[Tensor, " b"]:
    """Squared norms of residuals: tracked by subtraction, but computed where that became inexact.

    Subtracting squares in the dtype of x leaves an error of some 1e-6 of `start` in float32. Only few
    rows come within a hundred times that error, so their residuals are formed.
    """
    inexact = energy < CANCELLATION * start
    if inexact.any():
        held, weights = picks[inexact].clamp(min=0), coefficients[inexact]
        residual = x[inexact] - gather_sum(held, weights, atoms)
        energy = energy.masked_scatter(inexact, residual.double().square().sum(dim=-1))
    return energy


def gather_sum(
    indices: Int[Tensor, "*batch k"],
    weights: Float[Tensor, "*batch k"],
    rows: Float[Tensor, "n d"],
) -> Float[Tensor, "*batch d"]:
    """`sum_s weights[..., s] * rows[indices[..., s]]`.

    The gathered rows are built where derivatives may be wanted, and only there.
    """
    if indices.numel() == 0:  # embedding_bag refuses an empty bag
        return weights.new_zeros(*indices.shape[:-1], rows.shape[1])
    k, batch = indices.shape[-1], indices.shape[:-1]
    indices, weights, rows = indices.reshape(-1, k), weights.reshape(-1, k), rows.to(weights.dtype)
    (total,) = rowwise(_bags, indices, weights, shared=rows)
    if differentiated(weights, rows):
        total = with_derivative(total, (weights[:, None] @ rows[indices]).squeeze(1))
    return total.reshape(*batch, rows.shape[1])


def _bags(indices: Tensor, weights: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    return (torch.nn.functional.embedding_bag(indices, rows, per_sample_weights=weights, mode="sum"),)

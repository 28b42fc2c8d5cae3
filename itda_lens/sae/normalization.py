"""SAELens's `normalize_activations`, computed in float64: for activations of any size, and zero ones.

In half precision the norm of a long activation is infinite, and a zero one divided by its norm is NaN.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from itda_lens.pursuit.precision import at_least_float32

LAYER_NORM_EPS = 1e-5
"""SAELens's; it is added to the standard deviation."""

Normalization = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""SAELens's `run_time_activation_norm_fn_in` and `run_time_activation_norm_fn_out`."""


def constant_norm_rescale(sae: Any) -> Normalization:
    """Scale each activation to the norm `sqrt(d_in)`, and reconstructions back. Zero ones stay zero."""

    def scale(x: Tensor) -> Tensor:
        wanted = sae.cfg.d_in**0.5
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
        sae.x_norm_coeff = wanted / norms.masked_fill(norms == 0, wanted)
        return (x * sae.x_norm_coeff).to(x.dtype)

    def scale_back(x: Tensor) -> Tensor:
        scaled = (x / sae.x_norm_coeff).to(x.dtype)
        del sae.x_norm_coeff
        return scaled

    return scale, scale_back


def layer_norm(sae: Any) -> Normalization:
    """Let each activation have mean 0 and, but for `LAYER_NORM_EPS`, standard deviation 1; and back."""

    def normalize(x: Tensor) -> Tensor:
        exact, kept = x.double(), at_least_float32(x.dtype)
        mean, std = exact.mean(dim=-1, keepdim=True), exact.std(dim=-1, keepdim=True)
        sae.ln_mu, sae.ln_std = mean.to(kept), std.to(kept)
        return ((exact - mean) / (std + LAYER_NORM_EPS)).to(x.dtype)

    def undo(x: Tensor) -> Tensor:
        undone = (x * sae.ln_std + sae.ln_mu).to(x.dtype)
        del sae.ln_mu, sae.ln_std
        return undone

    return normalize, undo


NORMALIZATIONS = {"constant_norm_rescale": constant_norm_rescale, "layer_norm": layer_norm}
"""By SAELens's name, those that an SAE applies as it runs."""

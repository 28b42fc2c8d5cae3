"""The direct path from the residual stream to the logits of a model."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itda_lens.records import HookPoint, checked
from itda_lens.sources.readable import ReadableModel

WRITES_TO_RESIDUAL = frozenset(
    ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "")
)
"""Kinds of hook points (`HookPoint.kind`) whose activations are, or are added to, the residual stream. A
layer of a Hugging Face model has the empty kind."""

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "ln_final")
"""Names that models give to the normalisation before their unembedding."""


@checked
def logit_weights(lm: ReadableModel, hook: str) -> Float[Tensor, "d_model vocab"] | None:
    """The matrix by which a direction at a hook point changes the logits through the direct path.

    Layers after the hook point are left out, as in the logit lens (nostalgebraist, 2020). The gain of
    the final normalisation is in the matrix, and so is its centring where it has one. Its division by a
    norm is not, since it depends on the token. So logits can be compared within a direction, and their
    scale means nothing.

    Returns:
        The matrix in float32, on the CPU; None where the hook point does not write to the residual
        stream, or where the model's unembedding is not known (an object of your own, an encoder).
    """
    point = HookPoint.parse(hook)
    model: Any = getattr(lm, "model", None)
    if point.layer is None or point.kind not in WRITES_TO_RESIDUAL or not isinstance(model, nn.Module):
        return None
    original: Any = getattr(model, "original_model", model)
    if hasattr(original, "get_output_embeddings"):
        head = original.get_output_embeddings()
        weights = None if head is None else head.weight.T
        inner = getattr(original, "base_model", original)
    else:
        weights, inner = getattr(original, "W_U", None), original
    if not isinstance(weights, Tensor) or weights.ndim != 2 or weights.is_meta:
        return None
    weights = weights.detach().float().cpu()
    for holder in (inner, getattr(inner, "decoder", None)):
        norm = next((found for name in FINAL_NORMS if (found := getattr(holder, name, None))), None)
        if isinstance(norm, nn.Module):
            return _through(norm, weights)
    return weights


@torch.no_grad()
def _through(norm: nn.Module, weights: Float[Tensor, "d vocab"]) -> Float[Tensor, "d vocab"]:
    """The weights with the gain and the centring of a normalisation, both learned by trying it out.

    A row of ones with alternating signs has mean 0 and mean square 1, which every kind of normalisation
    multiplies by its gain alone.
    """
    d = len(weights)
    parameter = next(norm.parameters(), None)
    if d % 2 or (parameter is not None and parameter.shape[-1] != d):
        return weights
    signs = torch.ones(1, 1, d)
    signs[..., 1::2] = -1
    probe = signs if parameter is None else signs.to(parameter)
    gain = ((norm(probe) - norm(-probe)) / 2).flatten().float().cpu() * signs.flatten()
    scaled = gain[:, None] * weights
    even = norm(torch.ones_like(probe)) - norm(-torch.ones_like(probe))
    centres = even.abs().max() < 1e-3
    return scaled - scaled.mean(dim=0) if centres else scaled

"""Unembedding rows: for each token of a vocabulary, the direction that raises its logit."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itda_lens.records import Label, checked
from itda_lens.sources.hooked import HookedModel
from itda_lens.sources.models import language_model
from itda_lens.sources.readable import Loader

KIND = "token"
"""The kind of these labels: their `row` is a token's id."""

FINAL_NORMS = (
    "ln_final", "model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "backbone.norm_f",
    "model.decoder.final_layer_norm", "model.final_layernorm", "model.language_model.norm",
    "language_model.model.norm", "transformer.norm_f", "transformer.final_layernorm",
)  # fmt: skip
"""Names of the last norm before the unembedding, in TransformerLens's and Hugging Face's models."""


class Vectors(NamedTuple):
    """Labelled vectors, for `ITDA.from_atoms(*vectors, k=...)`.

    Attributes:
        values: one vector a row, float32.
        labels: what each vector stands for.
    """

    values: Float[Tensor, "n d_in"]
    labels: Sequence[Label]


@checked
def unembedding(
    model: Any,
    tokens: Sequence[int] | None = None,
    *,
    final_norm: bool = True,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> Vectors:
    """The unembedding rows of a model, each labelled by its token.

    A logit is the inner product of such a row with the residual stream after its final norm. Codes of
    the residual stream over these rows, with signed=False, say which tokens the model is about to say.

    Args:
        model, tokenizer, loader, device: as in `language_model`.
        tokens: the ids of the tokens; default: every token that the tokenizer knows.
        final_norm: multiply the rows by the weights of the final norm, so that a row is the direction of
            the residual stream itself that raises its token's logit; where the norm takes off the mean,
            the mean of each row is taken off. False gives the rows as the model stores them.

    Returns:
        Rows and labels. A label's kind is "token", its `row` the token's id, its `token` the text.

    Raises:
        ValueError: the model has no unembedding or, with final_norm, no final norm of a known name; or
            an id is none of the vocabulary.
        TypeError: the model is of none of the known libraries.
    """
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    if not isinstance(lm, HookedModel):
        raise TypeError(
            f"model must be one of TransformerLens or Hugging Face, got {type(lm).__name__}; make the "
            "rows yourself and pass them to ITDA.from_atoms"
        )
    rows = _rows(lm)
    most = min(len(rows), max(lm.tokenizer.get_vocab().values()) + 1)
    ids = list(range(most) if tokens is None else tokens)
    for one in ids:
        if not 0 <= one < most:
            raise ValueError(f"tokens must be ids from 0 to {most - 1}, got {one}")
    if not ids:
        raise ValueError("tokens must hold at least one id, got none")
    with torch.no_grad():
        values = rows[torch.tensor(ids, device=rows.device)].float()
        if final_norm:
            weights, centred = _norm_weights(_final_norm(lm), rows)
            values = values * weights
            values = values - values.mean(dim=1, keepdim=True) if centred else values
    special = set(lm.tokenizer.all_special_ids)
    words = lm.tokenizer.batch_decode([[one] for one in ids])
    labels = [
        Label(row=one, kind=KIND, token=word, special=one in special)
        for one, word in zip(ids, words, strict=True)
    ]
    return Vectors(values, labels)


def _rows(lm: HookedModel) -> Float[Tensor, "vocabulary d_in"]:
    model = getattr(lm.model, "original_model", lm.model)
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
        if head is not None:
            return head.weight.detach()
    elif isinstance(getattr(model, "W_U", None), Tensor):
        return model.W_U.detach().T
    raise ValueError(f"model must have an unembedding, but {type(lm.model).__name__} has none")


def _final_norm(lm: HookedModel) -> nn.Module:
    for part in (lm.model, getattr(lm.model, "original_model", None)):
        modules = {} if part is None else dict(part.named_modules())
        for name in FINAL_NORMS:
            if name in modules:
                return modules[name]
    raise ValueError(
        f"final_norm must be False for {type(lm.model).__name__}: its final norm goes by none of the "
        f"names {', '.join(FINAL_NORMS)}"
    )


def _norm_weights(norm: nn.Module, rows: Tensor) -> tuple[Float[Tensor, " d_in"], bool]:
    """The factors that a norm multiplies its normalised input by, and whether it takes off the mean.

    They are read off its output, since libraries store them in different ways (some as 1 + w). An input
    of +1 and -1 in turn is normalised already; the difference of two outputs drops the bias.
    """
    d = rows.shape[1]
    one = torch.ones(1, 1, d, dtype=rows.dtype, device=rows.device)
    signs = one.clone()
    signs[..., 1::2] = -1
    weights = (norm(signs) - norm(-signs)) / (2 * signs)
    flat = (norm(one) - norm(-one)) / 2
    centred = bool(flat.abs().max() < 0.1 * weights.abs().max())
    return weights.flatten().float(), centred

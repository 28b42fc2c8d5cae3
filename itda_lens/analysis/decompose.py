"""What the tokens of a sentence are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from itda_lens.analysis.evaluate import tokenization_of
from itda_lens.records import Label
from itda_lens.sae import ITDA, hook_name_of
from itda_lens.sources import Loader, language_model


@dataclass(frozen=True)
class Component:
    """One atom in the code of a token."""

    atom: int
    coefficient: float
    label: Label


@dataclass(frozen=True)
class TokenDecomposition:
    """The code of one token's activation.

    Attributes:
        position: token index in the context, the BOS token included.
        token: the token's text.
        components: atoms by falling absolute coefficient.
        explained: 1 - |x - xhat|^2 / |x - b_dec|^2.
    """

    position: int
    token: str
    components: Sequence[Component]
    explained: float


def decompose(
    model: Any,
    itda: ITDA,
    text: str,
    *,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | None = None,
) -> list[TokenDecomposition]:
    """Decompose the activation of each token of `text` (of its first context, if it is long).

    Args:
        model, tokenizer, loader, device: as in `build`; the model that `itda` belongs to.
        itda: a labelled dictionary.
        text: what the model reads.

    Raises:
        ValueError: the text has no token that counts, the dictionary has no labels or belongs to another
            model's width, or its hook does not exist.
    """
    labels = itda.labels
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    hook = hook_name_of(itda)
    batch = next(tokenization_of([itda], lm).batches([text], batch_size=1), None)
    if batch is None or not batch.keep.any():
        raise ValueError(f"text must hold at least one token that counts, got {text!r}")
    with torch.no_grad():
        activation = lm.capture(batch.tokens, batch.attention_mask, [hook])[hook]
        x = activation[batch.keep.to(activation.device)].to(itda.device)
        codes = itda.encode_rows(x)
        reconstruction = itda.decode_sparse(codes).reshape(x.shape)
    centred = (x - itda.b_dec).square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    explained = 1 - (x - reconstruction).square().sum(dim=-1) / centred
    found = []
    for i, place in enumerate(batch.places()):
        order = codes.values[i].abs().argsort(descending=True)
        components = [
            Component(atom, value, labels[atom])
            for atom, value in zip(
                codes.indices[i][order].tolist(), codes.values[i][order].tolist(), strict=True
            )
            if value != 0
        ]
        found.append(
            TokenDecomposition(place.position, place.token or "", components, explained[i].item())
        )
    return found

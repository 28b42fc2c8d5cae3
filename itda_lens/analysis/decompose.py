"""Decomposing the tokens of a text into atoms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

from itda_lens.analysis.evaluate import chat_reading_of, tokenization_of
from itda_lens.records import Label, checked
from itda_lens.sae import check_codable, coded, hook_name_of, labels_of
from itda_lens.sources import Chats, Loader, language_model


@dataclass(frozen=True)
class Component:
    """One atom in the code of a token.

    Attributes:
        atom: its index in the dictionary.
        coefficient: signed, in the units of the activations for an atom of unit norm.
        label: where the atom came from; None for an SAE without labels.
    """

    atom: int
    coefficient: float
    label: Label | None = None


@dataclass(frozen=True)
class TokenDecomposition:
    """The code of one token's activation.

    Attributes:
        position: token index in the context, the BOS token included.
        token: the token's text.
        components: atoms by falling absolute coefficient.
        explained: 1 - |x - xhat|^2 / |x - b_dec|^2.
        role: of a conversation, the role of the message that the token belongs to.
        special: whether the token belongs to the form of a conversation.
    """

    position: int
    token: str
    components: Sequence[Component]
    explained: float
    role: str | None = None
    special: bool = False


@checked
def decompose(
    model: Any,
    sae: SAE[Any],
    text: str | Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> list[TokenDecomposition]:
    """Decompose the activation of each token of `text` (of its first context, if it is long).

    Args:
        model, tokenizer, loader, device: as in `build`; the model that `sae` belongs to.
        sae: an ITDA, or another SAE of SAELens (see `sae.ARCHITECTURES`) with a hook_name.
        text: a text, or a conversation: a list of messages with "role" and "content", which the model
            reads in the form of its chat template. The tokens of the form are shown too.

    Raises:
        ValueError: the text has no token that counts, the dictionary cannot be measured (see
            `evaluate`) or belongs to another model's width, or its hook does not exist.
    """
    check_codable([sae])
    labels = labels_of(sae)
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    hook = hook_name_of(sae)
    if isinstance(text, str):
        tokenization, read = tokenization_of([sae], lm), iter([text])
    else:
        reading = chat_reading_of([sae], lm, Chats([text]))
        tokenization, read = reading.tokenization, reading.rendered()
    batch = next(tokenization.batches(read, batch_size=1), None)
    if batch is None or not batch.keep.any():
        raise ValueError(f"text must hold at least one token that counts, got {text!r}")
    with torch.no_grad():
        activation = lm.capture(batch.tokens, batch.attention_mask, [hook])[hook]
        kept = activation[batch.keep.to(activation.device)]
        ((x, codes, reconstruction),) = coded(sae, kept, batch_size=len(kept))
    centred = (x - sae.b_dec).square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    explained = 1 - (x - reconstruction).square().sum(dim=-1) / centred
    found = []
    for i, place in enumerate(batch.places()):
        order = codes.values[i].abs().argsort(descending=True)
        components = [
            Component(atom, value, None if labels is None else labels[atom])
            for atom, value in zip(
                codes.indices[i][order].tolist(), codes.values[i][order].tolist(), strict=True
            )
            if value != 0
        ]
        explained_here, token = explained[i].item(), place.token or ""
        found.append(
            TokenDecomposition(
                place.position, token, components, explained_here, place.role, place.special
            )
        )
    return found

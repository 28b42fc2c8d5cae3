"""Atoms that the activations of a prompt resemble: which of the stored contexts does this look like?"""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

from itda_lens.analysis.evaluate import tokenization_of
from itda_lens.records import Label, at_least, checked
from itda_lens.sae import check_codable, hook_name_of, labels_of
from itda_lens.sources import Loader, language_model


@dataclass(frozen=True)
class Match:
    """An atom that resembles an activation.

    Attributes:
        atom: its index in the dictionary.
        cosine: of the atom to the activation minus `b_dec`.
        label: where the atom came from; None for an SAE without labels.
    """

    atom: int
    cosine: float
    label: Label | None


@dataclass(frozen=True)
class TokenMatches:
    """The atoms that a token's activation resembles most.

    Attributes:
        position: token index in the context, the BOS token included.
        token: the token's text.
        matches: by falling cosine.
    """

    position: int
    token: str
    matches: tuple[Match, ...]


@checked
@torch.no_grad()
def nearest(
    model: Any,
    sae: SAE[Any],
    text: str,
    *,
    top: int = 10,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> list[TokenMatches]:
    """Find, for each token of `text`, the atoms of the most similar direction.

    A code spreads an activation over several atoms that add up to it. This looks for single atoms that
    are like it, as a search engine does: near-duplicates stand side by side.

    Args:
        model, tokenizer, loader, device: as in `build`; the model that `sae` belongs to.
        sae: an ITDA, or another SAE of SAELens with a hook_name.
        text: a prompt; of a long one its first context is read.
        top: atoms for each token.

    Raises:
        ValueError: `top` is below 1, the text has no token that counts, the model's width is another
            than the dictionary's, or its hook does not exist.
    """
    at_least(1, top=top)
    check_codable([sae])
    labels = labels_of(sae)
    lm = language_model(model, tokenizer=tokenizer, loader=loader, device=device)
    hook = hook_name_of(sae)
    batch = next(tokenization_of([sae], lm).batches([text], batch_size=1), None)
    if batch is None or not batch.keep.any():
        raise ValueError(f"text must hold at least one token that counts, got {text!r}")
    activation = lm.capture(batch.tokens, batch.attention_mask, [hook])[hook]
    kept = activation[batch.keep.to(activation.device)].float().to(sae.device)
    if kept.shape[1] != sae.cfg.d_in:
        raise ValueError(
            f"the model gives activations of width {kept.shape[1]} at {hook!r}, but the sae has "
            f"d_in={sae.cfg.d_in}: it belongs to another model or hook"
        )
    atoms = torch.nn.functional.normalize(sae.W_dec.float(), dim=-1)
    directions = torch.nn.functional.normalize(kept - sae.b_dec.float(), dim=-1)
    cosines, indices = (directions @ atoms.T).topk(min(top, len(atoms)), dim=-1)
    return [
        TokenMatches(
            place.position,
            place.token or "",
            tuple(
                Match(atom, cosine, None if labels is None else labels[atom])
                for atom, cosine in zip(indices[i].tolist(), cosines[i].tolist(), strict=True)
            ),
        )
        for i, place in enumerate(batch.places())
    ]

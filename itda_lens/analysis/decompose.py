"""Decomposing the tokens of a text into atoms."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from itda_lens.analysis.evaluate import chat_reading_of, tokenization_of
from itda_lens.pursuit import SparseCodes
from itda_lens.records import Label, checked
from itda_lens.sae import check_codable, coded, hook_name_of, labels_of, provenance_of
from itda_lens.sources import Chats, Loader, by_head, heads_at, language_model

UNUSUAL = 0.95
"""A token counts as unusual for a dictionary where its code leaves more than the codes of this share of
the text that the dictionary was built from."""

UNLIKE = 1 / 3
"""A text counts as unlike the dictionary's if at least this share of its tokens is unusual. By the
definition of `UNUSUAL` a twentieth is to be expected."""

FEWEST = 3
"""Least number of unusual tokens in a text that counts as unlike the dictionary's."""


@dataclass(frozen=True)
class Component:
    """One atom in the code of a token.

    Attributes:
        atom: its index in the dictionary.
        coefficient: signed, in the units of the activations for an atom of unit norm.
        label: where the atom came from; None for an SAE without labels.
        share: its part of the reconstruction's energy, c <d, r> / |r|^2 for coefficient c, atom d and
            r = xhat - b_dec. The shares of a token's atoms sum to 1. One is negative where the atom
            takes away from the others.
    """

    atom: int
    coefficient: float
    label: Label | None = None
    share: float = 0.0


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
        head: the attention head whose output was coded; None unless the dictionary is of single heads.
        unusual: share of the dictionary's own text, held out from it, of which codes explain more; 0.5
            is ordinary, and near 1 the dictionary lacks atoms for this token. None if not known.
    """

    position: int
    token: str
    components: Sequence[Component]
    explained: float
    role: str | None = None
    special: bool = False
    head: int | None = None
    unusual: float | None = None


class Decomposition(list[TokenDecomposition]):
    """The decompositions of a text's tokens, in order.

    Attributes:
        hook_name: where the activations came from.
        text: the text.
    """

    def __init__(self, tokens: Iterable[TokenDecomposition], hook_name: str, text: str) -> None:
        super().__init__(tokens)
        self.hook_name, self.text = hook_name, text

    @property
    def unusual_share(self) -> float | None:
        """Share of the tokens that are unusual for the dictionary (`UNUSUAL`); None if not known."""
        known = [token.unusual for token in self if token.unusual is not None]
        return sum(u > UNUSUAL for u in known) / len(known) if known else None

    @property
    def warning(self) -> str | None:
        """A sentence for readers where the text is unlike the one that the dictionary was built from.

        Atoms are then merely the nearest ones there are, and their labels say little.
        """
        n = sum(token.unusual is not None and token.unusual > UNUSUAL for token in self)
        if n < FEWEST or n < UNLIKE * len(self):
            return None
        return (
            f"This text is unlike the text that the dictionary was built from: {n} of its {len(self)} "
            "tokens are explained worse than 95% of that text. Read the atoms below as the nearest "
            "ones at hand, not as the meaning of the text."
        )

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        from itda_lens.analysis.html import decomposition_html

        return decomposition_html(self)


@checked
def decompose(
    model: Any,
    sae: SAE[Any],
    text: str | Sequence[Mapping[str, Any]],
    *,
    usual: Sequence[float] | None = None,
    tokenizer: Any = None,
    loader: Loader = "bridge",
    device: str | torch.device | None = None,
) -> Decomposition:
    """Decompose the activation of each token of `text` (of its first context, if it is long).

    A dictionary of single heads decomposes each head's part of a token, one after the other.

    Args:
        model, tokenizer, loader, device: as in `build`; the model that `sae` belongs to.
        sae: an ITDA, or another SAE of SAELens (see `sae.ARCHITECTURES`) with a hook_name.
        text: a text, or a conversation: a list of messages with "role" and "content", which the model
            reads in the form of its chat template. The tokens of the form are shown too.
        usual: rising quantiles, evenly spaced, of the share that codes leave of the activations of
            ordinary text; such as `Examples.unexplained`. Default: those that the build recorded, if it
            did.

    Raises:
        ValueError: the text has no token that counts, the dictionary cannot be measured (see
            `evaluate`) or belongs to another model's width, its hook does not exist, or `usual` falls.
    """
    check_codable([sae])
    quantiles = _quantiles(provenance_of(sae).unexplained if usual is None else usual)
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
        kept, places = activation[batch.keep.to(activation.device)], batch.places()
        if provenance_of(sae).per_head:
            n_heads = heads_at(lm, [hook])
            kept, places = by_head(kept, n_heads), places.by_head(n_heads)
        ((x, codes, reconstruction),) = coded(sae, kept, batch_size=len(kept))
        shares = _shares(codes, sae.W_dec)
    centred = (x - sae.b_dec).square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    left = ((x - reconstruction).square().sum(dim=-1) / centred).tolist()
    found = []
    for i, place in enumerate(places):
        order = codes.values[i].abs().argsort(descending=True)
        columns = (codes.indices[i][order], codes.values[i][order], shares[i][order])
        components = [
            Component(atom, value, None if labels is None else labels[atom], share)
            for atom, value, share in zip(*(column.tolist() for column in columns), strict=True)
            if value != 0
        ]
        unusual = None if quantiles is None else _rank(left[i], quantiles)
        found.append(
            TokenDecomposition(
                place.position,
                place.token or "",
                components,
                1 - left[i],
                role=place.role,
                special=place.special,
                head=place.head,
                unusual=unusual,
            )
        )
    read = text if isinstance(text, str) else batch.contexts[0].text
    return Decomposition(found, hook, read)


def _shares(codes: SparseCodes, atoms: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "n k"]:
    """`Component.share` of each slot."""
    used = atoms[codes.indices].double() * codes.values[..., None].double()
    whole = used.sum(dim=1, keepdim=True)
    energy = whole.square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (used * whole).sum(dim=-1) / energy


def _quantiles(usual: Sequence[float] | None) -> Float[np.ndarray, " quantiles"] | None:
    if usual is None:
        return None
    quantiles = np.asarray(usual, dtype=np.float64)
    if len(quantiles) < 2 or not (np.diff(quantiles) >= 0).all():
        raise ValueError(f"usual must be two or more quantiles that rise, got {list(usual)[:5]}...")
    return quantiles


def _rank(left: float, quantiles: Float[np.ndarray, " quantiles"]) -> float:
    """The share of the ordinary text of which less is left."""
    return float(np.interp(left, quantiles, np.linspace(0, 1, len(quantiles))))

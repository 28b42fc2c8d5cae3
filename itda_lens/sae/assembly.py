"""From atoms that were chosen to an ITDA."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit import Coding
from itda_lens.records import Label, Labels
from itda_lens.sae.itda import ITDA, LABELS_KEY, ITDAConfig


def assemble(
    atoms: Float[Tensor, "d_sae d_in"],
    mean: Float[Tensor, " d_in"],
    *,
    coding: Coding,
    l0: float | None = None,
    labels: Sequence[Label] | None = None,
    metadata: Mapping[str, Any] | None = None,
    reshape_activations: str = "none",
) -> ITDA:
    """The ITDA of these atoms, in their dtype and on their device.

    Args:
        atoms: rows of `W_dec`, of unit norm.
        mean: `b_dec`.
        coding: how it encodes.
        l0, reshape_activations: fields of `ITDAConfig`.
        labels: where each atom came from; default: the dictionary carries none.
        metadata: entries for `cfg.metadata`.

    Raises:
        ValueError: a field of the configuration is out of range.
    """
    d_sae, d_in = atoms.shape
    cfg = ITDAConfig(
        d_in=d_in,
        d_sae=d_sae,
        **asdict(coding),
        l0=l0,
        dtype=str(atoms.dtype).removeprefix("torch."),
        device=str(atoms.device),
        reshape_activations=reshape_activations,  # pyright: ignore[reportArgumentType]
    )
    for key, value in (metadata or {}).items():
        cfg.metadata[key] = value
    if labels is not None:
        cfg.metadata[LABELS_KEY] = Labels(labels).to_compact()
    itda = ITDA(cfg)
    with torch.no_grad():
        itda.W_dec.copy_(atoms)
        itda.b_dec.copy_(mean)
    return itda

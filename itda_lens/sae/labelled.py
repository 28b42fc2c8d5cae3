"""Labels of an SAE that may have none."""

from typing import Any

from sae_lens import SAE

from itda_lens.records import Labels
from itda_lens.sae.itda import ITDA, LABELS_KEY


def labels_of(sae: SAE[Any]) -> Labels | None:
    """Where each atom came from; None for an SAE that carries no labels.

    Raises:
        ValueError: the labels are damaged.
    """
    if isinstance(sae, ITDA) and sae.cfg.metadata[LABELS_KEY] is not None:
        return sae.labels
    return None

"""Label similarity of two dictionaries."""

from itda_lens.sae import ITDA
from itda_lens.training import BUILD_KEY


def jaccard(a: ITDA, b: ITDA) -> float:
    """|A n B| / |A u B| of the sets of (row, chunk, position) labels (Leask et al. 2025).

    Needs no map between the two models' spaces: it compares which tokens were chosen as atoms. Both
    dictionaries must come from the same texts, cut into contexts in the same way.

    Returns:
        Between 0 (no atom in common) and 1 (the same labels).

    Raises:
        ValueError: a dictionary has no labels, or the two record different texts or contexts.
    """
    records = [dict(itda.cfg.metadata[BUILD_KEY] or {}) for itda in (a, b)]
    for key in ("texts_fingerprint", "context_size", "prepend_bos"):
        values = [record.get(key) for record in records]
        if None not in values and values[0] != values[1]:
            raise ValueError(
                f"labels of different texts or contexts cannot be compared: {key} is {values[0]} for "
                f"one dictionary and {values[1]} for the other"
            )
    labels_a, labels_b = ({label.key for label in itda.labels} for itda in (a, b))
    return len(labels_a & labels_b) / len(labels_a | labels_b)

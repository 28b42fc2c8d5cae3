"""How well an atom's label predicts where the atom fires."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from itda_lens.records import Labels


class LabelScore(NamedTuple):
    """The rule "the atom fires at its label's token", measured on a text.

    "Fires" means a positive coefficient with at least the share `STRONG` of its code's energy.

    Attributes:
        precision: of the tokens that are spelt as the label's token, the share where the atom fires.
        recall: of the tokens where the atom fires, the share that are spelt as the label's token.
        f1: their harmonic mean; 0 where there is no such token.
    """

    precision: float
    recall: float
    f1: float


STRONG = 0.1
"""Least share of a code's energy (its sum of squared coefficients) at which an atom counts as firing for
`LabelScore`. Most of the atoms in a code have a few per cent and only mend what the first ones leave."""


class RuleCounts:
    """Counts for the rule of `LabelScore`, with each atom's own label and with labels shuffled.

    Args:
        labels: one for each atom. Atoms whose label has no token, or that are mirror images, have no
            rule.
        seed: of the shuffling.
    """

    def __init__(self, labels: Labels, seed: int) -> None:
        tokens = [label.token if label.cosine > 0 else None for label in labels]
        known = dict.fromkeys(token for token in tokens if token is not None)
        self._ids = {token: i for i, token in enumerate(known)}
        own = np.array([-1 if token is None else self._ids[token] for token in tokens])
        ruled = np.flatnonzero(own >= 0)
        shuffled = own.copy()
        shuffled[ruled] = own[np.random.default_rng(seed).permutation(ruled)]
        self._tokens = np.stack([own, shuffled])
        self._hits = np.zeros((2, len(own)), dtype=np.int64)
        self._fires = np.zeros(len(own), dtype=np.int64)
        self._occurs = np.zeros(len(self._ids), dtype=np.int64)

    def update(
        self,
        spelt: Sequence[str | None],
        row: Int[np.ndarray, " m"],
        atom: Int[np.ndarray, " m"],
        strong: Bool[np.ndarray, " m"],
    ) -> None:
        """Count a batch.

        Args:
            spelt: its tokens.
            row, atom: the token and the atom of each nonzero coefficient.
            strong: whether the atom fires there.
        """
        ids = np.array([-2 if token is None else self._ids.get(token, -2) for token in spelt])
        self._occurs += np.bincount(ids[ids >= 0], minlength=len(self._occurs))
        row, atom = row[strong], atom[strong]
        self._fires += np.bincount(atom, minlength=len(self._fires))
        for hits, tokens in zip(self._hits, self._tokens, strict=True):
            hits += np.bincount(atom[tokens[atom] == ids[row]], minlength=len(hits))

    def scores(self) -> Float[np.ndarray, "2 d_sae 3"]:
        """(precision, recall, F1) of own labels and of shuffled ones.

        They are NaN for an atom without a rule, and where the label's token does not occur in the text.
        """
        found = np.full((2, len(self._fires), 3), np.nan)
        for which, (hits, tokens) in enumerate(zip(self._hits, self._tokens, strict=True)):
            occurs = np.where(tokens >= 0, self._occurs[tokens.clip(min=0)] if self._ids else 0, 0)
            some = occurs > 0
            found[which, some, 0] = hits[some] / occurs[some]
            found[which, some, 1] = hits[some] / self._fires[some].clip(min=1)
            found[which, some, 2] = 2 * hits[some] / (occurs[some] + self._fires[some])
        return found

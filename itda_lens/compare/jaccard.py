"""Label similarity: of dictionaries, and of models by the unions over their layers."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from itda_lens.compare.places import Match, Place, n_shared, places, resolve_match
from itda_lens.dictionary import energy_by_atom
from itda_lens.records import checked
from itda_lens.sae import ITDA, coded


@checked
def jaccard(
    a: ITDA | Collection[ITDA] | Mapping[str, ITDA],
    b: ITDA | Collection[ITDA] | Mapping[str, ITDA],
    match: Match = "auto",
) -> float:
    """|A n B| / |A u B| of the sets of labels (Leask et al. 2025).

    Needs no map between the two models' spaces: it compares which tokens were chosen as atoms. Both
    sides must come from the same texts.

    Args:
        a, b: one dictionary, or several whose labels are united. The dictionaries of all layers give the
            similarity of whole models.
        match: when two labels are the same; see `Match`. With "overlap", |A n B| counts pairs of tokens.

    Returns:
        Between 0 (no label in common) and 1 (the same labels).

    Raises:
        ValueError: a side is empty, a dictionary has no labels, the texts differ, or the labels cannot
            be matched as asked for.
    """
    left, right = _several(a, "a"), _several(b, "b")
    how = resolve_match([*left, *right], match)
    return jaccard_of_sets(place_set(left, how), place_set(right, how), how)


@checked
def weighted_jaccard(
    a: ITDA | Collection[ITDA] | Mapping[str, ITDA],
    b: ITDA | Collection[ITDA] | Mapping[str, ITDA],
    usage_a: Float[Tensor, " d_sae"] | Sequence[Float[Tensor, " d_sae"]],
    usage_b: Float[Tensor, " d_sae"] | Sequence[Float[Tensor, " d_sae"]],
    match: Match = "auto",
) -> float:
    """sum min(u, v) / sum max(u, v) over labels, u and v their shares of use (Ruzicka's similarity).

    An atom that is hardly used counts little. If both sides have equally many atoms, all equally used,
    this is `jaccard`.

    Args:
        a, b: as for `jaccard`.
        usage_a, usage_b: how much each atom is used (`usage`, or a feature density), not negative; one
            tensor for each dictionary. Each is divided by its sum; those of a union are averaged.
        match: as for `jaccard`; "overlap" has no weighted form.

    Raises:
        ValueError: as `jaccard`; or usages of the wrong number, negative, not finite or all zero.
    """
    if match == "overlap":
        raise ValueError("match='overlap' has no weighted form; use 'span'")
    left, right = _several(a, "a"), _several(b, "b")
    how = resolve_match([*left, *right], match)
    u, v = (
        union([place_shares(itda, own, how) for itda, own in zip(side, usages, strict=True)])
        for side, usages in (
            (left, _one_each(left, usage_a, "usage_a")),
            (right, _one_each(right, usage_b, "usage_b")),
        )
    )
    return jaccard_of_shares(u, v)


@checked
@torch.no_grad()
def usage(
    sae: SAE[Any], x: Float[Tensor, "n d_in"], batch_size: int | None = None
) -> Float[Tensor, " d_sae"]:
    """Share of each atom in the energy of the codes of `x`, the sum of all squared coefficients.

    Args:
        sae: an ITDA, or another SAE of SAELens; see `sae.ARCHITECTURES`.
        x: activations of the dictionary's own model and hook point.
        batch_size: activations encoded at once; default: 4,096, or fewer for a wide SAE.

    Returns:
        float64, sum 1 (0 if all codes are zero), on the CPU.

    Raises:
        ValueError: `x` has no row, another width, or NaN or infinite values; or the SAE is a transcoder,
            or in training.
    """
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"x must have shape [n, d_in] with at least one row, got {tuple(x.shape)}")
    energy = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    for part in coded(sae, x, batch_size):
        energy += energy_by_atom(part.codes, sae.cfg.d_sae).cpu()
    total = energy.sum()
    return energy / total if total > 0 else energy


def place_set(itdas: Sequence[ITDA], match: Match) -> set[Place]:
    """The places of all labels; `match` is a result of `resolve_match`."""
    found = (place for itda in itdas for place in places(itda.labels, match))
    return {place for place in found if place is not None}


def place_shares(itda: ITDA, usage: Float[Tensor, " d_sae"], match: Match) -> dict[Place, float]:
    """The share of each place in the use of all atoms.

    Raises:
        ValueError: an atom's usage is negative or not finite, or no atom is used.
    """
    if not (torch.isfinite(usage) & (usage >= 0)).all() or usage.sum() == 0:
        raise ValueError("usage of atoms must be finite, not negative and not all zero")
    shares: dict[Place, float] = {}
    each = (usage.double() / usage.double().sum()).tolist()
    for place, share in zip(places(itda.labels, match), each, strict=True):
        if place is not None:
            shares[place] = shares.get(place, 0.0) + share
    return shares


def union(layers: Sequence[dict[Place, float]]) -> dict[Place, float]:
    """The places of all dictionaries, with the mean of their shares."""
    total: dict[Place, float] = {}
    for layer in layers:
        for place, share in layer.items():
            total[place] = total.get(place, 0.0) + share / len(layers)
    return total


def jaccard_of_sets(a: set[Place], b: set[Place], match: Match) -> float:
    """The formula of `jaccard`."""
    shared = n_shared(a, b, match)
    return shared / _positive(len(a) + len(b) - shared)


def jaccard_of_shares(u: dict[Place, float], v: dict[Place, float]) -> float:
    """The formula of `weighted_jaccard`: sum max = sum u + sum v - sum min."""
    least = sum(min(u[place], v[place]) for place in u.keys() & v.keys())
    return least / _positive(sum(u.values()) + sum(v.values()) - least)


def _several(side: ITDA | Collection[ITDA] | Mapping[str, ITDA], name: str) -> list[ITDA]:
    if isinstance(side, Mapping):  # what `build` returns
        side = list(side.values())
    found = [side] if isinstance(side, ITDA) else list(side)
    if not found:
        raise ValueError(f"{name} must be one dictionary or more, got none")
    return found


def _one_each(itdas: list[ITDA], usages: Tensor | Sequence[Tensor], name: str) -> list[Tensor]:
    each = [usages] if isinstance(usages, Tensor) else list(usages)
    if [tuple(own.shape) for own in each] != [(itda.cfg.d_sae,) for itda in itdas]:
        raise ValueError(
            f"{name} must hold a number for each atom: expected {[i.cfg.d_sae for i in itdas]} of them, "
            f"got shapes {[tuple(own.shape) for own in each]}"
        )
    return each


def _positive(union: float) -> float:
    if union <= 0:
        raise ValueError("no label can be compared: all are of special tokens, which have no characters")
    return union

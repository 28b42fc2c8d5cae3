"""More atoms for a dictionary, chosen for the error that the atoms which it has leave."""

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.dictionary.energy import EnergyRule
from itda_lens.dictionary.outliers import duplicate_cosines, limit_outliers
from itda_lens.dictionary.sampling import StreamSample
from itda_lens.dictionary.selection import (
    SAME_DIRECTION,
    energy_by_atom,
    first_of_direction,
    normalize_rows,
)
from itda_lens.pursuit import Coding, PreparedAtoms
from itda_lens.records import Label, Places

RULE = EnergyRule()
"""The sizes of samples, the limits of near-duplicates and the rate of pruning are those of this rule."""


def more_atoms(
    x: Float[Tensor, "rows d"],
    places: Places,
    atoms: Float[Tensor, "n d"],
    n_more: int,
    coding: Coding,
    *,
    seed: int,
    progress: bool,
) -> tuple[Float[Tensor, "n_more d"], list[Label]]:
    """Choose activations that, as further atoms, explain most of the error that `atoms` leave.

    Candidates are a uniform sample of the distinct activations, without those that repeat an atom.
    Activations are coded over `atoms` and candidates together, and the candidates that carry least
    energy are dropped, round by round; `atoms` all stay. So a candidate only gets the energy that no
    atom explains better. The chosen ones come in the order of the energy that they carry.

    Args:
        x: activations, centred as the dictionary centres them.
        places: where each came from; samples are drawn by them.
        atoms: unit rows.
        coding: the codes that the atoms are chosen for; MP is used whatever its method.
        seed: seed of the samples.

    Raises:
        ValueError: there are fewer than `n_more` activations in directions that no atom has.
    """
    coding = Coding(coding.k, "mp", coding.signed)
    n_candidates = max(RULE.min_candidates, RULE.candidates_per_atom * n_more)
    n_scored = max(RULE.min_scored, RULE.scored_per_atom * (len(atoms) + n_more))
    sample = _sample(x, places, n_candidates, seed, distinct=True)
    rows, from_places = sample.rows(), sample.places()
    keep = _distinct(rows, atoms, n_more, coding.signed)
    candidates = normalize_rows(rows[keep])[0]
    scored = limit_outliers(_sample(x, places, n_scored, seed + 1, distinct=False).rows())
    chosen = keep_by_energy(scored, atoms, candidates, n_more, coding, progress)
    return candidates[chosen], [from_places[i] for i in keep[chosen].tolist()]


def keep_by_energy(
    x: Float[Tensor, "rows d"],
    atoms: Float[Tensor, "n d"],
    candidates: Float[Tensor, "m d"],
    n_keep: int,
    coding: Coding,
    progress: bool,
) -> Tensor:
    """Indices of the candidates that carry most energy in codes over them and `atoms`, by energy."""
    n = len(atoms)
    prepared = PreparedAtoms(torch.cat([atoms, candidates]), coding)
    kept = torch.arange(len(candidates), device=x.device)
    held = torch.arange(n, device=x.device)
    with tqdm(
        total=len(kept) - n_keep, desc="selecting", unit="atom", disable=not progress, leave=False
    ) as bar:
        while True:
            energy = energy_by_atom(prepared.encode(x), len(prepared))[n:]
            order = energy.argsort(descending=True, stable=True)
            if len(kept) == n_keep:
                return kept[order]
            size = max(n_keep, int(len(kept) * (1 - RULE.drop_per_round)))
            bar.update(len(kept) - size)
            best = order[:size].sort().values
            kept = kept[best]
            prepared = prepared.keeping(torch.cat([held, n + best]))


def _sample(x: Tensor, places: Places, size: int, seed: int, distinct: bool) -> StreamSample:
    sample = StreamSample(
        x.shape[1], size, seed, x.dtype, x.device, distinct=distinct, labelled=distinct
    )
    sample.update(x, places)
    return sample


def _distinct(rows: Tensor, atoms: Tensor, n_wanted: int, signed: bool) -> Tensor:
    """Indices of the rows that repeat no atom and no earlier row; the limit rises while too few are."""
    unit, usable = normalize_rows(rows)
    found = index = usable.nonzero().flatten()
    for cosine in (RULE.near_duplicate, *RULE.relaxed):
        cosines = duplicate_cosines(rows[index], cosine).clamp(max=SAME_DIRECTION)
        found = index[first_of_direction(unit[index], cosines, signed, known=atoms)]
        if len(found) >= n_wanted:
            return found
    raise ValueError(
        f"n must be at most the number of activations in directions of their own: got n={n_wanted}, but "
        f"only {len(found)} of the {len(rows)} in the sample repeat no atom"
    )

"""One pass over a source: a selector for each hook point, then dictionaries."""

import logging
import time
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from itda_lens.dictionary import Dictionary, Guided
from itda_lens.records import Provenance, at_least, checked, versions
from itda_lens.sae import ITDA, assemble
from itda_lens.sources import ActivationSource, hook_is_per_head
from itda_lens.training.point import Point
from itda_lens.training.recipe import Recipe

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_FVU = 5.0
"""Least time between two measurements of the progress bar's FVU: each is a small pursuit for every
hook."""


@checked
def build_from(
    source: ActivationSource, recipe: Recipe, *, metadata: dict[str, object] | None = None,
    progress: bool = True,
) -> dict[str, ITDA]:  # fmt: skip
    """One labelled dictionary for each hook point of a source, from one reading of it.

    Args:
        source: where activations come from.
        recipe: how atoms are chosen and encode.
        metadata: more entries for `cfg.metadata`.
        progress: show a progress bar with rows/s and, where the rule tells them, atoms and FVU so far.

    Returns:
        The dictionaries by hook name, in the order of `source.hooks`.

    Raises:
        ValueError: there are no rows, NaN or infinite ones, or fewer distinct ones than `recipe.d_sae`.
    """
    check_enough(recipe, source.n_rows)
    with torch.no_grad():
        points = _read(source, recipe, progress)
        if missing := [hook for hook in source.hooks if hook not in points]:
            raise ValueError(f"the source must give at least one row, got none at {missing}")
        chosen = {hook: points[hook].finish(progress) for hook in source.hooks}
    return {
        hook: assembled(*found, recipe, source.provenance(hook), metadata or {})
        for hook, found in chosen.items()
    }


@checked
def check_enough(recipe: Recipe, n_rows: int | None) -> None:
    """Refuse a dictionary of more atoms than there will be activations.

    Raises:
        ValueError: there are fewer.
    """
    at_least(1, n_rows=n_rows)
    if recipe.d_sae is not None and n_rows and recipe.d_sae > n_rows:
        raise ValueError(
            f"d_sae must be at most the number of activations: got d_sae={recipe.d_sae} for "
            f"{n_rows} rows"
        )


def _read(source: ActivationSource, recipe: Recipe, progress: bool) -> dict[str, Point]:
    points: dict[str, Point] = {}
    fvu_at = time.perf_counter()
    with tqdm(
        total=source.n_rows, unit="tok", unit_scale=True, desc="building", disable=not progress
    ) as bar:
        for rows in source.rows():
            for hook, x in rows.values.items():
                if hook not in points:
                    points[hook] = Point.for_rows(recipe, x)
                points[hook].update(x, rows.places)
            bar.update(len(rows.places))
            now = time.perf_counter()
            if progress and now - fvu_at > SECONDS_BETWEEN_FVU:
                fvu_at = now
                bar.set_postfix(_status(points))
            if all(point.done for point in points.values()):
                break
    return points


def _status(points: dict[str, Point]) -> dict[str, str]:
    guides = [point.selector for point in points.values() if isinstance(point.selector, Guided)]
    return {
        "atoms": "/".join(str(guide.n_atoms) for guide in guides),
        "FVU": "/".join(f"{guide.running_fvu():.3f}" for guide in guides),
    }


def assembled(
    dictionary: Dictionary, threshold: float, recipe: Recipe, provenance: Provenance,
    metadata: dict[str, object],
) -> ITDA:  # fmt: skip
    """The SAE of a finished run at one hook point, which records how it came to be."""
    logger.info("%s: %d atoms chosen", provenance.hook_name, len(dictionary.atoms))
    provenance = replace(provenance, recipe=recipe.record(), versions=versions())
    coding = replace(recipe.coding, k=min(recipe.coding.k, len(dictionary.atoms)), threshold=threshold)
    hook = provenance.hook_name
    itda = assemble(
        dictionary.atoms,
        dictionary.mean,
        coding=coding,
        l0=recipe.l0,
        labels=dictionary.labels,
        metadata=metadata,
        reshape_activations="hook_z" if hook and hook_is_per_head(hook) else "none",
    )
    provenance.into(itda.cfg.metadata)
    return itda

"""Baselines to set beside given dictionaries: same hook points, widths, k and tokens."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from sae_lens.constants import SAE_CFG_FILENAME

from itda_lens.architectures.inference import save_inference
from itda_lens.architectures.kinds import Baseline, baseline
from itda_lens.records import (
    agreed_cutting,
    at_least,
    checked,
    is_local_path,
    known_name,
    without_paths,
)
from itda_lens.sae import ITDA, provenance_of
from itda_lens.sources import describe_texts, iterate_texts
from itda_lens.sources.model_source import texts_fingerprint
from itda_lens.training import collect

logger = logging.getLogger(__name__)

RECIPE_KEY = "itda_baseline"
"""The metadata entry that holds the recipe of a baseline: its texts and settings."""

INHERITED = ("model_name", "hook_name", "context_size", "prepend_bos")
"""Entries of metadata that a baseline copies from the dictionary that it rivals."""


@checked
def build_baselines(
    itdas: Sequence[ITDA],
    kinds: Sequence[str],
    folder: str | Path,
    *,
    texts: str | Path | Iterable[Any],
    model: Any,
    max_tokens: int | None = None,
    epochs: int = 8,
    seed: int = 0,
    batch_size: int = 16,
    text_field: str = "text",
    split: str = "train",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> list[Path]:
    """Build the baselines of some dictionaries, one of each kind for each hook point, width and k.

    A baseline that is in `folder` already is not built again. If it is of other texts or settings, it is
    refused.

    Args:
        itdas: the dictionaries to rival.
        kinds: "random" (activations drawn at random), "pca" (principal components), or an architecture
            of `train_sae`, trained by SAELens on the same activations.
        folder: where to save them, a subfolder each.
        texts: texts to build them from; for a fair comparison, those of the dictionaries.
        model: as in `build`; the dictionaries must belong to it.
        max_tokens: activations to build from; default: the largest number that a dictionary records.
        epochs: passes of trained SAEs over the activations.
        seed, batch_size, text_field, split, device, progress: as in `build`.

    Returns:
        Their folders.

    Raises:
        ValueError: an unknown kind, no dictionary; dictionaries that name no hook point or no number of
            tokens, or were built from different contexts; a baseline of other texts or settings.
        OSError: the folder cannot be written.
    """
    checked: list[Baseline] = [_kind(name) for name in kinds]
    if not itdas:
        raise ValueError("itdas must be one dictionary or more to rival, got none")
    at_least(1, max_tokens=max_tokens, batch_size=batch_size, epochs=epochs)
    at_least(0, seed=seed)
    wanted: dict[Path, tuple[Baseline, ITDA, str]] = {}
    for itda in itdas:
        hook = itda.cfg.metadata.hook_name
        if not hook:
            raise ValueError("baselines need dictionaries whose metadata name their hook_name")
        for kind in checked:
            width = "" if kind == "pca" else f"-{itda.cfg.n_pursued}"
            wanted[Path(folder) / f"{kind}{width}-k{_nonzeros(itda)}-{hook}"] = (kind, itda, hook)
    provenances = [provenance_of(itda) for itda in itdas]
    if any(provenance.per_head for provenance in provenances):
        raise ValueError("itdas must not be of single heads (per_head=True): these have no baselines")
    cutting = agreed_cutting(provenances)
    if max_tokens is None:
        recorded = [p.n_tokens for p in provenances if p.n_tokens is not None]
        if not recorded:
            raise ValueError("max_tokens must be given: the dictionaries do not record their tokens")
        max_tokens = max(recorded)
    recipe = {"max_tokens": max_tokens, "epochs": epochs, "seed": seed}
    recipe |= _described(texts, text_field, split)
    missing = {path: plan for path, plan in wanted.items() if not _is_built(path, recipe)}
    if not missing:
        return list(wanted)
    found = collect(
        model,
        texts,
        sorted({hook for _, _, hook in missing.values()}),
        max_tokens=max_tokens,
        **asdict(cutting),
        batch_size=batch_size,
        text_field=text_field,
        split=split,
        device=device,
        progress=progress,
    )
    for path, (kind, itda, hook) in missing.items():
        logger.info("building %s", path.name)
        sae = baseline(
            kind,
            found[hook].values,
            d_sae=itda.cfg.n_pursued,
            k=_nonzeros(itda),
            method=itda.cfg.method,
            labels=found[hook].labels,
            epochs=epochs,
            seed=seed,
            metadata=without_paths(
                {name: itda.cfg.metadata[name] for name in INHERITED} | {RECIPE_KEY: recipe}
            ),
        )
        save_inference(sae, path)
    return list(wanted)


def _kind(name: str) -> Baseline:
    for kind in get_args(Baseline):
        if name == kind:
            return kind
    raise ValueError(f"kinds must be among {', '.join(get_args(Baseline))}; got {name!r}")


def _nonzeros(itda: ITDA) -> int:
    """Nonzeros of each code of a rival: k, or the mean L0 that the dictionary was calibrated for."""
    return itda.cfg.k if itda.cfg.l0 is None else max(1, round(itda.cfg.l0))


def _described(texts: str | Path | Iterable[Any], text_field: str, split: str) -> dict[str, str]:
    """The entries of a recipe about the texts. They travel with the baseline, so that a file is told
    from another by its name and its first texts, not by its path."""
    described = describe_texts(texts, text_field, split)
    if is_local_path(described["texts"]):
        first = texts_fingerprint(iterate_texts(texts, text_field=text_field, split=split))
        described |= {"texts": known_name(described["texts"]), "texts_fingerprint": first}
    return described


def _is_built(path: Path, recipe: dict[str, Any]) -> bool:
    config = path / SAE_CFG_FILENAME
    if not config.exists():
        return False
    built = json.loads(config.read_text())["metadata"].get(RECIPE_KEY)
    wanted = json.loads(json.dumps(recipe))
    if built is not None and "texts_fingerprint" in wanted and "texts_fingerprint" not in built:
        # Saved by an earlier version, which kept the path and no digest.
        del wanted["texts_fingerprint"]
        wanted["texts"] = built["texts"] if Path(built["texts"]).name == wanted["texts"] else None
    if built != wanted:
        raise ValueError(f"{path} is a baseline of other texts or settings: {built}; remove it")
    return True

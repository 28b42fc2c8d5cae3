"""Baselines to set beside given dictionaries: same hook points, widths, k and tokens."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME

from itda_lens.sae import ITDA
from itda_lens.saebench.baselines import (
    principal_components,
    random_atoms,
    save_inference,
    train_topk,
)
from itda_lens.training import BUILD_KEY, Activations, collect

logger = logging.getLogger(__name__)

Baseline = Literal["random", "pca", "topk"]


def build_baselines(
    itdas: Sequence[ITDA],
    kinds: Sequence[str],
    folder: str | Path,
    *,
    texts: str | Path | Iterable[str],
    model: Any,
    max_tokens: int | None = None,
    epochs: int = 8,
    seed: int = 0,
    batch_size: int = 16,
    text_field: str = "text",
    split: str = "train",
    device: str | None = None,
    progress: bool = True,
) -> list[Path]:
    """Build the baselines of some dictionaries, one of each kind for each hook point, width and k.

    One that is in `folder` already is not built again.

    Args:
        itdas: the dictionaries to rival.
        kinds: "random" (activations drawn at random), "pca" (principal components), "topk" (SAELens's
            TopK SAE, trained by SAELens on the same activations).
        folder: where to save them, a subfolder each.
        texts: what to build them from; for a fair comparison what the dictionaries were built from.
        model: as in `build`; one that the dictionaries belong to.
        max_tokens: activations to build from; default: as many as the dictionaries record.
        epochs: passes of the TopK SAE over the activations.
        seed, batch_size, text_field, split, device, progress: as in `build`.

    Returns:
        Their folders.

    Raises:
        ValueError: an unknown kind; dictionaries that name no hook point or no number of tokens.
        OSError: the folder cannot be written.
    """
    for kind in kinds:
        if kind not in get_args(Baseline):
            raise ValueError(f"baselines must be among {', '.join(get_args(Baseline))}; got {kind!r}")
    wanted: dict[Path, tuple[str, ITDA, str]] = {}
    for itda in itdas:
        hook = itda.cfg.metadata.hook_name
        if not hook:
            raise ValueError("baselines need dictionaries whose metadata name their hook_name")
        for kind in kinds:
            width = "" if kind == "pca" else f"-{itda.cfg.n_pursued}"
            wanted[Path(folder) / f"{kind}{width}-k{itda.cfg.k}-{hook}"] = (kind, itda, hook)
    missing = {path: plan for path, plan in wanted.items() if not (path / SAE_CFG_FILENAME).exists()}
    if not missing:
        return list(wanted)
    metadata = [itda.cfg.metadata for _, itda, _ in missing.values()]
    if max_tokens is None:
        recorded = [n for m in metadata if isinstance(n := (m[BUILD_KEY] or {}).get("n_tokens"), int)]
        if not recorded:
            raise ValueError("max_tokens must be given: the dictionaries do not record their tokens")
        max_tokens = max(recorded)
    found = collect(
        model,
        texts,
        sorted({hook for _, _, hook in missing.values()}),
        max_tokens=max_tokens,
        context_size=metadata[0].context_size or 128,
        prepend_bos=metadata[0].prepend_bos,
        batch_size=batch_size,
        text_field=text_field,
        split=split,
        device=device,
        progress=progress,
    )
    for path, (kind, itda, hook) in missing.items():
        logger.info("building %s", path.name)
        sae = _build(kind, itda, found[hook], epochs, seed)
        save_inference(sae, path)
    return list(wanted)


def _build(kind: str, itda: ITDA, found: Activations, epochs: int, seed: int) -> SAE[Any]:
    names = ("model_name", "hook_name", "context_size", "prepend_bos")
    metadata = {name: itda.cfg.metadata[name] for name in names}
    k, d_sae = itda.cfg.k, itda.cfg.n_pursued
    if kind == "pca":
        return principal_components(found.values, k=k, metadata=metadata)
    if kind == "random":
        return random_atoms(
            found.values, d_sae=d_sae, k=k, method=itda.cfg.method, labels=found.labels, seed=seed,
            metadata=metadata,
        )  # fmt: skip
    return train_topk(found.values, d_sae=d_sae, k=k, epochs=epochs, seed=seed, metadata=metadata)

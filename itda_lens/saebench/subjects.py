"""The dictionaries to evaluate, as their folders describe them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from itda_lens.records import Provenance
from itda_lens.records.files import said
from itda_lens.sae import dictionaries_in
from itda_lens.sae.saved import read_local

NONNEGATIVE = "+nonnegative"
"""Suffix of the names of non-negative views in result files."""


@dataclass(frozen=True)
class Subject:
    """One dictionary or SAE.

    Attributes:
        name: its name in tables and result files.
        source: its folder, or "release:sae_id" of one that SAELens knows.
        architecture: SAELens's name of its architecture. This and the fields below are not known before
            a download.
        d_in, d_sae, hook_name, model_name: as its config says.
        model_source: folder or name that its model can be loaded from, if its files say so.
        signed: whether its codes may be negative and it has a non-negative view.
        fingerprint: hash of its files.
    """

    name: str
    source: str
    architecture: str | None = None
    d_in: int | None = None
    d_sae: int | None = None
    hook_name: str | None = None
    model_name: str | None = None
    model_source: str | None = None
    signed: bool = False
    fingerprint: str | None = None


def subjects_of(saes: Sequence[str | Path] | Mapping[str, str | Path]) -> list[Subject]:
    """Read what the folders say; a folder of several dictionaries stands for all of them.

    Args:
        saes: folders of SAELens SAEs, ITDAs among them, or "release:sae_id"; a mapping names them.
            Without names, a folder is named by its last parts, enough of them to tell it from the
            others.

    Raises:
        FileNotFoundError: a folder that is not there or holds no SAE.
        ValueError: there is no SAE, a config is damaged, or two have one name.
    """
    if isinstance(saes, Mapping):
        named = [
            (name, str(source) if _is_release(source) else str(Path(source).resolve()))
            for name, source in saes.items()
        ]
    else:
        sources = [inside for source in saes for inside in _expand(source)]
        named = list(zip(_short_names(sources), sources, strict=True))
    if not named:
        raise ValueError("saes must be one or more, got none")
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two SAEs go by the name {name!r}; give each folder once")
    return [_read(name, source) for name, source in named]


def _expand(source: str | Path) -> list[str]:
    if _is_release(source):
        return [str(source)]
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(source)!r} (a SAE of SAELens's list is given as release:sae_id)"
        )
    found = dictionaries_in(folder)
    if not found:
        raise FileNotFoundError(f"no {SAE_CFG_FILENAME} in {folder} or its subfolders")
    return [str(inside.resolve()) for inside in found]


def _is_release(source: str | Path) -> bool:
    return isinstance(source, str) and ":" in source and not Path(source).exists()


def _short_names(sources: Sequence[str]) -> list[str]:
    parts = [Path(source.replace(":", "/")).parts for source in sources]
    n = 1
    while n < max(map(len, parts), default=1) and len({p[-n:] for p in parts}) < len(set(parts)):
        n += 1
    return ["_".join(part.strip("/") for part in p[-n:]) for p in parts]


def _read(name: str, source: str) -> Subject:
    if "/" in name or not name.strip(".") or name.endswith(NONNEGATIVE):
        raise ValueError(f"a name must do as a file name and not end in {NONNEGATIVE!r}, got {name!r}")
    if _is_release(source):
        return Subject(name, source)
    config = Path(source) / SAE_CFG_FILENAME
    weights = Path(source) / SAE_WEIGHTS_FILENAME
    for file in (config, weights):
        if not file.is_file():
            raise FileNotFoundError(f"no {file.name} in {source}")
    try:
        values = json.loads(config.read_text())
        # SAELens 5 kept these beside the rest, SAELens 6 keeps them in "metadata".
        metadata = {**values, **(values.get("metadata") or {})}
        d_in, d_sae = int(values["d_in"]), int(values["d_sae"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is truncated or damaged: {said(error)}") from error
    digest = hashlib.sha256(config.read_bytes())
    with weights.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return Subject(
        name=name,
        source=source,
        architecture=values.get("architecture"),
        d_in=d_in,
        d_sae=d_sae,
        hook_name=metadata.get("hook_name"),
        model_name=metadata.get("model_name"),
        model_source=Provenance.of(metadata).with_local(read_local(config.parent)).model,
        signed=bool(
            values.get("architecture") == "itda" and values.get("signed") and not values.get("mirrored")
        ),
        fingerprint=digest.hexdigest(),
    )

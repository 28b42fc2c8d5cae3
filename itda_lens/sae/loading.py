"""Loading a dictionary from a folder or a Hugging Face repository; errors say what is wrong."""

import json
import logging
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import DTYPE_MAP, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from itda_lens.records import HookPoint, checked, is_leftover
from itda_lens.records.files import said
from itda_lens.sae.hub import fetched
from itda_lens.sae.itda import ITDA, LABELS_KEY, ITDAConfig
from itda_lens.sae.provenance import provenance_of
from itda_lens.sae.saved import (
    LOCAL_FILENAME,
    WEIGHTS_KEY,
    MixedFilesError,
    check_config,
    check_digests,
    load_by_weights,
    read_local,
)

log = logging.getLogger(__name__)

TRIES, PAUSE_SECONDS = 20, 0.02
"""How often, and how long after one another, files are read that are not of one save: another process
may be between renaming one and the other."""

SHIPPED = {"demo": Path(__file__).parent / "shipped" / "demo"}
"""Dictionaries that come with the package, by the names under which `load` knows them."""


@checked
def load(
    path_or_repo: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> ITDA:
    """Load an ITDA.

    Where the configuration holds digests of the weights, as `ITDA.save_model` writes them, the weights
    are compared with them. Where they do not belong together, as after a kill in the middle of a save,
    the weights decide: with the configuration that their own file holds they are the dictionary before
    that save. A warning is logged then. Files that another process is just replacing are read again.
    Paths of the model and the texts come from `itda_local.json`, where that is beside.

    Args:
        path_or_repo: a folder with `cfg.json` and `sae_weights.safetensors`. Where no such folder
            exists, "demo" is a small dictionary of SmolLM2 that comes with the package. Anything else
            is a dictionary on the Hugging Face hub (the only case in which the network is used):
            "org/name" of a repository that holds one dictionary, or "org/name/folder".
        device: where to put it.
        dtype: as which SAELens dtype name ("float32", "bfloat16", ...) or torch dtype; default: as it
            was saved, and float32 from the hub.
        revision: a branch, tag or commit of a repository on the hub; default: its main branch.

    Raises:
        FileNotFoundError: no such folder or repository, or files are missing from it.
        ValueError: the config or the weights are damaged, do not fit each other, are not of one save, or
            are not an ITDA's; the message names the file. Or device or dtype is not one, a folder is
            given with a revision, or a repository holds several dictionaries.
        OSError: the hub cannot be reached.
    """
    device_name, dtype_name = _device(device), _dtype(dtype)
    folder = Path(path_or_repo)
    if not folder.exists():
        folder = SHIPPED.get(str(path_or_repo), folder)
    if not folder.exists():
        folder = fetched(_on_hub(path_or_repo), revision)
        return _from_folder(folder, device_name, dtype_name or "float32")
    if revision is not None:
        raise ValueError(f"revision is for repositories on the hub; {folder} is a folder")
    for _ in range(TRIES - 1):
        try:
            return _from_folder(folder, device_name, dtype_name)
        except MixedFilesError:
            with suppress(MixedFilesError):
                return _by_weights(folder, device_name, dtype_name)
            time.sleep(PAUSE_SECONDS)
    return _from_folder(folder, device_name, dtype_name)


def dictionaries_in(folder: Path) -> list[Path]:
    """The folder itself if it holds a dictionary, else those of its subfolders that do, by layer."""
    if (folder / SAE_CFG_FILENAME).exists():
        return [folder]
    found = (config.parent for config in folder.glob(f"*/{SAE_CFG_FILENAME}"))
    return sorted(found, key=lambda inside: HookPoint.parse(inside.name).sort_key)


def is_dictionary(folder: Path) -> bool:
    """Whether the folder holds an ITDA and nothing else; leftovers of a killed run do not count."""
    if not folder.is_dir():
        return False
    found = {file.name for file in folder.iterdir() if not is_leftover(file)}
    if found - {SPARSITY_FILENAME, LOCAL_FILENAME} != {SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME}:
        return False
    try:
        return json.loads((folder / SAE_CFG_FILENAME).read_text())["architecture"] == "itda"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _from_folder(folder: Path, device: str, dtype: str | None) -> ITDA:
    config, weights = folder / SAE_CFG_FILENAME, folder / SAE_WEIGHTS_FILENAME
    for file in (config, weights):
        if not file.is_file():
            inside = dictionaries_in(folder) if folder.is_dir() else []
            hint = f"; it holds dictionaries: {', '.join(str(f) for f in inside)}" if inside else ""
            raise FileNotFoundError(f"no {file.name} in {folder}{hint}")
    _check_config_file(config)
    try:
        _check_floating(weights)
        # Cast afterwards: weights that were rounded could not be compared with their digests.
        itda = _checked(SAE.load_from_disk(folder, device=device), folder)
    except SafetensorError as error:
        raise ValueError(f"{weights} is truncated or damaged: {error}") from error
    except MixedFilesError as error:
        raise MixedFilesError(
            f"{weights} and {config} are not of one save: {error}; {_advice(folder)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{weights} or {config} is damaged: {error}") from error
    _check_labels(itda, config)
    if local := read_local(folder):
        provenance_of(itda).with_local(local).into(itda.cfg.metadata)
    return itda if dtype is None else itda.to(dtype=DTYPE_MAP[dtype])


def _by_weights(folder: Path, device: str, dtype: str | None) -> ITDA:
    """The dictionary that the weights file is of, by the configuration in its header."""
    weights = folder / SAE_WEIGHTS_FILENAME
    try:
        config, _ = load_by_weights(folder)
        _check_config(config)
        itda = _checked(SAE.load_from_disk(folder, device=device, converter=load_by_weights), folder)
    except MixedFilesError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{weights} is truncated or damaged: {error!r}") from error
    _check_labels(itda, weights)
    log.warning(
        "%s is not of the save that %s is of: loaded the dictionary that the weights are of, by the "
        "configuration in their file; save it again to settle this",
        folder / SAE_CFG_FILENAME, weights,
    )  # fmt: skip
    return itda if dtype is None else itda.to(dtype=DTYPE_MAP[dtype])


def _advice(folder: Path) -> str:
    """Advice after a kill between two renames, which leaves a new configuration beside old weights."""
    for file in folder.glob(f".*/{SAE_WEIGHTS_FILENAME}"):
        try:
            recorded = json.loads((folder / SAE_CFG_FILENAME).read_text())["metadata"][WEIGHTS_KEY]
            check_digests(load_file(file), recorded)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue
        return f"the weights of this configuration are in {file}: move them here"
    return "save the dictionary again, or put back the file that belongs to the other"


def _on_hub(name: str | Path) -> str:
    """The name, if it may be that of a repository on the hub, or of a dictionary in one."""
    parts = str(name).split("/")
    if not isinstance(name, str) or len(parts) < 2 or not all(part.strip(".") for part in parts):
        raise FileNotFoundError(
            f"no folder {str(name)!r} (a dictionary on the hub is named org/name or org/name/folder)"
        )
    return name


def _check_config_file(file: Path) -> None:
    try:
        config = json.loads(file.read_text())
        architecture = config["architecture"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is truncated or damaged: {said(error)}") from error
    if architecture != "itda":
        raise ValueError(
            f"{file.parent} holds a {architecture!r} SAE, not an ITDA; load it with SAELens"
        )
    try:
        _check_config(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a complete config: {error}") from error


def _check_config(config: dict[str, Any]) -> None:
    if "metadata" not in config:
        raise ValueError("the field 'metadata' is missing")
    check_config(config, [field.name for field in fields(ITDAConfig)])
    ITDAConfig.from_dict(config)


def _check_floating(file: Path) -> None:
    """SAELens casts what it reads, so that integers would pass for atoms."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            dtype = tensors.get_slice(name).get_dtype()
            if dtype not in ("F16", "BF16", "F32", "F64"):
                raise ValueError(f"{name} must be of 16, 32 or 64 bit floating numbers, got {dtype}")


def _check_labels(itda: ITDA, config: Path) -> None:
    if itda.cfg.metadata[LABELS_KEY] is not None:
        try:
            itda.labels  # noqa: B018
        except ValueError as error:
            raise ValueError(f"{config}: the field 'metadata.{LABELS_KEY}' holds {error}") from error


def _device(device: str | torch.device) -> str:
    try:
        return str(torch.device(device))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be one of torch's, such as 'cpu' or 'cuda', got {device!r}"
        ) from error


def _dtype(dtype: str | torch.dtype | None) -> str | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and (not isinstance(dtype, str | torch.dtype) or name not in DTYPE_MAP):
        names = ", ".join(key for key in DTYPE_MAP if "." not in key)
        raise ValueError(f"dtype must be one of {names} or None, got {dtype!r}")
    return None if dtype is None else name


def _checked(sae: object, source: object) -> ITDA:
    if not isinstance(sae, ITDA):
        raise ValueError(f"{source} holds a {type(sae).__name__}, not an ITDA")
    return sae

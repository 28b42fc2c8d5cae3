"""Files of a saved dictionary: checks that its configuration and its weights belong together, and a file
with paths that no other machine knows.

`cfg.json` holds, in its metadata under `WEIGHTS_KEY`, a digest of each tensor of the weights file. Only
`ITDA.save_model` writes it, and it lives in files only: a dictionary in memory may be edited. A
tool that writes a configuration with functions of its own writes none, and weights without digests are
not compared.

The header of the weights file holds the whole configuration once more, under `CONFIG_KEY`. Two files
cannot be renamed at once: whoever is killed between the two leaves a new `cfg.json` beside old weights.
The old weights still know their own configuration, so that the folder then holds the old dictionary.

`itda_local.json` holds the paths of this machine that the dictionary was built from. SAELens uploads
four files by their names, and this is none of them.
"""

import errno
import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import torch
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from itda_lens.records import BUILD_KEY, Provenance, replacing

logger = logging.getLogger(__name__)

LOCAL_FILENAME = "itda_local.json"
"""The file beside `cfg.json` with `Provenance.local`: folders of the model and the texts."""

WEIGHTS_KEY = "itda_weights"
"""The entry of the metadata: for each tensor, "DTYPE:BLAKE2B", such as "float32:91c1…". The digest is
BLAKE2b, 32 bytes in hexadecimal digits, of the numbers in row-major order, little-endian."""

CONFIG_KEY = "itda_cfg"
"""The entry of the weights file's header: the text of the `cfg.json` that was saved with it."""

MOST_HEADER = 2**25
"""Longest configuration, in bytes, that goes into a header; safetensors allows three times that."""

REQUIRED = (
    "d_in", "d_sae", "dtype", "apply_b_dec_to_input", "normalize_activations", "reshape_activations",
    "k", "signed", "method", "rtol", "threshold", "mirrored",
)  # fmt: skip
"""Fields that change codes. Every version has written them; a default in their place would be a
guess."""

_OTHERS = (
    "architecture", "metadata", "neuronpedia_id", "sae_lens_version", "sae_lens_training_version",
    "finetuning_scaling_factor",
)  # fmt: skip
"""Entries of a configuration that are no fields of it, and that SAELens may add."""

_DIGEST_BYTES = 32


class MixedFilesError(ValueError):
    """Weights and configuration are not of one save."""


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The entry of `WEIGHTS_KEY` for these tensors: a digest of each, by its name."""
    return {name: f"{_name(tensor.dtype)}:{_digest(tensor)}" for name, tensor in state.items()}


def check_digests(state: Mapping[str, Tensor], recorded: Mapping[str, str]) -> None:
    """Compare tensors with the digests that were saved with them.

    Loading may have cast them. A wider dtype is cast back, which is exact; numbers that were rounded to
    a narrower one cannot be compared, and are let through.

    Raises:
        MixedFilesError: a tensor is another one than was saved.
    """
    for name, entry in recorded.items():
        dtype_name, _, digest = entry.partition(":")
        dtype = getattr(torch, dtype_name, None)
        if name not in state or not isinstance(dtype, torch.dtype):
            raise MixedFilesError(f"{name} is not of the save that the configuration is of")
        tensor = state[name]
        rounded = torch.promote_types(tensor.dtype, dtype) != tensor.dtype
        if not rounded and _digest(tensor.to(dtype)) != digest:
            raise MixedFilesError(f"{name} is not of the save that the configuration is of")


def header_of(config: str) -> dict[str, str] | None:
    """The header of the weights file that is saved with this `cfg.json`."""
    return {CONFIG_KEY: config} if len(config.encode()) <= MOST_HEADER else None


def load_by_weights(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The dictionary that the weights file is of, whatever `cfg.json` says; a `converter` for SAELens.

    Returns:
        The configuration and the tensors.

    Raises:
        MixedFilesError: the header holds no configuration, or that of other weights.
        ValueError: the configuration there is damaged.
    """
    with safe_open(Path(path) / SAE_WEIGHTS_FILENAME, framework="pt", device=device) as file:
        text = (file.metadata() or {}).get(CONFIG_KEY)
        if text is None:
            raise MixedFilesError("the header holds no configuration")
        config: dict[str, Any] = json.loads(text)
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    check_digests(state, config["metadata"][WEIGHTS_KEY])
    return config | {"device": device} | (cfg_overrides or {}), state


def check_config(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse a saved configuration in which a field is missing, unknown or of another type.

    Args:
        config: the content of a `cfg.json`, or what `ITDAConfig.to_dict` gives.
        known: the fields of `ITDAConfig`, which itself checks their values.

    Raises:
        ValueError: the message names the field.
    """
    for name in REQUIRED:
        if name not in config:
            raise ValueError(f"the field {name!r} is missing")
    for name in config:
        if name not in known and name not in _OTHERS:
            raise ValueError(f"the field {name!r} is unknown: misspelt, or of a newer version")
    metadata = config["metadata"]
    _check_type("metadata", metadata, dict)
    if "sae_lens_version" not in metadata:
        # SAELens takes it for a file of its versions before 6, and drops the entries of later ones.
        raise ValueError("the field 'metadata' is missing, or in it 'sae_lens_version'")
    build = metadata.get(BUILD_KEY)
    _check_type(f"metadata.{BUILD_KEY}", build, dict | None)
    hints = get_type_hints(Provenance)
    for field in fields(Provenance):
        for where, entries in (("metadata", metadata), (f"metadata.{BUILD_KEY}", build or {})):
            if field.name in entries and field.name != "others":
                hint = hints[field.name]
                hint = hint if isinstance(hint, UnionType | type) else dict
                _check_type(f"{where}.{field.name}", entries[field.name], hint | None)
    recorded = metadata.get(WEIGHTS_KEY)
    _check_type(f"metadata.{WEIGHTS_KEY}", recorded, dict | None)
    for name, entry in (recorded or {}).items():
        _check_type(f"metadata.{WEIGHTS_KEY}.{name}", entry, str)


def write_tensors(
    state: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """safetensors' `save_file`, with errors of the system as such.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        text = str(error).split("\n")[0].removeprefix("Error while serializing: ")
        raise OSError(code, text.removeprefix("I/O error: "), str(file)) from error


def write_local(folder: Path, provenance: Provenance) -> None:
    """Keep the paths of a dictionary's record in `LOCAL_FILENAME`; without any, there is no such file.

    Raises:
        OSError: the file cannot be written.
    """
    file = folder / LOCAL_FILENAME
    if not provenance.local:
        file.unlink(missing_ok=True)
        return
    with replacing(file) as (temporary,):
        temporary.write_text(json.dumps(provenance.local, indent=2))


def read_local(folder: Path) -> dict[str, str]:
    """The entries of `LOCAL_FILENAME`; none where the file is missing.

    A damaged file is reported in the log and passed over, since a dictionary is whole without it.
    """
    file = folder / LOCAL_FILENAME
    try:
        local = json.loads(file.read_text())
        if not isinstance(local, dict) or not all(isinstance(value, str) for value in local.values()):
            raise ValueError("no object of strings")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is damaged and was not read: %s", file, error)
        return {}
    return local


def _check_type(field: str, value: Any, wanted: Any) -> None:
    allowed = wanted | int if isinstance(0.0, wanted) else wanted
    wrong_bool = isinstance(value, bool) and bool not in (get_args(wanted) or (wanted,))
    if not isinstance(value, allowed) or wrong_bool:
        kind = getattr(wanted, "__name__", str(wanted)).replace("NoneType", "None")
        raise ValueError(f"the field {field!r} must be of type {kind}, got {value!r}")


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.stride(0) != 1:  # of one number or none, which count as contiguous with any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    numbers = flat.view(torch.uint8).numpy()
    return hashlib.blake2b(numbers.data, digest_size=_DIGEST_BYTES).hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

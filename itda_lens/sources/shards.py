"""Rows of a source in one file: numbers, places and the batches they came in."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from itda_lens.records import Places, replacing
from itda_lens.sources.source import Rows

StoredAs = Literal["exact", "float32", "bfloat16", "float16"]
"""How numbers are stored. "exact": in the narrowest dtype that holds all of a shard's numbers as they
are, which is the dtype of the model that they came from, or a narrower one."""

_NARROW = torch.bfloat16, torch.float16, torch.float32
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PLACES = "places."
_BLOCK = 2**20


class Shard(NamedTuple):
    """A shard's entry in the record of its cache.

    Attributes:
        file: its name.
        rows: the number of its rows.
        last: the number of rows of its last batch.
        bytes: its size.
        sha256: the digest of all of it.
    """

    file: str
    rows: int
    last: int
    bytes: int
    sha256: str


def write_shard(path: Path, parts: Sequence[Rows], hooks: Sequence[str], stored_as: StoredAs) -> Shard:
    """Write batches of rows to a file, which appears whole or not at all.

    Raises:
        OSError: it cannot be written.
        ValueError: a number is too large for `stored_as`.
    """
    places = Places.joined([part.places for part in parts])
    tensors = {
        f"values.{i}": _stored(torch.cat([part.values[hook] for part in parts]), hook, stored_as)
        for i, hook in enumerate(hooks)
    }
    tensors |= {f"{_PLACES}{name}": torch.from_numpy(a) for name, a in places.state().items()}
    sizes = [len(part.places) for part in parts]
    tensors["batches"] = torch.tensor(sizes)
    with replacing(path) as (temporary,):
        save_file(tensors, temporary)
        digest, size = sha256_of(temporary), temporary.stat().st_size
    return Shard(path.name, len(places), sizes[-1], size, digest)


def read_shard(path: Path, hooks: Mapping[str, torch.dtype], skip: int = 0) -> Iterator[Rows]:
    """The batches of a shard, in the dtypes that they had; a batch is read when it is asked for.

    Args:
        path: the file.
        hooks: the dtype of the rows at each hook point, in the order in which they were written.
        skip: rows to leave out at the beginning.

    Raises:
        ValueError: the file is no shard.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = {
                name.removeprefix(_PLACES): file.get_tensor(name).numpy()
                for name in file.keys()  # noqa: SIM118 (no dict)
                if name.startswith(_PLACES)
            }
            places = Places.restored(state)
            values = {hook: file.get_slice(f"values.{i}") for i, hook in enumerate(hooks)}
            ends = np.cumsum(file.get_tensor("batches").numpy()).tolist()
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                part = slice(max(start, skip), end)
                if part.start < part.stop:
                    x = {hook: values[hook][part].to(dtype) for hook, dtype in hooks.items()}
                    yield Rows(places[part], x)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no shard of a cache: {error}") from error


def sha256_of(path: Path) -> str:
    """The digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _stored(x: Float[Tensor, "n d"], hook: str, stored_as: StoredAs) -> Tensor:
    x = x.cpu()
    if stored_as == "exact":
        for dtype in _NARROW:
            if dtype == x.dtype or torch.equal(x.to(dtype).to(x.dtype), x):
                return x.to(dtype)
        return x
    stored = x.to(_DTYPES[stored_as])
    if not torch.isfinite(stored).all():
        raise ValueError(
            f"dtype must hold all activations, but {x.abs().max():.3g} at {hook!r} is too large for "
            f"{stored_as!r}"
        )
    return stored

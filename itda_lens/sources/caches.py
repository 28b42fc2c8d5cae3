"""Activations kept on a disk: a source is read once, and its cache as often as one likes."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from itda_lens.records import Places, Provenance, at_least, checked, replacing
from itda_lens.records.files import alone_in
from itda_lens.sources.shards import Shard, StoredAs, read_shard, sha256_of, write_shard
from itda_lens.sources.source import ActivationSource, Rows

logger = logging.getLogger(__name__)

RECORD = "cache.json"
"""The file of a cache that says which source made it and lists its shards."""

FORMAT = 1
"""The form of the record and of the shards. Folders of a later form are refused."""

UNFINISHED = ".unfinished"
"""The end of a folder's name while the cache in it is not complete."""

CLOSE = 0.02
"""The most by which rows of the same model may differ from those in the cache, as |x - y| / |x| over one
batch. Another device or another number of threads differs by less than a tenth of this in bfloat16;
another model of the same name, by more."""

_FOUND_OUT = ("seconds", "n_tokens", "texts_read_sha256", "recipe", "versions")
"""Facts that are known only once a source was read, or that say nothing of it."""


@checked
def cache(
    source: ActivationSource,
    folder: str | Path,
    *,
    dtype: StoredAs = "exact",
    shard_bytes: int = 2**28,
    progress: bool = True,
) -> "CachedSource":
    """Keep the rows of a source in a folder, and give the source that reads them from there.

    If the folder holds the cache of this source already, it is used; nothing but the source's first
    batch is read, to see that the model is the same. `folder` appears when the cache is complete. Until
    then the shards are in a folder beside it whose name ends in ".unfinished". A run that is stopped or
    killed goes on from there when `cache` is called again.

    Args:
        source: where activations come from.
        folder: where to keep them.
        dtype: "exact" stores each shard in the narrowest dtype that holds its numbers as they are: a
            model in bfloat16 takes two bytes a number. A dictionary built from the cache is then that of
            the source, bit for bit. "bfloat16" and "float16" round numbers of other models.
        shard_bytes: bytes of activations, in float32, that go into one file. As much memory is needed.
        progress: show a progress bar.

    Raises:
        ValueError: the folder holds the cache of another source or something else, or a damaged cache;
            or the source gives no rows, or bad ones.
        BlockingIOError: another process is writing this cache.
        OSError: the folder cannot be written.
    """
    at_least(1, shard_bytes=shard_bytes)
    folder = Path(folder)
    made_by = _made_by(source, dtype)
    if _is_there(folder):
        return _existing(folder, made_by, source)
    work = folder.with_name(folder.name + UNFINISHED)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    with alone_in(work):
        if _is_there(folder):  # another process has just finished it
            if work.exists() and not any(work.iterdir()):
                work.rmdir()
            return _existing(folder, made_by, source)
        record = _begun(work, made_by)
        _write(source, work, record, dtype, shard_bytes, progress)
        if folder.exists():  # an empty folder
            folder.rmdir()
        os.replace(work, folder)
    return CachedSource(folder)


class CachedSource:
    """The rows that `cache` has kept in a folder: the same rows, places and batches each time.

    Files are mapped, not loaded. Their sizes are checked on construction, and the checksum of each when
    it is first read.

    Args:
        folder: the folder.
        made_by: refuse the cache unless this source made it; default: any cache is welcome.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no complete cache, or the cache of another source; a shard is missing or
            damaged.
    """

    @checked
    def __init__(self, folder: str | Path, *, made_by: ActivationSource | None = None) -> None:
        self.folder = Path(folder)
        self._record = _record_of(self.folder)
        if made_by is not None:
            self._check_made_by(_made_by(made_by, self._record["made_by"]["dtype"]))
        self._shards = _shards_of(self.folder, self._record)
        self._dtypes = _dtypes_of(self.folder, self._record)
        for shard in self._shards:
            self._check_size(shard)
        self._sound: set[str] = set()
        self.hooks = list(self._dtypes)
        self.n_rows = sum(shard.rows for shard in self._shards)

    @torch.no_grad()
    def rows(self, skip: int = 0) -> Iterator[Rows]:
        """The rows, in the batches of the source; see `ActivationSource.rows`.

        Raises:
            ValueError: a shard is damaged.
        """
        start = 0
        for shard in self._shards:
            if start + shard.rows > skip:
                self._check_sum(shard)
                yield from read_shard(self.folder / shard.file, self._dtypes, max(0, skip - start))
            start += shard.rows

    def provenance(self, hook: str) -> Provenance:
        """The provenance that the source had when it was read."""
        return Provenance(**self._record["provenance"][hook])

    def _check_size(self, shard: Shard) -> None:
        path = self.folder / shard.file
        if not path.is_file():
            raise ValueError(f"the cache {self.folder} is damaged: its shard {shard.file} is missing")
        size = path.stat().st_size
        if size != shard.bytes:
            raise ValueError(
                f"the cache {self.folder} is damaged: its shard {shard.file} has {size} bytes, but "
                f"{shard.bytes} were written"
            )

    def _check_sum(self, shard: Shard) -> None:
        if shard.file in self._sound:
            return
        self._check_size(shard)
        if sha256_of(self.folder / shard.file) != shard.sha256:
            raise ValueError(
                f"the cache {self.folder} is damaged: its shard {shard.file} has another checksum than "
                "when it was written"
            )
        self._sound.add(shard.file)

    def _check_made_by(self, made_by: Mapping[str, Any]) -> None:
        _check_same_source(self.folder, self._record["made_by"], made_by)


def _is_there(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _existing(folder: Path, made_by: Mapping[str, Any], source: ActivationSource) -> CachedSource:
    found = CachedSource(folder)
    found._check_made_by(made_by)
    with closing(source.rows()) as rows:  # pyright: ignore[reportArgumentType]
        first = next(rows, None)
    _check_same_rows(folder, next(found.rows()), first)
    return found


def _begun(work: Path, made_by: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run that was stopped, or of a fresh one."""
    fresh = {
        "format": FORMAT, "complete": False, "made_by": made_by, "made_by_sha256": _digest(made_by),
        "dtypes": {}, "provenance": {}, "shards": [],
    }  # fmt: skip
    if not (work / RECORD).exists():
        return fresh
    record = _record_of(work, complete=False)
    _check_same_source(work, record["made_by"], made_by)
    return record


def _write(
    source: ActivationSource, work: Path, record: dict[str, Any], stored_as: StoredAs,
    shard_bytes: int, progress: bool,
) -> None:  # fmt: skip
    shards = _shards_of(work, record)
    done = sum(shard.rows for shard in shards)
    again = shards[-1].last if shards else 0
    if shards:
        logger.info("%s: going on after %d rows", work, done)
    parts: list[Rows] = []
    held = 0

    def flush() -> None:
        nonlocal parts, held
        path = work / f"rows-{len(shards):06d}.safetensors"
        shards.append(write_shard(path, parts, list(source.hooks), stored_as))
        record["shards"] = [shard._asdict() for shard in shards]
        _save(work, record)
        parts, held = [], 0

    with tqdm(
        total=source.n_rows, initial=done, unit="tok", unit_scale=True, desc="caching",
        disable=not progress,
    ) as bar:  # fmt: skip
        for rows in source.rows(done - again):
            if again:  # the last batch that is stored: it shows that the source is the same
                stored = _last_batch(work / shards[-1].file, record, again, shards[-1].rows)
                _check_same_rows(work, stored, rows)
                again = 0
                continue
            record["dtypes"] = record["dtypes"] or {
                hook: str(rows.values[hook].dtype).removeprefix("torch.") for hook in source.hooks
            }
            # Copies: a source may give views of its own buffers.
            parts.append(Rows(rows.places, {hook: x.clone() for hook, x in rows.values.items()}))
            held += 4 * sum(x.numel() for x in rows.values.values())
            bar.update(len(rows.places))
            if held >= shard_bytes:
                flush()
        if again:
            raise ValueError(
                f"{work} holds {done} rows, but the source gives fewer: it is another source"
            )
        if parts:
            flush()
    if not shards:
        raise ValueError("the source must give at least one row, got none")
    record["provenance"] = {hook: _plain(source.provenance(hook)) for hook in source.hooks}
    record["complete"] = True
    _save(work, record)


def _last_batch(path: Path, record: Mapping[str, Any], n: int, n_rows: int) -> Rows:
    return next(read_shard(path, _dtypes_of(path.parent, record), n_rows - n))


def _shards_of(folder: Path, record: Mapping[str, Any]) -> list[Shard]:
    try:
        shards = [Shard(**entry) for entry in record["shards"]]
        if all(Path(shard.file).name == shard.file for shard in shards):
            return shards
    except TypeError:
        pass
    raise ValueError(f"the cache {folder} is damaged: {RECORD} lists no shards of a cache")


def _dtypes_of(folder: Path, record: Mapping[str, Any]) -> dict[str, torch.dtype]:
    known = {"float32": torch.float32, "float64": torch.float64}
    if not set(record["dtypes"].values()) <= set(known):
        raise ValueError(f"the cache {folder} is damaged: {RECORD} names no dtypes of rows")
    return {hook: known[name] for hook, name in record["dtypes"].items()}


def _save(work: Path, record: Mapping[str, Any]) -> None:
    with replacing(work / RECORD) as (temporary,):
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _record_of(folder: Path, complete: bool = True) -> dict[str, Any]:
    work = folder.with_name(folder.name + UNFINISHED)
    if not folder.is_dir():
        more = f"; {work.name} is not finished: call cache again to go on" if work.is_dir() else ""
        raise FileNotFoundError(f"there is no folder {folder}{more}")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no cache of activations: it has no {RECORD}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the cache {folder} is damaged: {RECORD} is no JSON: {error}") from error
    if not isinstance(record, dict) or not {"format", "complete", "shards", "dtypes"} <= set(record):
        raise ValueError(f"{folder} is no cache of activations: {RECORD} is another file")
    if record["format"] != FORMAT:
        raise ValueError(
            f"the cache {folder} is of form {record['format']}, and this version reads form {FORMAT}"
        )
    if complete and not record["complete"]:
        raise ValueError(f"the cache {folder} is not finished: call cache again to go on")
    if record["made_by_sha256"] != _digest(record["made_by"]):
        raise ValueError(f"the cache {folder} is damaged: {RECORD} was changed")
    return record


def _made_by(source: ActivationSource, dtype: str) -> dict[str, Any]:
    """The facts that tell a source from others before it is read, as plain data."""
    facts: dict[str, Any] = {
        "source": type(source).__name__, "hooks": list(source.hooks), "n_rows": source.n_rows,
        "dtype": dtype,
    }  # fmt: skip
    known = _plain(source.provenance(source.hooks[0]))
    facts |= {name: value for name, value in known.items() if name not in ("hook_name", *_FOUND_OUT)}
    return json.loads(json.dumps(facts))


def _digest(made_by: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


def _plain(provenance: Provenance) -> dict[str, Any]:
    known = {field.name: asdict(provenance)[field.name] for field in fields(provenance)}
    return {name: value for name, value in known.items() if value is not None and value != {}}


def _check_same_source(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differ = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differ:
        said = "; ".join(
            f"{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in differ
        )
        raise ValueError(f"{folder} is the cache of another source: {said}")


def _check_same_rows(folder: Path, stored: Rows, given: Rows | None) -> None:
    """Refuse a source of other places or numbers, such as another model of the same name."""
    if given is None or not _same_places(stored.places, given.places):
        raise ValueError(f"{folder} is the cache of another source: its rows are of other places")
    for hook, x in stored.values.items():
        y = given.values[hook].to(x)
        if x.shape != y.shape or (x - y).norm() > CLOSE * x.norm():
            raise ValueError(
                f"{folder} is the cache of another model: at {hook!r} the source now gives other "
                "activations for the same places"
            )


def _same_places(a: Places, b: Places) -> bool:
    return a == b and bool((a.identity == b.identity).all())

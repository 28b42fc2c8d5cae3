"""Texts from wherever the user has them."""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from itda_lens.records import converted

_ENCODING = "utf-8-sig"
"""UTF-8; a byte-order mark at the start is no part of the text."""

LINES = (".jsonl", ".ndjson")
"""Suffixes, in any case, of files that hold a JSON object a line."""

NOT_READ = (".csv", ".tsv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip")
"""Suffixes of files that are no text, or many texts in a form that is not read here."""

_SUFFIXES = (".txt", ".text", ".md", ".json", *LINES, *NOT_READ)
_DATA_SET_FILES = (".json", *LINES, *NOT_READ)


def iterate_texts(
    texts: str | Path | Iterable[str], *, text_field: str = "text", split: str = "train"
) -> Iterator[str]:
    """One text after the other.

    Args:
        texts: one of

            - a list or iterator of strings;
            - a `datasets.Dataset` or `IterableDataset`, of which the column `text_field` is read;
            - the path of a file, in UTF-8 with or without a byte-order mark: `.jsonl` or `.ndjson` (a
              JSON object a line), `.json` (a list of strings or of objects), or any other text file,
              which is one text;
            - the name of a `datasets` data set, or a local folder that holds one, which is streamed.
        text_field: field of a JSON object or data set row that holds the text.
        split: split of a data set that is named.

    Raises:
        ValueError: `texts` is a string that names no file and no data set, a folder without a data set,
            a file of a form that is not read, or a `DatasetDict`, of which a split must be chosen; a
            line or row is not what it should be; or a text has a lone surrogate, which no tokenizer
            reads.
        TypeError: an item is not a string, or `texts` is a set or a table.
    """
    for name, value in (("text_field", text_field), ("split", split)):
        converted(name, value, str)
    if not isinstance(texts, str | Path):
        return _readable(_from_iterable(texts, text_field), text_field)
    return _readable(iterate_fields(texts, field=text_field, split=split), text_field)


def iterate_fields(source: str | Path, *, field: str, split: str) -> Iterator[tuple[str, Any]]:
    """The values of one field in the items of a file or data set, of any type.

    Returns:
        Pairs of the item's place in words, for messages, and the value.

    Raises:
        ValueError: as `iterate_texts`, except for the type of a value.
    """
    if names_data_set(source):
        return _from_data_set(source, field, split)
    return _from_file(Path(source), field)


def names_data_set(texts: str | Path | Iterable[str]) -> bool:
    """Whether `texts` is the name of a data set: a string or path that is no file."""
    return isinstance(texts, str | Path) and not _is_file(texts)


def describe_texts(texts: str | Path | Iterable[str], text_field: str, split: str) -> dict[str, str]:
    """Metadata entries about where the texts came from: an absolute path, or a data set's name."""
    if not isinstance(texts, str | Path):
        return {"texts": type(texts).__name__}
    source = os.path.abspath(texts) if _exists(texts) else str(texts)
    known = {"texts": source, "text_field": text_field}
    return known | {"split": split} if names_data_set(texts) else known


def check_text(text: str, where: str) -> None:
    """Refuse a text that no tokenizer reads.

    Raises:
        ValueError: it has a lone surrogate; the message begins with `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} is no valid text: character {error.start} is the lone surrogate "
            f"{text[error.start]!r}"
        ) from error


def _is_file(name: str | Path) -> bool:
    return _exists(name) and Path(name).is_file()


def _exists(name: str | Path) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a file name, or no name at all: a text
        return False


def _readable(texts: Iterable[tuple[str, Any]], text_field: str) -> Iterator[str]:
    """Pass texts on without their places, and refuse those that no tokenizer reads."""
    for where, text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{where}: {text_field!r} is not a string")
        check_text(text, where)
        yield text


def _from_iterable(texts: Iterable[Any], text_field: str) -> Iterator[tuple[str, str]]:
    kind = type(texts).__name__
    if isinstance(texts, Mapping):  # also datasets' DatasetDict and IterableDatasetDict
        raise ValueError(
            f"texts must be strings, got {kind}; choose one of its parts: texts[name], with name one of "
            f"{_few(texts)}"
        )
    if isinstance(texts, Set):
        raise TypeError(
            f"texts must be in an order that can be repeated, got a {kind}; pass a sorted list"
        )
    if hasattr(texts, "iterrows"):  # a pandas table, which gives the names of its columns
        raise TypeError(f"texts must be strings, got a {kind}; pass one of its columns")
    try:
        iterator = iter(texts)
    except TypeError as error:
        raise TypeError(
            f"texts must be strings, a file or the name of a data set, got {texts!r}"
        ) from error
    if type(texts).__module__.split(".")[0] == "datasets" and hasattr(texts, "column_names"):
        yield from _from_rows(iterator, text_field, kind)
        return
    for index, text in enumerate(iterator):
        if not isinstance(text, str):
            chat = isinstance(text, list | Mapping)
            raise TypeError(
                f"texts must be strings, but text {index} is {type(text).__name__}"
                + ("; conversations are passed as itda_lens.Chats(conversations)" if chat else "")
            )
        yield f"text {index}", text


def _from_file(path: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix in NOT_READ:
        raise ValueError(
            f"texts must be a text file, .jsonl, .ndjson or .json, got {str(path)!r}; read other files "
            "yourself (with datasets or pandas) and pass the strings"
        )
    if suffix in LINES:
        yield from _from_lines(path, text_field)
        return
    try:
        text = path.read_text(encoding=_ENCODING)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if suffix != ".json":
        yield str(path), text
        return
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no JSON: {error}; a file with an object a line must end in .jsonl or .ndjson"
        ) from error
    if not isinstance(items, list):
        raise ValueError(f"{path} must hold a JSON list of strings or objects, not one {_json(items)}")
    for index, item in enumerate(items):
        where = f"item {index} of {path}"
        yield where, item if isinstance(item, str) else _field(item, text_field, where)


def _from_lines(path: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, data in enumerate(lines, start=1):
            where = f"line {number} of {path}"
            try:
                line = data.decode(_ENCODING if number == 1 else "utf-8")
                if not line.strip():
                    continue
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where} is no JSON object with a field {text_field!r}: {error!r}"
                ) from error
            yield where, _field(item, text_field, where)


def _from_data_set(texts: str | Path, text_field: str, split: str) -> Iterator[tuple[str, Any]]:
    name = str(texts)
    if len(name) <= 200 and name and Path(name).is_dir():
        _check_folder(Path(name))
    elif _names_no_data_set(texts):
        if len(name) <= 200 and not any(character.isspace() for character in name):
            raise ValueError(f"texts={name!r} is neither a file nor a data set: no such file is there")
        raise ValueError(
            "texts is a string that is neither a file nor a data set's name; to use one text, pass "
            f"[text]. It begins: {name[:60]!r}"
        )

    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split, streaming=True)
    except Exception as error:  # datasets raises many kinds; all mean that there is no such data
        raise ValueError(
            f"texts={name!r} is neither a file nor a data set that can be loaded: {error}"
        ) from error
    yield from _from_rows(rows, text_field, f"data set {name!r}")


def _from_rows(rows: Iterable[Any], text_field: str, source: str) -> Iterator[tuple[str, Any]]:
    for index, row in enumerate(rows):
        where = f"row {index} of {source}"
        if text_field not in row:
            raise ValueError(f"{where} has no field {text_field!r}, only {sorted(row)}")
        yield where, _field(row, text_field, where)


def _field(item: Any, text_field: str, where: str) -> Any:
    """The value of a field in an object of a file or data set."""
    if not isinstance(item, Mapping) or text_field not in item:
        raise ValueError(f"{where} is no JSON object with a field {text_field!r}, but {_json(item)}")
    return item[text_field]


def _check_folder(folder: Path) -> None:
    """Refuse a folder in which `datasets` would find nothing, or a text in every line."""
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        raise ValueError(
            f"texts={str(folder)!r} was saved by save_to_disk: pass datasets.load_from_disk of it, or "
            "one of its splits"
        )
    inside = itertools.chain(folder.glob("*"), folder.glob("*/*"))
    if not any(path.suffix.lower() in _DATA_SET_FILES for path in inside):
        raise ValueError(
            f"texts={str(folder)!r} is a folder without a data set; pass the files in it one by one, or "
            "their texts as a list"
        )


def _names_no_data_set(texts: str | Path) -> bool:
    """Whether it can only be meant as a file or a text: data sets are called `name` or `owner/name`."""
    name = str(texts)
    return (
        isinstance(texts, Path)
        or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is None
        or Path(name).suffix.lower() in _SUFFIXES
        or len(name) > 200
    )


def _json(item: Any) -> str:
    """A description of an item, with the fields of an object, for messages."""
    if isinstance(item, Mapping):
        return f"an object with {_few(item)}"
    return {str: "a string", list: "a list", type(None): "null"}.get(type(item), type(item).__name__)


def _few(names: Iterable[Any], most: int = 10) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") or "nothing"

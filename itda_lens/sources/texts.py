"""Texts from wherever the user has them."""

import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, BinaryIO

from itda_lens.records import converted
from itda_lens.records.files import said

Ids = tuple[int, ...]
"""A text as the ids of its tokens, by the model's own tokenizer."""

_ENCODING = "utf-8-sig"
"""UTF-8; a byte-order mark at the start is no part of the text."""

LINES = (".jsonl", ".ndjson")
"""Suffixes, in any case, of files that hold a JSON object a line."""

PACKED = ".gz"
"""Suffix of a packed file; the suffix before it says what is inside."""

NOT_READ = (".csv", ".tsv", ".parquet", ".arrow", ".bz2", ".xz", ".zst", ".zip")
"""Suffixes of files that are no text, or many texts in a form that is not read here."""

ID_FIELDS = ("input_ids", "tokens")
"""Fields in which data sets that are tokenised already keep ids."""

SECONDS = 10.0
"""How long the hub may take to say whether it has a data set."""

_SUFFIXES = (".txt", ".text", ".md", ".json", PACKED, *LINES, *NOT_READ)
_DATA_SET_FILES = (".json", *LINES, *NOT_READ)


def iterate_texts(
    texts: str | Path | Iterable[Any], *, text_field: str = "text", split: str = "train"
) -> Iterator[str | Ids]:
    """One text after the other.

    Args:
        texts: one of

            - a list or iterator of strings, or of dicts with the text in the field `text_field`;
            - a `datasets.Dataset` or `IterableDataset`, of which the column `text_field` is read;
            - the path of a file, in UTF-8 with or without a byte-order mark: `.jsonl` or `.ndjson` (a
              JSON object a line), `.json` (a list of strings or of objects), or any other text file,
              which is one text; each may be packed, as `.txt.gz`;
            - a folder of text files, each of which is one text: all that are in it and below, by name,
              but for hidden ones;
            - the name of a `datasets` data set, or a local folder that holds one (`.jsonl`, `.parquet`
              and the like), which is streamed. A configuration follows a colon: "owner/name:config".

            In place of a string there may be the ids of its tokens: a list or tuple of whole numbers, or
            a tensor or array of one dimension.
        text_field: field of a JSON object or data set row that holds the text, or its ids.
        split: split of a data set that is named.

    Raises:
        ValueError: `texts` is a string that names no file and no data set, a folder without either, a
            file of a form that is not read, or a `DatasetDict`, of which a split must be chosen; a
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
    """The values of one field in the items of a file, folder or data set, of any type.

    Returns:
        Pairs of the item's place in words, for messages, and the value.

    Raises:
        ValueError: as `iterate_texts`, except for the type of a value.
    """
    if names_data_set(source):
        return _from_data_set(source, field, split)
    path = Path(source)
    return _from_folder(path) if path.is_dir() else _from_file(path, field)


def names_data_set(texts: str | Path | Iterable[Any]) -> bool:
    """Whether `texts` is the name of a data set: a string or path that is no file and no folder of text
    files."""
    return isinstance(texts, str | Path) and not _is_file(texts) and not _is_folder_of_texts(texts)


def describe_texts(texts: str | Path | Iterable[Any], text_field: str, split: str) -> dict[str, str]:
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


def _is_folder_of_texts(name: str | Path) -> bool:
    try:
        folder = Path(name)
        return str(name) != "" and folder.is_dir() and not _holds_data_set(folder)
    except (OSError, ValueError):
        return False


def _holds_data_set(folder: Path) -> bool:
    """Whether there are files in a folder, or in those directly below it, that `datasets` reads."""
    inside = itertools.chain(folder.glob("*"), folder.glob("*/*"))
    return any(_suffix(path) in _DATA_SET_FILES or _is_saved(path) for path in inside)


def _is_saved(path: Path) -> bool:
    return path.name in ("dataset_dict.json", "state.json")


def _suffix(path: Path) -> str:
    """The suffix that says what is in a file, in lower case."""
    inner = path.with_suffix("") if path.suffix.lower() == PACKED else path
    return inner.suffix.lower()


def _readable(items: Iterable[tuple[str, Any]], text_field: str) -> Iterator[str | Ids]:
    """Texts without their places. Whatever no tokenizer reads is refused."""
    for where, item in items:
        text = _text(item)
        if text is None:
            raise ValueError(f"{where}: {text_field!r} is not a string, nor a list of token ids")
        if isinstance(text, str):
            check_text(text, where)
        elif text and min(text) < 0:
            raise ValueError(f"{where} is no list of token ids: it holds {min(text)}")
        yield text


def _from_iterable(texts: Iterable[Any], text_field: str) -> Iterator[tuple[str, Any]]:
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
    for index, item in enumerate(iterator):
        where = f"text {index}"
        is_chat = _is_chat(item, text_field)
        if isinstance(item, Mapping) and not is_chat:
            item = _field(item, text_field, where)
        elif _text(item) is None:
            raise TypeError(
                f"texts must be strings or lists of token ids, but {where} is {type(item).__name__}"
                + ("; conversations are passed as itda_lens.Chats(conversations)" if is_chat else "")
            )
        yield where, item


def _is_chat(item: Any, text_field: str) -> bool:
    """Whether it looks like a conversation, an object that holds one, or a message."""
    if isinstance(item, Mapping):
        return text_field not in item and not {"messages", "role"}.isdisjoint(item)
    return isinstance(item, list) and any(isinstance(one, Mapping) for one in item)


def _from_folder(folder: Path) -> Iterator[tuple[str, Any]]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    shown = [name for name in sorted(files) if not any(part[0] == "." for part in name.split("/"))]
    if not shown:
        raise ValueError(f"texts={str(folder)!r} is a folder without a text file or data set")
    for name in shown:
        yield from _from_file(files[name], "")  # there is no field in a text


def _opened(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix.lower() == PACKED else path.open("rb")


def _from_file(path: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    try:
        yield from _from_opened(path, text_field)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no {PACKED} file, or a damaged one: {error}") from error


def _from_opened(path: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    suffix = _suffix(path)
    if suffix in NOT_READ:
        raise ValueError(
            f"texts must be a text file, .jsonl, .ndjson or .json, got {str(path)!r}; read other files "
            "yourself (with datasets or pandas) and pass the strings"
        )
    if suffix in LINES:
        yield from _from_lines(path, text_field)
        return
    try:
        with _opened(path) as file:
            text = file.read().decode(_ENCODING)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # line ends, as when a text file is opened
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
        yield where, _field(item, text_field, where) if _text(item) is None else item


def _from_lines(path: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    with _opened(path) as lines:
        for number, data in enumerate(lines, start=1):
            where = f"line {number} of {path}"
            try:
                line = data.decode(_ENCODING if number == 1 else "utf-8")
                if not line.strip():
                    continue
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where} is no JSON object with a field {text_field!r}: {said(error)}"
                ) from error
            yield where, _field(item, text_field, where)


def _from_data_set(texts: str | Path, text_field: str, split: str) -> Iterator[tuple[str, Any]]:
    name = str(texts)
    is_folder = len(name) <= 200 and name != "" and Path(name).is_dir()
    if is_folder:
        _check_folder(Path(name))
    elif _names_no_data_set(texts):
        if len(name) <= 200 and not any(character.isspace() for character in name):
            raise ValueError(f"texts={name!r} is neither a file nor a data set: no such file is there")
        raise ValueError(
            "texts is a string that is neither a file nor a data set's name; to use one text, pass "
            f"[text]. It begins: {name[:60]!r}"
        )
    base, _, configuration = (name, "", "") if is_folder else name.partition(":")
    if not Path(base).is_dir():
        _check_hub(base)

    from datasets import load_dataset

    try:
        rows = load_dataset(base, configuration or None, split=split, streaming=True)
    except Exception as error:  # datasets raises many kinds; all mean that there is no such data
        hint = "; name one as in 'owner/name:config'" if "onfig name is missing" in str(error) else ""
        raise ValueError(
            f"texts={name!r} is neither a file nor a data set that can be loaded: {error}{hint}"
        ) from error
    yield from _from_rows(rows, text_field, f"data set {name!r}")


def _check_hub(name: str) -> None:
    """Refuse a data set that the hub does not have, after one request: `datasets` would try six times.

    Raises:
        ValueError: the hub does not have it, or there is no way to the hub.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return  # what datasets has kept may do
    folder = Path(name).parent
    here = f" (the folder {str(folder)!r} has no such file)" if "/" in name and folder.is_dir() else ""
    try:
        HfApi().dataset_info(name, timeout=SECONDS)
    except GatedRepoError:
        return  # datasets says how to get access
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"texts={name!r} is neither a file{here} nor a data set on the hub (or it is a private one, "
            "which needs a login)"
        ) from error
    except HfHubHTTPError:
        return  # the hub has trouble: datasets tries again
    except Exception as error:  # of httpx or requests, by the hub's version
        raise ValueError(
            f"texts={name!r} is no file{here}, and the hub, where it could be a data set, cannot be "
            f"reached: {error}"
        ) from error


def _from_rows(rows: Iterable[Any], text_field: str, source: str) -> Iterator[tuple[str, Any]]:
    for index, row in enumerate(rows):
        where = f"row {index} of {source}"
        if text_field not in row:
            ids = next((name for name in ID_FIELDS if name in row), None)
            hint = "" if ids is None else f"; for token ids pass text_field={ids!r}"
            raise ValueError(f"{where} has no field {text_field!r}, only {sorted(row)}{hint}")
        yield where, _field(row, text_field, where)


def _field(item: Any, text_field: str, where: str) -> Any:
    """The value of a field in an object of a file or data set."""
    if not isinstance(item, Mapping) or text_field not in item:
        raise ValueError(f"{where} is no JSON object with a field {text_field!r}, but {_json(item)}")
    return item[text_field]


def _text(item: Any) -> str | Ids | None:
    """A text or ids; None if it is neither."""
    if isinstance(item, str):
        return item
    if hasattr(item, "tolist"):
        item = item.tolist()  # of torch and numpy
    if isinstance(item, list | tuple) and all(type(one) is int for one in item):
        return tuple(item)
    return None


def _check_folder(folder: Path) -> None:
    """Refuse a folder that `datasets` loads in another way."""
    if any(_is_saved(path) for path in folder.glob("*")):
        raise ValueError(
            f"texts={str(folder)!r} was saved by save_to_disk: pass datasets.load_from_disk of it, or "
            "one of its splits"
        )


def _names_no_data_set(texts: str | Path) -> bool:
    """Whether it can only be meant as a file or a text: data sets are called `name` or `owner/name`; a
    configuration may follow, after a colon."""
    name = str(texts)
    return (
        isinstance(texts, Path)
        or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.+-]+)?", name) is None
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

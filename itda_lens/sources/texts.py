"""Texts from wherever the user has them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path


def iterate_texts(
    texts: str | Path | Iterable[str], *, text_field: str = "text", split: str = "train"
) -> Iterator[str]:
    """One text after the other.

    Args:
        texts: a list or iterator of strings; the path of a `.jsonl` file (one object a line) or of any
            other text file (one text); or the name of a `datasets` data set, which is streamed.
        text_field: field of a jsonl object or data set row that holds the text.
        split: split of the data set.

    Raises:
        ValueError: `texts` is a string that names no file and no data set, or a line of the file is not
            what it should be.
        TypeError: an item is not a string.
    """
    if names_data_set(texts):
        return _from_data_set(str(texts), text_field, split)
    if isinstance(texts, str | Path):
        return _from_file(Path(texts), text_field)
    return _from_iterable(texts)


def names_data_set(texts: str | Path | Iterable[str]) -> bool:
    """Whether `texts` is the name of a data set: a string or path that is no file."""
    return isinstance(texts, str | Path) and not _is_file(texts)


def describe_texts(texts: str | Path | Iterable[str], text_field: str, split: str) -> dict[str, str]:
    """What metadata should say about where the texts came from."""
    if not isinstance(texts, str | Path):
        return {"texts": type(texts).__name__}
    known = {"texts": str(texts), "text_field": text_field}
    return known | {"split": split} if names_data_set(texts) else known


def _is_file(name: str | Path) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a file name, or no name at all: a text
        return False


def _from_iterable(texts: Iterable[str]) -> Iterator[str]:
    try:
        iterator = iter(texts)
    except TypeError as error:
        raise TypeError(
            f"texts must be strings, a file or the name of a data set, got {texts!r}"
        ) from error
    for index, text in enumerate(iterator):
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings, but text {index} is {type(text).__name__}")
        yield text


def _from_file(path: Path, text_field: str) -> Iterator[str]:
    if path.suffix != ".jsonl":
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_field]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} is no JSON object with a field {text_field!r}: {error!r}"
                ) from error
            if not isinstance(text, str):
                raise ValueError(f"line {number} of {path}: {text_field!r} is not a string")
            yield text


def _from_data_set(name: str, text_field: str, split: str) -> Iterator[str]:
    from datasets import load_dataset

    if len(name) > 200 or any(character.isspace() for character in name):
        raise ValueError(
            "texts is a string that names no file and cannot name a data set; to use one text, pass "
            f"[text]. It begins: {name[:60]!r}"
        )
    try:
        rows = load_dataset(name, split=split, streaming=True)
    except Exception as error:  # datasets raises many kinds; all mean that there is no such data
        raise ValueError(
            f"texts={name!r} is neither a file nor a data set that can be loaded: {error}"
        ) from error
    for index, row in enumerate(rows):
        if text_field not in row:
            raise ValueError(
                f"row {index} of data set {name!r} has no field {text_field!r}, only {sorted(row)}"
            )
        if not isinstance(row[text_field], str):
            raise ValueError(f"row {index} of data set {name!r}: {text_field!r} is not a string")
        yield row[text_field]

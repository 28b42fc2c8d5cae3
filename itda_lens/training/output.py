"""An output folder that appears whole or not at all."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from itda_lens.sae import ITDA, is_dictionary

logger = logging.getLogger(__name__)


@contextmanager
def output_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `path` to write into, which becomes `path` when the block ends well.

    Entered before the work begins, so that a folder that exists or cannot be written is told at once. If
    the block raises, or is interrupted, what was written is removed and `path` is as it was.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False, or it holds anything but dictionaries.
        OSError: the folder cannot be made.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; choose another folder or ask to overwrite it")
    if target.exists() and not _holds_only_dictionaries(target):
        raise FileExistsError(f"{target} holds other things than dictionaries; it is not overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    work.mkdir()
    try:
        yield work
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        if target.exists():
            target.replace(old)
        work.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    except KeyboardInterrupt:
        logger.warning("interrupted: %s was not written", target)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def save_all(dictionaries: Mapping[str, ITDA], folder: Path) -> None:
    """Save each dictionary into the subfolder of its hook name."""
    for name, itda in dictionaries.items():
        itda.save_model(folder / name)


def _holds_only_dictionaries(folder: Path) -> bool:
    return folder.is_dir() and all(is_dictionary(inside) for inside in folder.iterdir())

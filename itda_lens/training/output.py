"""An output folder that appears whole or not at all, and takes the place of nothing but its own kind."""

import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from itda_lens.records import checked, is_leftover
from itda_lens.records.files import dead_folders, probe, temporary_folder
from itda_lens.sae import ITDA, is_dictionary

logger = logging.getLogger(__name__)

# Inside the hidden folder of a run: what becomes the output, what was there before, and that again once
# it may be removed.
_NEW, _OLD, _DONE = "new", "old", "done"


@checked
@contextmanager
def output_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `path` to write into, which becomes `path` when the block ends well.

    Entered before the work begins, so that a folder that exists or cannot be written is told at once. If
    the block raises, or is interrupted, what was written is removed and `path` is as it was, as are the
    folders above it.
    Dictionaries that were finished before an error of the system, such as a full disk, are kept beside
    `path`.

    What is at `path` is looked at again at the end. Anything that was not there at the beginning, or is
    no longer as it was, is left alone; the new dictionaries are then kept beside it. A link is followed,
    not replaced.

    Args:
        path: the folder; it may be an empty one. Missing folders above it are made.
        overwrite: whether the dictionaries in it may be replaced.

    Raises:
        FileExistsError: `path` has something in it and `overwrite` is False, or holds anything but
            dictionaries; or it changed while the block ran, and the message says where the new
            dictionaries are.
        OSError: the folder cannot be made, written or replaced.
    """
    target = replaceable(Path(path))
    with _folders_above(target):
        for dead in dead_folders(target.parent, target.name):
            _recover(dead, target)
        found = _check(target, overwrite)
        with temporary_folder(target.parent, target.name) as work:
            new = work / _NEW
            with _finished_ones_kept(new, target):
                new.mkdir()
                try:
                    probe(new)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(target)) from error
                yield new
            _put_or_keep(new, target, found)


@checked
def save_all(dictionaries: Mapping[str, ITDA], folder: str | Path) -> None:
    """Save each dictionary into the subfolder of its hook name.

    Where one cannot be written there, it is saved in a temporary folder of the system, since it may have
    taken hours.

    Raises:
        ValueError: a name is none of a subfolder.
        OSError: one could not be written into `folder`; the message says where it is instead.
    """
    folder = Path(folder)
    for name in dictionaries:
        parts = Path(name).parts
        if not parts or ".." in parts or "\0" in name or Path(name).is_absolute():
            raise ValueError(f"dictionaries must go by names of subfolders, got {name!r}")
    failed: dict[str, OSError] = {}
    for name, itda in dictionaries.items():
        try:
            itda.save_model(folder / name)
        except OSError as error:
            failed[name] = error
    if failed:
        error = next(iter(failed.values()))
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="itda-"))
            for name in failed:
                dictionaries[name].save_model(elsewhere / name)
        except OSError as second:
            logger.warning("%s could not be saved elsewhere either: %s", ", ".join(failed), second)
            raise error from None
        note = f"saved in {elsewhere} instead: {', '.join(failed)}"
        raise _with_note(error, note, error.filename) from error


@contextmanager
def _folders_above(target: Path) -> Iterator[None]:
    """Make the folders that a target is to be in; if the block raises, those that are empty still go."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:  # the innermost first
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _finished_ones_kept(new: Path, target: Path) -> Iterator[None]:
    """If the block raises, remove the hidden folder around `new`, but keep dictionaries that were
    finished before an error beside the target. An interrupt keeps nothing."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            logger.warning("interrupted: %s was not written", target)
        kept = _keep(new, target) if isinstance(error, Exception) and _has_finished(new) else None
        if kept != new:
            shutil.rmtree(new.parent, ignore_errors=True)
        if kept is not None and isinstance(error, OSError):
            note = f"dictionaries that were finished are in {kept}"
            raise _with_note(error, note, error.filename) from error
        if kept is not None:
            logger.warning("dictionaries that were finished are in %s", kept)
        raise


def _put_or_keep(new: Path, target: Path, found: "_State | None") -> None:
    """Let a finished folder become the target, or keep it beside the target if that fails.

    Raises:
        FileExistsError: the target is no longer as it was found.
        OSError: it cannot be replaced. Both messages say where the new dictionaries are.
    """
    try:
        _put(new, target, found)
    except FileExistsError as error:
        raise FileExistsError(
            f"{target} was made or changed while this ran and is left as it is; the new "
            f"dictionaries are in {_keep(new, target)}"
        ) from error
    except OSError as error:
        note = f"the new dictionaries are in {_keep(new, target)}"
        raise _with_note(error, note, str(target)) from error
    except BaseException:
        if new.exists():
            logger.warning("interrupted: the new dictionaries are in %s", _keep(new, target))
        raise
    finally:
        _remove(new.parent)


def _with_note(error: OSError, note: str, file: object) -> OSError:
    text = f"{error.strerror or error}; {note}"
    return OSError(text) if error.errno is None else OSError(error.errno, text, file)


class _State(NamedTuple):
    """A description of a folder by which it can be recognised: numbers and times, not contents."""

    folder: tuple[int, int]
    files: tuple[tuple[str, int, int, int], ...]


def _state(folder: Path) -> _State:
    status = folder.stat()
    files = []
    for file in sorted(folder.rglob("*")):
        if is_leftover(file) or any(is_leftover(above) for above in file.relative_to(folder).parents):
            continue
        s = file.lstat()
        changing = (0, 0) if file.is_dir() else (s.st_size, s.st_mtime_ns)
        files.append((str(file.relative_to(folder)), s.st_ino, *changing))
    return _State((status.st_dev, status.st_ino), tuple(files))


def replaceable(path: Path) -> Path:
    """Where the folder is, or will be: links are followed.

    Raises:
        OSError: a link leads into a folder that is not there, or the place cannot be replaced.
    """
    target = Path(os.path.realpath(path))
    if path.is_symlink() and not target.parent.is_dir():
        raise FileNotFoundError(f"{path} is a link to {target}, whose folder does not exist")
    if _is_mount(target):
        raise FileExistsError(
            f"{target} is a mount point, which cannot be replaced; choose a folder inside it"
        )
    if target.exists() and Path(os.path.realpath(os.curdir)).is_relative_to(target):
        # A process, and the shell that started it, would go on in the folder that was there before.
        raise FileExistsError(
            f"{target} is the current folder or holds it: it cannot be replaced; choose one inside it"
        )
    return target


def _is_mount(path: Path) -> bool:
    if os.path.ismount(path):
        return True
    try:  # a folder that is mounted from the same file system looks like any other
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    points = (line.split(" ")[4] for line in lines if line.count(" ") > 4)
    return any(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), p) == str(path) for p in points)


def _check(target: Path, overwrite: bool) -> _State | None:
    if not os.path.lexists(target):
        return None
    if not target.is_dir():
        raise FileExistsError(f"{target} exists and is no folder; choose another place")
    inside = [found for found in target.iterdir() if not is_leftover(found)]
    if inside and not overwrite:
        raise FileExistsError(f"{target} exists; choose another folder or ask to overwrite it")
    if not all(is_dictionary(found) for found in inside):
        raise FileExistsError(f"{target} holds other things than dictionaries; it is not overwritten")
    return _state(target)


def _put(new: Path, target: Path, found: _State | None) -> None:
    """Let `new` become `target`, where nothing is, or still what was found.

    Raises:
        FileExistsError: it is something else; it is there still.
    """
    if found is None or not os.path.lexists(target):
        _claim(new, target)
        return
    _check_is(target, found)
    # Moved away first, and looked at again where nobody else looks for it.
    old = new.with_name(_OLD)
    try:
        os.rename(target, old)
        _check_is(old, found)
        _claim(new, target)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(target):
            os.rename(old, target)
        raise
    os.rename(old, new.with_name(_DONE))


def _check_is(folder: Path, found: _State) -> None:
    try:
        same = _state(folder) == found
    except OSError:
        same = False
    if not same:
        raise FileExistsError(f"{folder} has changed")


def _claim(new: Path, target: Path) -> None:
    """Rename a folder to a name that nothing has; `rename` alone would replace an empty folder."""
    if os.name == "nt":
        new.rename(target)
        return
    target.mkdir()
    try:
        new.rename(target)
    except BaseException:
        if new.exists():
            with suppress(OSError):
                target.rmdir()
        raise


def _has_finished(folder: Path) -> bool:
    return folder.is_dir() and any(is_dictionary(inside) for inside in folder.iterdir())


def _keep(folder: Path, target: Path) -> Path:
    """Move a folder out of a hidden one, beside the target; where it is if it cannot be moved."""
    kept = target.with_name(f"{target.name}.kept-{secrets.token_hex(4)}")
    try:
        folder.rename(kept)
    except OSError:
        return folder
    return kept


def _remove(work: Path) -> None:
    """Remove a hidden folder, unless something is in it that is not ours to remove, or finished."""
    if not os.path.lexists(work / _OLD) and not _has_finished(work / _NEW):
        shutil.rmtree(work, ignore_errors=True)
    if work.exists():
        logger.warning("not all of %s could be removed", work)


def _recover(dead: Path, target: Path) -> None:
    """Tidy up after a run that was killed: what it was about to replace is put back, and dictionaries
    that it had finished are kept."""
    old, new = dead / _OLD, dead / _NEW
    with suppress(OSError):
        if old.exists():
            if os.path.lexists(target):
                logger.warning("a run that was killed replaced what is in %s now", _keep(old, target))
            else:
                _claim(old, target)
                logger.warning("a run that was killed had moved %s away; it is back", target)
        if _has_finished(new):
            logger.warning("a run that was killed had finished %s", _keep(new, target))
    _remove(dead)

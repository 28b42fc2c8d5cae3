"""Files that appear whole or not at all, and the temporary folders in which they are written.

What is unfinished lives in a folder of its own, beside its target and under a name that nobody can
guess: no planted file or link is met there, and what a killed run leaves is one hidden folder. Each is
locked by its process while that lives. The next writer to the same place removes those without a lock.
"""

import errno
import os
import platform
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and leftovers stay
    fcntl = None

PROBE_BYTES = 64 * 1024
"""How much is written before the work, to learn whether a folder can be written."""

LOCK_SECONDS = 2.0
"""The longest wait for another writer of the same files. Renaming takes far less; a stopped process must
not stop this one."""

_FILES = "files"
_SUFFIX = ".itda-tmp"
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_LEFTOVER = re.compile(
    r"\..+\.[0-9a-f]{16}\.itda-tmp"
    r"|\.(cfg|sae_weights|sparsity)\.\d+\.tmp\.(json|safetensors)"  # those of version 0.1
)


def said(error: Exception) -> str:
    """The kind of an error and its message, for the message of another one.

    The `repr` of a `UnicodeDecodeError` holds all bytes that were to be decoded, which may be a whole
    file.
    """
    return f"{type(error).__name__}: {error}"


def is_leftover(path: Path) -> bool:
    """Whether the name is one of those that unfinished files and folders have."""
    return _LEFTOVER.fullmatch(path.name) is not None


@contextmanager
def replacing(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Temporary files that become `targets`, in order, when the block ends well.

    If the block raises, or is interrupted, they are removed and the targets are as they were. An
    interrupt between two renames completes them. Only a kill there leaves some files new and some old:
    files that belong together should say so (`itda_lens.sae.saved`). Of several writers one at a time
    renames.

    A link is followed, not replaced. The files have the mode that the umask gives to a new file.

    Raises:
        OSError: a file cannot be written or renamed; it is named. A target that is a folder, or whose
            folder is missing, cannot be written or is full, is told before the block runs.
    """
    places = tuple(Path(os.path.realpath(target)) for target in targets)
    for target, place in zip(targets, places, strict=True):
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder, where a file is to be written", str(target))
    whole = places[0] if len(places) == 1 else places[0].parent
    folders: dict[Path, Path] = {}
    with ExitStack() as stack:
        try:
            for parent in dict.fromkeys(place.parent for place in places):
                for dead in dead_folders(parent, _FILES):
                    shutil.rmtree(dead, ignore_errors=True)
                with _named({}, parent):
                    folders[parent] = stack.enter_context(temporary_folder(parent, _FILES))
            temporary = tuple(folders[place.parent] / place.name for place in places)
            with _named(dict(zip(temporary, places, strict=True)), whole):
                modes = {parent: probe(folder) for parent, folder in folders.items()}
                yield temporary
                for file, place in zip(temporary, places, strict=True):
                    _finish(file, modes[place.parent])
                for parent in sorted(folders) if len(places) > 1 else ():
                    stack.enter_context(_locked(parent))
                _rename_all(list(zip(temporary, places, strict=True)))
        finally:
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def temporary_folder(parent: Path, stem: str) -> Iterator[Path]:
    """A new folder in `parent`, which `dead_folders(parent, stem)` finds once this process has ended.

    It is the caller's to remove. Only this user can enter it.

    Raises:
        OSError: it cannot be made.
    """
    folder = _new_folder(parent, stem)
    lock = _lock(folder)
    if lock is None and fcntl is not None:
        # Another process took it for a dead one before it was locked; or there are no locks here.
        with suppress(OSError):
            folder.rmdir()
        folder = _new_folder(parent, stem)
        lock = _lock(folder)
    try:
        yield folder
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder's lock while the block runs, so that no other process that asks for it writes there.

    Where the file system has no locks, the block runs without one.

    Raises:
        BlockingIOError: another process has it.
        OSError: there is no such folder.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process is writing there", str(folder)) from None
        except OSError:  # no locks here
            pass
        yield
    finally:
        os.close(descriptor)


def dead_folders(parent: Path, stem: str) -> Iterator[Path]:
    """Temporary folders of this user and machine whose processes have ended.

    Those of other machines are left alone: not every shared file system shows their locks.
    """
    name = re.compile(rf"\.{re.escape(stem)}\.{_HOST}[0-9a-f]{{8}}{re.escape(_SUFFIX)}")
    try:
        found = [parent / entry for entry in os.listdir(parent) if name.fullmatch(entry)]
    except OSError:  # told when something is written there
        return
    for folder in found:
        lock = _lock(folder)
        if lock is None:
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                yield folder
        finally:
            os.close(lock)


def probe(folder: Path) -> int:
    """The mode of a new file in this folder, learned by writing one.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    file = folder / "probe"
    try:
        with file.open("xb") as stream:
            stream.write(bytes(PROBE_BYTES))
        return file.stat().st_mode & 0o777
    finally:
        file.unlink(missing_ok=True)


def _new_folder(parent: Path, stem: str) -> Path:
    folder = parent / f".{stem}.{_HOST}{secrets.token_hex(4)}{_SUFFIX}"
    folder.mkdir(mode=0o700)
    return folder


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed; None if another has it, or none
    can."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(folder)):
            return descriptor
    except OSError:
        pass
    if descriptor is not None:
        os.close(descriptor)
    return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, or go on without it where there is none to be had."""
    end = time.monotonic() + LOCK_SECONDS
    lock = _lock(folder)
    while lock is None and fcntl is not None and time.monotonic() < end:
        time.sleep(0.005)
        lock = _lock(folder)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def _named(targets: Mapping[Path, Path], otherwise: Path) -> Iterator[None]:
    """Let errors of the system name the target, not a temporary file that is gone by then, or
    nothing."""
    try:
        yield
    except OSError as error:
        name = None if error.filename is None else Path(os.fsdecode(error.filename))
        ours = name is None or any(part.name.endswith(_SUFFIX) for part in (name, *name.parents))
        if error.errno is None or not ours:
            raise
        target = targets.get(name, otherwise) if name is not None else otherwise
        raise OSError(error.errno, error.strerror, str(target)) from error


def _finish(file: Path, mode: int) -> None:
    """Give the file its mode (some writers make files for the owner only) and bring it to the disk: some
    file systems tell only then that they are full."""
    file.chmod(mode)
    descriptor = os.open(file, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_all(pairs: list[tuple[Path, Path]]) -> None:
    done: list[Path] = []
    try:
        for file, target in pairs:
            file.replace(target)
            done.append(target)
    except OSError as error:
        if done:
            rest = [(file, target) for file, target in pairs if target not in done]
            kept = [_keep(file, target) for file, target in rest]
            raise OSError(
                error.errno,
                f"{error.strerror}; {', '.join(map(str, done))} is new already, and the new file for "
                f"this one is {', '.join(map(str, kept))}",
                str(rest[0][1]),
            ) from error
        raise
    except BaseException:
        for file, target in pairs:
            with suppress(FileNotFoundError):  # renamed before the interrupt
                file.replace(target)
        raise


def _keep(file: Path, target: Path) -> Path:
    kept = target.with_name(f"{target.stem}.kept-{secrets.token_hex(4)}{target.suffix}")
    file.replace(kept)
    return kept

"""Paths that only this machine knows, told from names that are known everywhere."""

from pathlib import PurePath, PurePosixPath, PureWindowsPath


def is_local_path(value: object) -> bool:
    """Whether a value is a path and no name.

    Paths are absolute, on this system or another, or begin with "~" or ".". Names of models and data
    sets do not.
    """
    return isinstance(value, str) and (
        value.startswith(("/", "~", ".")) or PureWindowsPath(value).is_absolute()
    )


def known_name(value: str) -> str:
    """The name that stands for a value elsewhere: the last part of a path, or the value itself."""
    if not is_local_path(value):
        return value
    path: PurePath = PureWindowsPath(value) if "\\" in value else PurePosixPath(value)
    return path.name

"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Temporary files beside `targets`, which become them, in order, when the block ends well.

    If the block raises, or is interrupted, they are removed and the targets are as they were.

    Raises:
        OSError: a file cannot be renamed.
    """
    # The suffix stays last: some writers choose the format by it.
    temporary = tuple(
        target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}") for target in targets
    )
    try:
        yield temporary
        for file, target in zip(temporary, targets, strict=True):
            file.replace(target)
    finally:
        for file in temporary:
            with suppress(FileNotFoundError):
                file.unlink()

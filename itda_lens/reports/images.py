"""Image files of matplotlib, and names of other people in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from itda_lens.records import replacing
from itda_lens.terminal import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def literal(name: object) -> str:
    """A name as matplotlib draws it literally: "$" begins no formula, and legends leave none out that
    begins with "_"."""
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


@contextmanager
def image_file(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure to draw into, which becomes the file `path` when the block ends well.

    Args:
        path: the file; its suffix says which kind of image, PNG where it has none.
        width, height: in inches.

    Raises:
        OSError: the file cannot be written.
        ValueError: matplotlib knows no such kind of image.
    """
    # Not through pyplot, which would set the back end of the notebook that calls this.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with replacing(path) as (temporary,):
        figure.savefig(temporary, dpi=130, format=path.suffix.removeprefix(".") or "png")

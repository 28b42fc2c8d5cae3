"""Text of other people on the user's terminal, or in HTML: shown as it is, and harmless.

Labels, texts, paths, hook names and metadata come from models, data sets and downloaded dictionaries.
They may hold rich's markup, emoji codes, escape sequences or marks that turn the direction of a line.
"""

import html
import io
import os
import sys

from rich.console import Console
from rich.text import Text


def printable(value: object) -> str:
    r"""`str(value)` in one line that a terminal cannot take for commands.

    Characters that Python calls unprintable (`str.isprintable`: control characters, marks of direction
    and of zero width, line ends, lone surrogates, spaces other than " ") are written as Python writes
    them in a string's `repr`: an escape character is shown as "\x1b". All others stand for themselves,
    also backslashes and brackets.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object, style: str = "") -> Text:
    """`printable(value)` for tables and messages of rich, without markup and emoji codes."""
    return Text(printable(value), style=style)


def make_console(stderr: bool = False) -> Console:
    """Standard output or error; as wide as the terminal, or 120 columns where that is a file or a pipe.

    Strings are printed as they are, without rich's markup; styles come as `Text` or `style=`. Where the
    stream's encoding lacks a character (LANG=C), it is written as an escape instead of raising an error.
    """
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):  # not where a notebook put something else in its place
        stream.reconfigure(errors="backslashreplace")
    console = Console(stderr=stderr, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    return console


def html_text(value: object) -> str:
    """`str(value)` for HTML: escaped, line ends as "⏎", and marks of direction as in `printable`."""
    return html.escape(printable(str(value).replace("\r\n", "⏎").replace("\n", "⏎")))

"""The command line: `itda`, or `python -m itda_lens`.

Nothing heavy is imported here or in the modules of the commands: each command imports what it needs
when it runs, so that `--help` and completion answer at once.
"""

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperCommand

from itda_lens import cli
from itda_lens.demo.command import demo
from itda_lens.terminal import make_console, printable, shown

BAD_INPUT, FAILURE, INTERRUPTED, TERMINATED = 2, 1, 130, 143


class _Command(TyperCommand):
    """A command that, when it runs, first sets everything that must be set before models are loaded."""

    def invoke(self, ctx: Any) -> Any:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        return super().invoke(ctx)


app = typer.Typer(
    name="itda",
    help="Labelled sparse dictionaries of real model activations, each one a SAELens SAE.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: brackets such as those of itda-lens[saebench] are no markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("demo", cls=_Command)(demo)
app.command("build", cls=_Command)(cli.build_command)
app.command("build-shard", cls=_Command)(cli.build_shard_command)
app.command("build-finish", cls=_Command)(cli.build_finish_command)
app.command("fit", cls=_Command)(cli.fit_command)
app.command("info", cls=_Command)(cli.info_command)
app.command("decompose", cls=_Command)(cli.decompose_command)
app.command("eval", cls=_Command)(cli.eval_command)
app.command("bench", cls=_Command)(cli.bench_command)
app.command("compare", cls=_Command)(cli.compare_command)
app.command("steer", cls=_Command)(cli.steer_command)
app.command("erase", cls=_Command)(cli.erase_command)
app.command("push", cls=_Command)(cli.push_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from itda_lens import __version__

        typer.echo(f"itda-lens {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of `itda` itself."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Exits with 0, 2 for bad input, 1 for other failures, 130 for an interrupt, 143 for SIGTERM.
    """
    _log_warnings()
    with _SigtermInterrupts() as sigterm:
        try:
            app(args=None if arguments is None else list(arguments), prog_name="itda")
        except (ValueError, TypeError, FileNotFoundError, FileExistsError) as error:
            _print_error(error)
            sys.exit(BAD_INPUT)
        except OSError as error:
            _print_error(error)
            sys.exit(FAILURE)
        except SystemExit as exit_:  # how typer ends a command, an interrupt included
            if exit_.code == INTERRUPTED and sigterm.received:
                typer.echo("terminated", err=True)
                sys.exit(TERMINATED)
            if exit_.code == INTERRUPTED:
                typer.echo("interrupted", err=True)
            raise


class _SigtermInterrupts:
    """In this context SIGTERM (Slurm, `timeout`, containers) raises KeyboardInterrupt, as Ctrl-C does.

    So it also undoes half-written folders, as an interrupt does. A handler that the process has set
    already is left alone.
    """

    received = False
    _set = False

    def __enter__(self) -> "_SigtermInterrupts":
        # Python lets only the main thread set handlers.
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._interrupt)
            self._set = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._set:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the tidying up
        raise KeyboardInterrupt


class _Harmless(logging.Formatter):
    """Makes log records as harmless as tables, since they name texts and paths as well."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line) for line in super().format(record).split("\n"))


def _log_warnings() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Harmless("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _print_error(error: Exception) -> None:
    """One line on standard error."""
    message = " ".join(line.strip() for line in str(error).split("\n"))
    line = Text.assemble(("error:", "red"), " ", shown(message))
    make_console(stderr=True).print(line, soft_wrap=True)


if __name__ == "__main__":
    main()

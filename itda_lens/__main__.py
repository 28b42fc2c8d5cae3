"""The command line: `itda`, or `python -m itda_lens`."""

import logging
import sys
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.markup import escape

from itda_lens import cli
from itda_lens.demo.command import demo

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="itda",
    help="Labelled sparse dictionaries of real model activations, each one a SAELens SAE.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo)
app.command("build")(cli.build_command)
app.command("info")(cli.info_command)
app.command("decompose")(cli.decompose_command)
app.command("eval")(cli.eval_command)
app.command("bench")(cli.bench_command)
app.command("compare")(cli.compare_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit with 0, 2 for bad input, 1 for other failures, 130 for an interrupt."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    errors = Console(stderr=True)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="itda")
    except (ValueError, TypeError, FileNotFoundError, FileExistsError) as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(BAD_INPUT)
    except OSError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(FAILURE)
    except SystemExit as exit_:  # how typer ends a command, an interrupt included
        if exit_.code == INTERRUPTED:
            errors.print("interrupted")
        raise


if __name__ == "__main__":
    main()

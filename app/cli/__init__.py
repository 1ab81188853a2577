"""The command line: each verb of the interface, said to the server of a data folder."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from app.cli import jobs, plan, serve, sweep, train  # noqa: F401 (each declares its verbs)
from app.cli.verb import app
from app.client import Failure


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave: 0 success, 2 usage error, 1 anything else, in one line."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        status = app(given, prog_name="frostline", standalone_mode=False)
        if status:  # what typer makes of Ctrl-C
            raise Failure("interrupted.")
        sys.exit(0)
    except Exception as error:
        if "--debug" in given:
            raise
        usage = getattr(error, "format_message", None)  # of typer's own errors
        print(f"frostline: {one_line(usage() if usage else error)}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


def one_line(error: object) -> str:
    if isinstance(error, OSError) and error.filename:
        error = f"{error.filename}: {error.strerror}."
    text = " ".join(str(error).split()) or type(error).__name__
    expected = isinstance(error, str | Failure | OSError | ValueError | RuntimeError)
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"

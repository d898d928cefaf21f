"""The command `srds-fast`: runs one subcommand and turns errors into exit codes."""

from __future__ import annotations

import sys
import traceback
from contextlib import ExitStack, redirect_stdout
from importlib import import_module

from ..errors import CaptureFailed, DivergenceError, SrdsFastError
from .arguments import STDOUT, USER_MISTAKE, parsed
from .ranks import is_first, sharing

FAILED = 1
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0; 1 after a run that failed; 2 after a mistake of the user; 130 after Ctrl-C.

    Raises:
        SystemExit: with 0 after --help and --version; with 2 where the command line itself is wrong.
    """
    args = parsed(sys.argv[1:] if argv is None else argv)
    try:
        with ExitStack() as opened:
            opened.enter_context(sharing(args))
            if getattr(args, "profile", None) is not None:
                from ..telemetry import profile_as

                opened.enter_context(profile_as(args.profile))
            if args.json is not None:
                from .documents import check_json

                check_json(args.json)
            if args.json == STDOUT:  # the document alone goes to stdout
                opened.enter_context(redirect_stdout(sys.stderr))
            # imported only now: help and env must not wait for torch
            document = import_module(f".{args.command}", __package__).run(args)
        if args.json is not None:
            from .documents import write_json

            write_json(document, args.json)
    except KeyboardInterrupt:
        print("srds-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (SrdsFastError, OSError) as error:
        # what is wrong with the arguments, or with a call, is the same in all processes
        if not isinstance(error, SrdsFastError) or is_first():
            if args.verbose:
                traceback.print_exc()
            print(f"srds-fast: {' '.join(_told(error).split())}", file=sys.stderr)
        return FAILED if isinstance(error, DivergenceError | CaptureFailed) else USER_MISTAKE
    return 0


def _told(error: Exception) -> str:
    """What is printed of an error. Python's own text of a file that fails has a number and no advice."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename} cannot be read or written: {error.strerror}. Name another file or folder."
    return str(error)

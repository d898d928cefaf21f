"""The command `srds-fast`: runs one subcommand and turns errors into exit codes."""

from __future__ import annotations

import sys
import traceback
from contextlib import ExitStack
from importlib import import_module

from ..errors import SrdsFastError
from .arguments import parser

USER_MISTAKE = 2
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C.
    """
    args = parser().parse_args(argv)
    try:
        with ExitStack() as opened:
            if getattr(args, "profile", None) is not None:
                from ..telemetry import profile_as

                opened.enter_context(profile_as(args.profile))
            # imported only now: help and env must not wait for torch
            import_module(f".{args.command}", __package__).run(args)
    except KeyboardInterrupt:
        print("srds-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (SrdsFastError, OSError) as error:
        if args.verbose:
            traceback.print_exc()
        print(f"srds-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_MISTAKE
    return 0

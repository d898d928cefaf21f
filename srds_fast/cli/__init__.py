"""The command `srds-fast`: runs one subcommand and turns errors into exit codes."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

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
        with _profiled(getattr(args, "profile", None)):
            _command(args.command)(args)
    except KeyboardInterrupt:
        print("srds-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (SrdsFastError, OSError) as error:
        if args.verbose:
            traceback.print_exc()
        print(f"srds-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_MISTAKE
    return 0


def _command(name: str) -> Callable[[argparse.Namespace], None]:
    """Import a command only when it runs: help and env must not wait for torch."""
    if name == "env":
        from .env import env

        return env
    if name == "plan":
        from .plan import plan

        return plan
    from . import commands

    return {"demo": commands.demo, "generate": commands.generate, "compare": commands.compare}[name]


def _profiled(setting: str | None) -> AbstractContextManager[None]:
    if setting is None:
        return nullcontext()
    from ..telemetry import profile_as

    return profile_as(setting)

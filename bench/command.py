"""What all commands share: their options, the JSON they write, and the commit. It needs no package to be installed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from srds_fast.environment import environment


def parser(module: str, text: str | None, json: bool = True) -> argparse.ArgumentParser:
    """Options of `python -m module`; text: its docstring; json: it has --json."""
    found = argparse.ArgumentParser(
        prog=f"python -m {module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if json:
        found.add_argument("--json", type=writable, metavar="FILE.json", help="write the figures there as well")
    return found


def writable(text: str) -> Path:
    """An argument: a file in an existing folder. A wrong path is refused before anything is timed."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path} cannot be written: name a file in a folder that exists")
    return path


def written(text: str) -> Any:
    """An argument: a file that `write` has written; its content."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}: name one that --json has written")
    return json.loads(Path(text).read_text())


def write(path: Path | None, indent: int | None = 1, **found: Any) -> None:
    """Write JSON with the versions and hardware it was measured on; nothing where path is None.

    Commands call it after every measurement, so that an interrupted run leaves what it has.
    """
    if path is not None:
        path.write_text(json.dumps({"environment": environment(), **found}, indent=indent) + "\n")


def revision(root: Path) -> str | None:
    """The hash of the commit, "-dirty" behind it where tracked files differ; without git, COMMIT of the environment."""
    # a copied checkout may belong to another user, and git refuses those by default
    command = ["git", "-c", "safe.directory=*", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run([*command, "--abbrev=40"], capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT") or None

"""Which commit is checked out. Standard library only."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def revision(root: Path) -> str | None:
    """The hash of the commit, "-dirty" behind it where tracked files differ; without git, COMMIT of the environment."""
    # a copied checkout may belong to another user, and git refuses those by default
    command = ["git", "-c", "safe.directory=*", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run([*command, "--abbrev=40"], capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT") or None

"""Which commit is checked out. Standard library only."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def revision(root: Path) -> str | None:
    """The hash of the commit; without git, COMMIT of the environment, or None."""
    return _git(root, "rev-parse", "HEAD") or os.environ.get("COMMIT") or None


def is_dirty(root: Path) -> bool | None:
    """Whether tracked files differ from the commit; None without git."""
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return None if changed is None else bool(changed)


def _git(root: Path, *arguments: str) -> str | None:
    # a copied checkout may belong to another user, and git refuses those by default
    command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

"""The library of a commit, laid out in a folder as an installation has it, beside the benches of this checkout."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIBRARY = ("srds_fast", "kernels")
WORKTREE = ("WORKTREE", ".")


class BadInput(Exception):
    """What was asked for cannot be done: what, why, what to do."""


class Commit(NamedTuple):
    """One side of a comparison.

    Attributes:
        given: as it was named.
        revision: its hash; None: the files as they are.
        title: for people.
    """

    given: str
    revision: str | None
    title: str


def commit(given: str, root: Path = ROOT) -> Commit:
    """Look a name up.

    Raises:
        BadInput: there is no such commit, or HEAD was named and the library has changes that are not in it.
    """
    if given in WORKTREE:
        return Commit(given, None, "the files as they are")
    _git(root, "rev-parse", "--git-dir")
    try:
        revision = _git(root, "rev-parse", "--verify", "--quiet", f"{given}^{{commit}}").decode().strip()
    except BadInput:
        raise BadInput(
            f"{given!r} is no commit of {root}. It may be misspelt, or not fetched: a shallow clone has the newest "
            "ones. Name one that `git log` shows, or fetch it."
        ) from None
    if given == "HEAD" and _git(root, "status", "--porcelain", "--", *LIBRARY):
        raise BadInput(
            f"HEAD was named, and {' or '.join(LIBRARY)} has changes that are not committed. They would not be "
            "measured. Pass WORKTREE to measure the files as they are, or commit them."
        )
    return Commit(given, revision, _git(root, "log", "-1", "--format=%h %s", revision).decode().strip())


def is_dirty(root: Path = ROOT) -> bool | None:
    """Whether tracked files differ from the commit; None where there is no git."""
    try:
        return bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except BadInput:
        return None


def revision(root: Path = ROOT) -> str | None:
    """The hash of the commit that is checked out; without git what COMMIT in the environment says, or None."""
    try:
        return _git(root, "rev-parse", "HEAD").decode().strip()
    except BadInput:
        return os.environ.get("COMMIT") or None


def lay_out(which: Commit, site: Path, root: Path = ROOT) -> None:
    """Fill a new folder: srds_fast of the commit with its kernels, and the benches of this checkout.

    Raises:
        BadInput: the commit has no library.
    """
    site.mkdir(parents=True)
    pycache = shutil.ignore_patterns("__pycache__")
    if which.revision is None:
        for folder in LIBRARY:
            shutil.copytree(root / folder, site / folder, ignore=pycache)
    else:
        try:
            archive = _git(root, "archive", which.revision, *LIBRARY)
        except BadInput:
            raise BadInput(
                f"{which.title} has no {' and '.join(LIBRARY)}. There is nothing to measure. Name a later commit."
            ) from None
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(site, filter="data")
    shutil.move(site / "kernels", site / "srds_fast" / "kernels")
    shutil.copytree(root / "bench", site / "bench", ignore=shutil.ignore_patterns("__pycache__", "results"))
    (site / "tests").mkdir()
    shutil.copy(root / "tests" / "tiny.py", site / "tests" / "tiny.py")


def _git(root: Path, *arguments: str) -> bytes:
    try:
        # a copy may belong to somebody else: git would not look at it
        command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError:
        raise BadInput("git is not installed. Commits are read with it. Install it, or compare WORKTREE.") from None
    except subprocess.CalledProcessError as error:
        raise BadInput(
            f"git {arguments[0]} failed in {root}: {error.stderr.decode().strip() or 'no reason given'}. Commits are "
            "read from the checkout. Run this in a git repository of the project, with commits that it has."
        ) from None
    return done.stdout

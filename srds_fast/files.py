"""Files that this package writes: whole or not at all, and never through a symbolic link.

A link would let whoever may write to a folder choose which file of the user is overwritten. Folders of a path may be
links.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InvalidArgument, shown


def path_of(name: str, given: object) -> Path:
    """A path that a user gave as this argument. Raises InvalidArgument if it is none."""
    if isinstance(given, str | os.PathLike):
        return Path(given)
    raise InvalidArgument(f"{name} is {shown(given)}. It must be the path of a file. Pass a string or a Path.")


def check_file(path: Path) -> None:
    """Raise InvalidArgument if no file can be written there: something else has the name, or there is no folder."""
    try:
        why = _hindrance(path)
    except OSError as error:  # a name that is too long
        why = str(error)
    if why is not None:
        raise InvalidArgument(f"{shown(str(path))} cannot be written: {why}. Name a file in a folder that exists.")


def check_folder(path: Path) -> None:
    """Raise InvalidArgument if there is no folder of this name and none can be made."""
    try:
        nearest = next(each for each in (path, *path.parents) if each.is_symlink() or each.exists())
        why = None if nearest.is_dir() else f"{nearest} is no folder"
        if why is None and not os.access(nearest, os.W_OK):
            why = f"you may not write to {nearest}"
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
        why = str(error)
    if why is not None:
        raise InvalidArgument(f"{shown(str(path))} cannot be a folder: {why}. Name another one.")


def _hindrance(path: Path) -> str | None:
    if "\0" in str(path):
        return "its name holds a null byte"
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return "its name holds half of a surrogate pair"
    if path.is_symlink():
        return "it is a symbolic link, which is not followed"
    if path.exists():
        return None if path.is_file() else "it is a folder" if path.is_dir() else "it is no file"
    return None if path.parent.is_dir() else f"there is no folder {path.parent}"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives the path of a new file to write, which takes the place of `path` at the end; an older one stays until then.

    The new file lies in a folder that nobody else may write to, so that its name cannot be taken by a link before it
    is there. Raises InvalidArgument as `check_file` does, and OSError.
    """
    check_file(path)
    folder = Path(tempfile.mkdtemp(prefix=".srds-fast-", dir=path.parent))
    try:
        unfinished = folder / path.name
        yield unfinished
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""The counts that are committed: the file, and what differs from it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

FILE = Path(__file__).parent / "results" / "counts.json"
# decided by programs and tables alone
ALWAYS = ("waves", "rows", "peak_rows", "bytes_moved", "bytes_moved_a_wave")
REWRITE = "python -m bench.counts --write"
Found = dict[str, dict[str, dict[str, int]]]
"""pipeline -> method -> count -> number"""


def minor(version: str) -> str:
    """2.13.0+cpu -> 2.13"""
    return ".".join(version.split(".")[:2])


def read(file: Path = FILE) -> tuple[str, Found]:
    """The minor version of torch that a file was written with, and its counts."""
    try:
        written = json.loads(file.read_text())
        return written["torch"], written["counts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{file} cannot be read: {error!r}. It holds the counts. Write it with `{REWRITE}`.") from None


def write(found: Found, file: Path = FILE) -> None:
    """What `read` reads."""
    written = {"torch": minor(torch.__version__), "counts": found}
    file.write_text(json.dumps(written, indent=1) + "\n")


def differences(before: Found, after: Found, only: tuple[str, ...] | None = None) -> list[str]:
    """A line for every count that is not what it was. only: these counts."""
    lines: list[str] = []
    for pipeline in dict.fromkeys([*before, *after]):
        methods = before.get(pipeline, {}), after.get(pipeline, {})
        for method in dict.fromkeys([*methods[0], *methods[1]]):
            old, new = (each.get(method, {}) for each in methods)
            for name in dict.fromkeys([*old, *new]):
                if old.get(name) != new.get(name) and (only is None or name in only):
                    lines.append(f"{pipeline}, {method}: {name} was {old.get(name)}, is {new.get(name)}")
    return lines


def comparable(version: str) -> tuple[str, ...] | None:
    """Which counts mean the same under this torch as in a file of such a version; None: all."""
    return None if version == minor(torch.__version__) else ALWAYS


def explained(lines: list[str]) -> str:
    """Differences as an error."""
    return "\n".join(
        [
            f"{len(lines)} counts are not those of {FILE.relative_to(FILE.parents[2])}:",
            *lines,
            f"They are part of what a call costs. If that was meant, run `{REWRITE}` and commit the file.",
        ]
    )

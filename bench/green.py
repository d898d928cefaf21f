"""Nothing is reported of an operation whose tests are red. Green is remembered for the files it was found with."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import torch

from srds_fast.telemetry.environment import PACKAGES

from .layout import LIBRARY, ROOT

CACHE = ROOT / ".benchmarks" / "green.json"
# what a red run says, the last lines of it
LINES = 15


class Red(Exception):
    """Tests fail, there are none, or none of them ran."""


def require(files: Sequence[str], root: Path = ROOT, cache: Path = CACHE) -> None:
    """Return if these test files pass, in a process of their own; if they did with the same sources, at once.

    Args:
        files: from the root.
        root: the checkout.
        cache: where to remember it, made if it is not there.

    Raises:
        Red: they do not; with the end of what pytest printed and the command to see it all.
    """
    known = _known(cache)
    for file in dict.fromkeys(files):
        fingerprint = _fingerprint(file, root)
        if known.get(file) == fingerprint:
            continue
        _run(file, root)
        known[file] = fingerprint
        cache.parent.mkdir(parents=True, exist_ok=True)
        written = cache.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(known, indent=1) + "\n")
        written.replace(cache)


def _known(cache: Path) -> dict[str, str]:
    """File -> what it was found green with; nothing if that was lost, and everything runs again."""
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _run(file: str, root: Path) -> None:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    # a session of pytest hands its own on: whether it runs in parallel, and its options
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    shown = f"python {' '.join(command)}"
    if _interpreted(file):
        environment["TRITON_INTERPRET"] = "1"
        shown = f"TRITON_INTERPRET=1 {shown}"
    done = subprocess.run([sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or ["no word of it"]
    if done.returncode != 0:
        end = "\n".join(lines[-LINES:])
        raise Red(
            f"{file} is not green (exit status {done.returncode}), and what is wrong is not worth timing. "
            f"Run `{shown}`, mend what fails, and run the bench again.\n{end}\n{done.stderr.strip()}".strip()
        )
    if not re.search(r"\d passed", lines[-1]):
        raise Red(
            f"{file} is not green: none of its tests ran here ({lines[-1]}). Run `{shown} -rs` to see why, install or "
            "provide what they ask for, and run the bench again."
        )


def _interpreted(file: str) -> bool:
    """Whether kernels run in Triton's interpreter there: without a GPU they do not run at all."""
    return file.startswith("tests/kernels/") and not torch.cuda.is_available()


def _fingerprint(file: str, root: Path) -> str:
    """Of all that may decide how a test file ends: all texts but those of other tests, versions, the machine."""
    digest = hashlib.sha256()
    for path in sorted({root / file, *_sources(root)}):
        if path.is_file():
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = [(package, _version(package)) for package in PACKAGES]
    digest.update(f"{torch.__version__}, {versions}, {sys.version}, {device}, {_interpreted(file)}".encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _sources(root: Path) -> Iterable[Path]:
    for folder in (*LIBRARY, "bench"):
        yield from (root / folder).rglob("*.py")
    yield root / "pyproject.toml"
    yield from (path for path in (root / "tests").rglob("*.py") if not path.name.startswith("test_"))

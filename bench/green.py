"""Nothing is reported of an operation whose tests are red. Green is remembered for the files it was found with."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from .layout import LIBRARY, ROOT

CACHE = ROOT / ".benchmarks" / "green.json"
# what a red run says, the last lines of it
LINES = 15


class Red(Exception):
    """Tests fail, or there are none."""


def require(files: Sequence[str], root: Path = ROOT, cache: Path = CACHE) -> None:
    """Return if these test files pass, in a process of their own; if they did with the same sources, at once.

    Args:
        files: from the root.
        root: the checkout.
        cache: where to remember it, made if it is not there.

    Raises:
        Red: they do not; with the end of what pytest printed and the command to see it all.
    """
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    for file in dict.fromkeys(files):
        fingerprint = _fingerprint(file, root)
        if known.get(file) == fingerprint:
            continue
        _run(file, root)
        known[file] = fingerprint
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(known, indent=1) + "\n")


def _run(file: str, root: Path) -> None:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment, shown = dict(os.environ), f"python {' '.join(command)}"
    if _interpreted(file):
        environment["TRITON_INTERPRET"] = "1"
        shown = f"TRITON_INTERPRET=1 {shown}"
    done = subprocess.run([sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        end = "\n".join(done.stdout.strip().splitlines()[-LINES:])
        raise Red(
            f"{file} is not green (exit status {done.returncode}), and what is wrong is not worth timing. "
            f"Run `{shown}`, mend what fails, and run the bench again.\n{end}\n{done.stderr.strip()}".strip()
        )


def _interpreted(file: str) -> bool:
    """Whether kernels run in Triton's interpreter there: without a GPU they do not run at all."""
    return file.startswith("tests/kernels/") and not torch.cuda.is_available()


def _fingerprint(file: str, root: Path) -> str:
    """Of all that may decide how a test file ends: its text, the library's, that of the tests' helpers, the machine."""
    digest = hashlib.sha256()
    for path in sorted({root / file, *_sources(root)}):
        if path.is_file():
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    digest.update(f"{torch.__version__}, {sys.version}, {device}, {_interpreted(file)}".encode())
    return digest.hexdigest()


def _sources(root: Path) -> Iterable[Path]:
    for folder in LIBRARY:
        yield from (root / folder).rglob("*.py")
    yield root / "pyproject.toml"
    yield from (path for path in (root / "tests").rglob("*.py") if not path.name.startswith("test_"))

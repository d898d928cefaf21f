"""The JSON of `--json`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..files import check_file, check_folder, new_file
from .arguments import STDOUT


def check_json(place: str) -> None:
    """Raise InvalidArgument if no file can be written there, before anything is measured."""
    if place != STDOUT:
        path = Path(place)
        check_folder(path.parent)
        if path.parent.is_dir():
            check_file(path)


def write_json(document: Any, place: str) -> None:
    """Write a document of plain JSON types to stdout or a file; a number that JSON does not have becomes null."""
    text = json.dumps(_finite(document), indent=2, allow_nan=False)
    if place == STDOUT:
        print(text)
        return
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    with new_file(Path(place)) as unfinished:
        unfinished.write_text(f"{text}\n")
    print(f"\n{place}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

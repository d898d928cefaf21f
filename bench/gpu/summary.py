"""What gpu_check found, in 60 lines at most: how every part ended, and the tables they printed. Standard library only.

python -m bench.gpu.summary gpu_check.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MOST_LINES = 60
WIDTH = 180


def lines(found: dict[str, Any]) -> list[str]:
    """The summary, most important first. Tables that do not fit are cut, the longest first."""
    parts: dict[str, Any] = found["parts"]
    shown = _heading(found) + [line for name, part in parts.items() for line in _ending(name, part)]
    tables = {name: part["printed"] for name, part in parts.items() if part.get("printed")}
    wanted = {name: len(table) for name, table in tables.items()}
    while wanted and sum(wanted.values()) + len(wanted) > MOST_LINES - len(shown) and max(wanted.values()) > 1:
        wanted[max(wanted, key=lambda name: wanted[name])] -= 1
    for name, table in tables.items():
        cut = len(table) - wanted[name]
        shown += [f"--- {name}{f' ({cut} more lines in logs.txt)' if cut else ''}", *table[: wanted[name]]]
    return [line[:WIDTH] for line in shown[:MOST_LINES]]


def _heading(found: dict[str, Any]) -> list[str]:
    where = found["parts"].get("environment", {}).get("result") or {}
    driver = next((device.get("driver") for device in where.get("cuda_devices", [])), None)
    versions = [f"{name} {where[name]}" for name in ("torch", "triton", "diffusers") if where.get(name)]
    device = where.get("gpu") or "no GPU: small networks on a CPU, the figures mean nothing"
    commit = f"{found.get('commit') or 'unknown'}{' with changes' if found.get('dirty') else ''}"
    good = [f"{name} {part['seconds']:.0f}" for name, part in found["parts"].items() if part["status"] == "passed"]
    return [
        f"{device}{f', driver {driver}' if driver else ''}; {', '.join(versions)}",
        f"commit {commit}{', the smallest sizes (--smoke)' if found.get('smoke') else ''}; "
        f"{found.get('seconds', 0.0):.0f} s of {found.get('budget', 0.0):.0f}",
        f"passed (in s): {', '.join(good) or 'nothing'}",
    ]


def _ending(name: str, part: dict[str, Any]) -> list[str]:
    """What there is to say of a part but for its table."""
    shown = []
    if part["status"] != "passed":
        last = (part.get("last_words") or [""])[-1]
        shown.append(f"{part['status']}: {name}, {part.get('why')}{f': {last}' if last else ''}")
    if part.get("untested"):
        shown.append(f"{name}: {part['untested']} did not run, so what was timed may be wrong")
    result = part.get("result") or {}
    if "failures" in result:
        shown.append(f"{name}: {result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped")
        shown += [f"  {failure}" for failure in result["failures"][:3]]
    return shown


if __name__ == "__main__":
    print(*lines(json.loads(Path(sys.argv[1]).read_text())), sep="\n")

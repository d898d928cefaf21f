"""What bench/gpu_check.py found, in 60 lines at most. Standard library only; shows whatever is there.

python -m bench.summary gpu_check.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

MOST_LINES = 60
WIDTH = 160
# of the lines of all peers' tables together
PEERS = 21
SHOWN_ROWS = (1, 2, 4, 8, 16, 24, 32)
# of each table these, whatever they took; the rest by their speed
ALWAYS = ("stock, torch.compile", "diffusers'", "sequential", "srds, as published", "auto")


def lines(found: dict[str, Any]) -> list[str]:
    """The summary, most important first."""
    parts = found["parts"]
    shown = _heading(found) + _endings(parts)
    for name, of_part in SECTIONS.items():
        result = parts.get(name, {}).get("result")
        if result:
            try:
                shown += of_part(result)
            except (KeyError, TypeError, IndexError, ValueError, ZeroDivisionError) as error:
                shown.append(f"{name}: its result cannot be read ({type(error).__name__}: {error})")
    shown += _peers({name: part.get("result") for name, part in parts.items() if name.startswith("peers_")})
    if len(shown) > MOST_LINES:
        shown = [*shown[: MOST_LINES - 1], f"({len(shown) - MOST_LINES + 1} more lines: see gpu_check.json)"]
    return [line[:WIDTH] for line in shown]


def _heading(found: dict[str, Any]) -> list[str]:
    where = found["parts"].get("environment", {}).get("result") or {}
    driver = next((device.get("driver") for device in where.get("cuda_devices", [])), None)
    versions = [f"{name} {where[name]}" for name in ("torch", "triton", "diffusers") if where.get(name)]
    device = where.get("gpu") or "no GPU: small networks on the CPU, no figure below means anything but that it runs"
    commit = f"{found.get('commit') or 'unknown'}{' with changes' if found.get('dirty') else ''}"
    return [
        f"{device}{f', driver {driver}' if driver else ''}; {', '.join(versions)}",
        f"commit {commit}{', the smallest sizes (--smoke)' if found.get('smoke') else ''}; "
        f"{found.get('seconds', 0.0):.0f} s of {found.get('budget', 0.0):.0f}",
    ]


def _endings(parts: dict[str, Any]) -> list[str]:
    """How every part ended: the good ones together, of the others what they said last."""
    good = [f"{name} {part['seconds']:.0f}" for name, part in parts.items() if part["status"] == "passed"]
    shown = [f"passed (in s): {', '.join(good) or 'nothing'}"]
    for name, part in parts.items():
        if part["status"] != "passed":
            last = (part.get("last_words") or [""])[-1]
            shown.append(f"{part['status']}: {name}, {part.get('why')}{f': {last}' if last else ''}")
        if part.get("untested"):
            shown.append(f"{name}: {part['untested']} was not run, nothing says that what it timed is right")
        for failure in ((part.get("result") or {}).get("failures") or [])[:3]:
            shown.append(f"  {failure}")
    return shown


def _tests(name: str) -> Callable[[dict[str, Any]], list[str]]:
    def shown(result: dict[str, Any]) -> list[str]:
        return [f"{name}: {result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped"]

    return shown


def _rows(result: dict[str, Any]) -> list[str]:
    """c(rows): milliseconds of one row, and how many times that more rows take."""
    shown = ["c(rows): ms of one row, eager and replayed; replayed (or eager), times that of one row"]
    for curve in result["curves"]:
        seconds = curve["replayed"] or curve["eager"]
        times = [
            f"{rows}: {taken / seconds[0]:.2f}"
            for rows, taken in zip(curve["rows"], seconds, strict=True)
            if rows in SHOWN_ROWS and rows != 1
        ]
        replayed = f"{1e3 * curve['replayed'][0]:8.3f}" if curve["replayed"] else f"{'-':>8}"
        shown.append(f"  {curve['network']:8}{1e3 * curve['eager'][0]:8.3f}{replayed}   {'  '.join(times)}")
    return shown


def _kernels(result: dict[str, Any]) -> list[str]:
    """Of each operation: bandwidth by size, the time of the smallest in three ways, and how many times faster."""
    copied = result.get("copy_bytes_per_second")
    ceiling = f" (one of 512 MB: {copied / 1e9:.0f} GB/s)" if copied else ""
    shown = [f"kernels: share of the bandwidth of a copy of that size{ceiling}; us at a latent (eager, compiled)"]
    for operation in dict.fromkeys(row["operation"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["operation"] == operation]
        first = rows[0]
        if first.get("seconds") is None:
            shown.append(f"  {operation:13} called {1e6 * first['called']:.0f} us")
            continue
        shares = [f"{row['size']} {row['of_copy']:.2f}" for row in rows if row.get("of_copy")]
        faster = [f"{row['eager'] / row['seconds']:.1f}" for row in rows]
        compiled = [f"{row['compiled'] / row['seconds']:.1f}" if row.get("compiled") else "-" for row in rows]
        ours, eager, by_compiler = (_us(first[how]) for how in ("seconds", "eager", "compiled"))
        others = f"x eager {' '.join(faster)}; x compiled {' '.join(compiled)}"
        latent = f"{first['rows']} rows {ours} us ({eager}, {by_compiler})"
        shown.append(f"  {operation:13} {', '.join(shares)}; {latent}; {others}")
    return shown


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e6 * seconds:.1f}"


def _busy(result: dict[str, Any]) -> list[str]:
    """A line for each workload."""
    shown = ["GPU-busy share of a call"]
    for workload in dict.fromkeys(each["workload"] for each in result["results"]):
        loops = [each for each in result["results"] if each["workload"] == workload]
        shares = [f"{each['busy']:.2f} {each['loop']}" for each in loops]
        shown.append(f"  {workload}, {loops[0]['steps']} steps: {'; '.join(shares)}")
    return shown


def _engines(result: dict[str, Any]) -> list[str]:
    """A line for each workload: every method with the engine that was fastest."""
    shown = ["engines: the fastest of each method, times faster than stock (overhead over its network calls)"]
    for workload, steps in dict.fromkeys((each["workload"], each["steps"]) for each in result["results"]):
        here = [each for each in result["results"] if (each["workload"], each["steps"]) == (workload, steps)]
        ran = [each for each in here if each["failed"] is None]
        best: dict[str, dict[str, Any]] = {}
        for each in sorted(ran, key=lambda each: each["seconds"]):
            best.setdefault(each["method"], each)
        told = [
            f"{method} {each['engine']} {_number(each['over_stock'])}x ({_number(each['overhead'])})"
            for method, each in best.items()
            if method != "stock"
        ]
        told += [f"{len(here) - len(ran)} loops failed"] if len(ran) < len(here) else []
        shown.append(f"  {workload}, {steps} steps: {'; '.join(told)}")
    return shown


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _switches(result: dict[str, Any]) -> list[str]:
    """A line for each workload: every switch, how many times faster it made a call."""
    shown = ["switches: times faster on than off"]
    for workload in dict.fromkeys(row["workload"] for row in result["results"]):
        told = [
            f"{row['switch']} {'not had' if row['faster'] is None else format(row['faster'], '.2f')}"
            for row in result["results"]
            if row["workload"] == workload
        ]
        shown.append(f"  {workload}: {'; '.join(told)}")
    return shown


def _profile(result: dict[str, Any]) -> list[str]:
    return [
        f"profile of {result['workload']}, {result['steps']} steps: {result['method']}, {result['engine']}, "
        f"{result['waves']} waves, {result['rows']} rows; trace.json"
    ]


def _nsys(result: dict[str, Any]) -> list[str]:
    """The last call that Nsight Systems saw."""
    call = result["calls"][-1]
    figures = [
        f"{call['wall_ms']:.2f} ms",
        *([] if call["idle_share"] is None else [f"{100 * call['idle_share']:.0f} % idle"]),
        *([] if call["overhead"] is None else [f"overhead {call['overhead']:.2f}"]),
    ]
    return [f"Nsight Systems, a call of digits ({call['times']} times): {', '.join(figures)}; digits.txt"]


SECTIONS: dict[str, Callable[[Any], list[str]]] = {
    "kernel_tests": _tests("kernel tests"),
    "gpu_tests": _tests("GPU tests"),
    "rows": _rows,
    "kernels": _kernels,
    "busy": _busy,
    "engines": _engines,
    "switches": _switches,
    "profile": _profile,
    "nsys": _nsys,
}


def _peers(results: dict[str, Any]) -> list[str]:
    """The tables of all workloads, as many lines each as there is room for."""
    tables = [
        [each for each in result["results"] if (each["workload"], each["steps"]) == key]
        for result in results.values()
        if result
        for key in dict.fromkeys((each["workload"], each["steps"]) for each in result["results"])
    ]
    if not tables:
        return []
    shown = ["peers: times faster than stock, than our sequential loop; ms; p95 difference in grey levels; waves"]
    room = max(2, (PEERS - 1) // len(tables))
    for table in tables:
        shown.append(f" {table[0]['workload']}, {table[0]['steps']} steps")
        shown += map(_peer, _chosen([each for each in table if each["left_out"] is None], room - 1))
    return shown


def _chosen(ran: Sequence[dict[str, Any]], room: int) -> Iterable[dict[str, Any]]:
    """The fastest of each kind that is always shown, and others while there is room; in the order of the table."""
    chosen: list[str] = []
    for kind in ALWAYS:
        chosen += [each["peer"] for each in ran if each["peer"].startswith(kind)][:1]
    fastest = [each["peer"] for each in ran if each["peer"] not in chosen]
    keep = {*fastest[:1], *chosen[: room - 1]}
    keep |= set([each for each in fastest if each not in keep][: max(0, room - len(keep))])
    return [each for each in ran if each["peer"] in keep]


def _peer(each: dict[str, Any]) -> str:
    off = "     -" if each["difference"] is None else f"{each['difference']:6.3f}"
    return (
        f"  {_number(each['over_stock']):>6}{_number(each['over_sequential']):>7}{1e3 * each['seconds']:10.2f}{off:>8}"
        f"{each['waves']:7.1f}  {each['peer']}, {each['setting'] or each['method']}"
    )


if __name__ == "__main__":
    print(*lines(json.loads(Path(sys.argv[1]).read_text())), sep="\n")

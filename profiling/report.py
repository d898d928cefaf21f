"""What a recording by Nsight Systems says of our calls.

    nsys export --type sqlite FILE.nsys-rep
    python -m profiling.report FILE.sqlite
    python -m profiling.report FILE.sqlite --call 2 --png timeline.png --json figures.json

For every call: its waves, the overhead (wall of the iterations over the time of the network in them), how long the GPU
was idle, gaps between waves, streams at work side by side, and a table of its ranges. Times are the GPU's; of a file
recorded without one they are the host's, and it says so. The picture is of one call, the last one if not told.

Exits with 2 where the file is no such recording or has no ranges of ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from .calls import Call, Row, calls_of
from .nsys import NotARecording, read


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.sqlite", help="of `nsys export --type sqlite`")
    parser.add_argument("--png", type=Path, help="draw the timeline of a call (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--call", type=int, help="only this one, counted from 1")
    options = parser.parse_args(arguments)
    for path in (options.png, options.json):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path} cannot be written: there is no folder {path.parent}. Make it first.")
    try:
        calls = _calls(options.file, options.call)
    except NotARecording as error:
        parser.exit(2, f"{error}\n")
    for number, call in calls.items():
        print(f"call {number} of {options.file.name}: {_whose(call)}")
        print("\n".join(f"  {line}" for line in lines(call)))
    number, call = list(calls.items())[-1]
    if options.json is not None:
        figures = {"file": options.file.name, "calls": [{"call": n, **each.to_dict()} for n, each in calls.items()]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.png is not None:
        from .timeline import draw

        draw(call, f"{options.file.name}, call {number}", options.png)
        print(f"call {number} is drawn in {options.png}")


def _calls(file: Path, wanted: int | None) -> dict[int, Call]:
    """The calls to report on, by number."""
    found = dict(enumerate(calls_of(read(file)), start=1))
    if not found:
        raise NotARecording(f"{file} has no whole call: they began before the recording or ended after. Record longer.")
    if wanted is None:
        return found
    if wanted not in found:
        raise NotARecording(f"{file} has no call {wanted}. It has {len(found)}, counted from 1. Name one of them.")
    return {wanted: found[wanted]}


def _whose(call: Call) -> str:
    return "times of the GPU" if call.gpu else "times of the host, as no GPU was recorded"


def lines(call: Call) -> Iterator[str]:
    """A call in words and figures."""
    iterations, rows = call.table.get("iteration", Row()).count, [wave.rows for wave in call.waves]
    known = "" if None in rows else f", {sum(row or 0 for row in rows)} rows"
    yield f"{'waves':<12}{len(call.waves)} in {iterations} iteration{'s' * (iterations != 1)}{known}"
    yield f"{'wall':<12}{_ms(call.wall)}, from the first iteration to the end of the last"
    if call.overhead is not None:
        yield f"{'network':<12}{_ms(call.network)}"
        yield f"{'overhead':<12}{call.overhead:.3f}, wall over network"
    if call.gpu:
        yield from _of_gpu(call)
    if call.gaps:
        yield f"{'gaps':<12}{_gaps(call)}"
    yield ""
    yield from _table(call)
    yield from (f"note: {note}" for note in call.notes)
    yield ""


def _of_gpu(call: Call) -> Iterator[str]:
    if call.idle is not None:
        yield f"{'idle':<12}{call.idle:.1%} of the wall"
    if launches := [len(wave.works) for wave in call.waves]:
        spread = f"{min(launches)} to {max(launches)}" if min(launches) < max(launches) else "in each"
        yield f"{'launches':<12}{statistics.mean(launches):.1f} a wave ({spread})"
    beside = call.coarse_beside_fine
    rows = f", coarse rows beside fine ones {_ms(beside)}" if "coarse" in call.table else ""
    yield f"{'streams':<12}two or more at work {_ms(call.streams_at_once)}{rows}"


def _gaps(call: Call) -> str:
    gaps = [gap for gap, _ in call.gaps]
    found = f"median {_ms(statistics.median(gaps))}, longest {_ms(max(gaps))}, together {_ms(sum(gaps))}"
    waited = [gap for gap, checkpoint in call.gaps if checkpoint]
    return f"{found}; {_ms(sum(waited))} of it at checkpoints" if waited else found


def _table(call: Call) -> Iterator[str]:
    yield f"{'range':<16}{'count':>7}{'host ms':>12}" + (f"{'GPU ms':>12}{'launches':>10}" if call.gpu else "")
    for label, row in call.table.items():
        count, host = row.count or "", "" if row.host is None else f"{row.host / 1e6:.3f}"
        gpu = f"{row.gpu / 1e6:12.3f}{row.launches:10}" if call.gpu else ""
        yield f"{label:<16}{count:>7}{host:>12}{gpu}"


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.3f} ms"


if __name__ == "__main__":
    main()

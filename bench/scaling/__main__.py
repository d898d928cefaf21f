"""A simulator: the seconds that a call is predicted to take on 1 to 16 devices, which nobody here has.

    python -m bench.scaling                                    # every network, NVLink
    python -m bench.scaling --networks sdxl --steps 50 --link pcie
    python -m bench.scaling --picture scaling.png
    python -m bench.scaling --measured bench/results/scaling-cpu.json      # networks and gather measured by real runs

Waves and rows are those of the programs that `srds_fast` runs; a wave costs c(ceil(units / G)) and a gather of latency
plus bytes / bandwidth, as the planner prices it, and the time of the host, which was measured on two cores. Iterations
are those that each method needs for half a grey level on the bundled digits pipeline (`bench.quality.methods`); another
network may need more. "auto, predicted" is the fastest of the planner's candidates for so many devices, with the
iterations that it expects of any network. How well such predictions are met by two processes on two cores:
`python -m bench.scaling.real`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.command import parser, writable, write, written
from bench.pictures import scaling_picture
from srds_fast.cli.output import seconds_of, show_table
from srds_fast.solvers.registry import AUTO

from .models import LINKS, NETWORKS, Link, Network, Outside, host, link_of, measured
from .predict import candidates, seconds, ways

DEVICES = tuple(range(1, 17))
SHOWN = (1, 2, 4, 8, 16)
STEPS = (25, 50, 100)
Row = dict[str, Any]


def predictions(network: Network, link: Link, steps: int) -> tuple[list[Row], list[str]]:
    """Of every method on every number of devices: seconds, by device count; and who is left out, and why."""
    found, left_out = ways(steps)
    rows = [
        {
            "method": way.name,
            "setting": way.setting,
            "waves": len(way.widths),
            "rows": sum(way.widths),
            "predicted_seconds": [seconds(way, network, devices, link.seconds) for devices in DEVICES],
        }
        for way in found
    ]
    best = [min((seconds(each, network, g, link.seconds), each.name) for each in candidates(steps, g)) for g in DEVICES]
    names = list(dict.fromkeys(best[g - 1][1] for g in SHOWN))
    fastest = {"method": AUTO, "setting": "; ".join(names), "waves": None, "rows": None}
    return [*rows, {**fastest, "predicted_seconds": [each for each, _ in best]}], left_out


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the predicted seconds, and how many times faster than one step after another on one device that is."""
    alone = rows[0]["predicted_seconds"][0]
    cells = [
        {
            "method": row["method"],
            "waves": row["waves"],
            "rows": row["rows"],
            **{f"G = {g}": _cell(row["predicted_seconds"][g - 1], alone) for g in SHOWN},
            "at": row["setting"],
        }
        for row in sorted(rows, key=lambda row: row["predicted_seconds"][SHOWN[-1] - 1])
    ]
    show_table(cells, text=("method", "at"), title=f"\npredicted: {title}")


def _cell(predicted: float, alone: float) -> str:
    return f"{seconds_of(predicted)} ({alone / predicted:.2f}x)"


def main(arguments: list[str] | None = None) -> None:
    told = parser("bench.scaling", __doc__)
    told.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    told.add_argument("--steps", nargs="+", type=int, choices=STEPS, default=[50, 100])
    told.add_argument("--link", choices=list(LINKS), default="nvlink")
    told.add_argument("--exchange", type=float, help="seconds of a hop of the exchange between hosts before a gather")
    told.add_argument("--wave", type=float, help="seconds that the host takes for a wave outside the network")
    told.add_argument("--measured", type=written, help="JSON of bench.scaling.real: its networks and its gather")
    told.add_argument("--picture", type=writable, help="PNG: predicted times faster against devices")
    options = told.parse_args(arguments)
    exchange, wave = host()
    exchange = exchange if options.exchange is None else options.exchange
    wave = wave if options.wave is None else options.wave
    link = replace(LINKS[options.link], host=exchange)
    pairs = [(replace(NETWORKS[name], outside=Outside(wave)), link) for name in options.networks]
    if options.measured is not None:
        pairs = [(measured(each), link_of(each)) for each in options.measured["networks"].values()]
        link = pairs[0][1]
    print("All seconds are predicted. Nothing below was run on several devices.")
    print(f"gather: {link.title}: {link.source}")
    if options.measured is None:
        print(f"host: {seconds_of(link.host)} a hop before each gather, {seconds_of(wave)} a wave outside the network")
    found: list[Row] = []
    for network, link in pairs:
        print(f"\n{network.title}: {network.source}")
        for steps in options.steps:
            rows, left_out = predictions(network, link, steps)
            show(f"{network.title}, N = {steps}, {link.title}", rows)
            for each in left_out:
                print(f"left out: {each}")
            found.append({"network": network.title, "source": network.source, "steps": steps, "rows": rows})
    write(options.json, link=link.title, link_source=link.source, devices=DEVICES, predicted=found)
    if options.picture is not None:
        scaling_picture(f"predicted, {link.title}: times faster than one step after another", found, options.picture)


if __name__ == "__main__":
    main()

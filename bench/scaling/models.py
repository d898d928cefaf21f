"""What a prediction is made of: networks by what a call of theirs costs, and links by what a gather costs.

Every figure has its source. None was measured on several GPUs by this package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from srds_fast.planner.cost_curve import CostCurve


class Outside(NamedTuple):
    """Seconds that each wave of a run takes outside the network and the gather, and each of its rows."""

    of_a_wave: float = 0.0
    of_a_row: float = 0.0

    def seconds(self, widths: Sequence[int]) -> float:
        return self.of_a_wave * len(widths) + self.of_a_row * sum(widths)


NOTHING = Outside()


@dataclass(frozen=True)
class Network:
    """A network by the cost of its calls.

    Attributes:
        curve: seconds of a call on one device by units, the entries of its batch; the `rows` of the curve are units.
        units: of a row: 2 under classifier-free guidance.
        unit_bytes: of the output of one unit.
        outside: what runs take outside the network and the gather; by_method: of some methods, by name.
        source: of the curve, and what is assumed beyond it.
    """

    title: str
    curve: CostCurve
    units: int
    unit_bytes: int
    source: str
    outside: Outside = NOTHING
    by_method: Mapping[str, Outside] = field(default_factory=dict)


@dataclass(frozen=True)
class Link:
    """What it takes to bring the outputs of a wave to all devices.

    Attributes:
        base, hop: seconds of latency, once and for each of G - 1 hops of a ring.
        bandwidth: bytes per second, in each direction.
        host: seconds of the exchange between hosts before each gather, a hop.
    """

    title: str
    base: float
    hop: float
    bandwidth: float
    source: str
    host: float = 0.0

    def seconds(self, devices: int, nbytes: int) -> float:
        """Of a gather of so many bytes, all devices together: (G - 1) / G of them come in through a ring."""
        if devices == 1:
            return 0.0
        hops = devices - 1
        return self.base + hops * (self.hop + self.host) + nbytes * hops / devices / self.bandwidth


NCCL = "NCCL's own model of a ring, src/graph/tuning.cc (baseLat, hwLat, protocol Simple)"
LINKS = {
    "nvlink": Link("NVLink, one A100 server", 8.4e-6, 3.4e-6, 235e9, f"{NCCL}; its bound for compute capability 8.0"),
    "pcie": Link("PCIe 3.0 x16", 8.4e-6, 5.7e-6, 12e9, f"{NCCL}; PCI_WIDTH of src/graph/topo.h"),
}
# what two processes of one CPU were measured to take, by `bench.scaling.real`
HOSTS = Path(__file__).parents[1] / "results" / "scaling-cpu.json"


class Host(NamedTuple):
    """Seconds on the host: of a hop of the exchange before each gather, and of a wave outside its network call."""

    exchange: float
    wave: float


def host() -> Host:
    """As measured between two processes of one CPU; nobody has measured it between GPUs."""
    found = json.loads(HOSTS.read_text())
    return Host(found["exchange_seconds"], found["wave_seconds"])


NETWORKS = {
    "flux": Network(
        "Flux.1-dev, 1024 x 1024, H100",
        CostCurve((1,), (4.30 / 28,)),
        1,
        4096 * 64 * 2,
        "xDiT's page on Flux: 28 steps in 4.30 s, compiled, on one H100. Assumed: compute-bound, c(n) = n c(1)",
    ),
    "sdxl": Network(
        "SDXL, 1024 x 1024, guidance, RTX 3090",
        CostCurve((1, 2), (16.49 / 100, 16.49 / 50)),
        2,
        4 * 128 * 128 * 2,
        "Hybridiff, arXiv 2602.21760: 50 steps of DDIM in 16.49 s. Assumed: compute-bound, one branch costs half",
    ),
    "sd2": Network(
        "Stable Diffusion 2, guidance, A100",
        CostCurve((2, 2 * 46), (50.0 / 1000, 50.0 / 0.75 / 44)),
        2,
        4 * 96 * 96 * 2,
        "ParaDiGMS, its repository: 1000 steps in 50.0 s; 44 waves of 46 rows, 0.75 times as fast on one GPU (read off "
        "a plot). Assumed: one branch costs as much as two",
    ),
    "vla": Network(
        "LingBot-VLA, Intel B60",
        CostCurve((1, 10), (0.2135 / 10, 0.0905)),
        1,
        2**14,
        "vLLM-Omni, a trial of Picard sweeps: 10 steps in 213.5 ms, a call of 10 rows in 90.5 ms (projected there)",
    ),
}


# what a process does alone, and what two do together
ALONE, RANKS = "one thread", "two processes"


def measured(each: dict[str, Any], how: str = RANKS) -> Network:
    """A network that `bench.scaling.real` has measured, of its JSON. how: ALONE or RANKS."""
    costs = each[how]
    return Network(
        f"{each['name']}, one CPU thread a device",
        CostCurve(tuple(costs["units"]), tuple(costs["seconds"])),
        each["units_of_a_row"],
        each["unit_bytes"],
        f"measured by bench.scaling.real, in loops of {how}; beyond the widest call: in proportion",
        Outside(*costs["host"]),
        {method: Outside(*each) for method, each in costs["host_by_method"].items()},
    )


def link_of(each: dict[str, Any]) -> Link:
    """The gather between two processes, as `bench.scaling.real` has measured it in loops."""
    costs = each[RANKS]
    title = "gloo between processes of one CPU"
    source = "measured by bench.scaling.real, in loops; header and waiting included"
    bandwidth = 1 / max(1e-15, costs["gather_seconds_of_a_byte"])
    return Link(title, 0.0, costs["gather_latency"], bandwidth, source)


Gather = Callable[[int, int], float]
"""(devices, bytes) -> seconds."""


def gather_of(each: dict[str, Any]) -> Gather:
    """What two processes take for a gather, by the rows for which it was measured; alone, none.

    A link of latency and bytes is not enough here: where one process evaluates a single unit, the other has none, and
    neither waits for a call of the other to end.
    """
    rows, seconds = zip(*((int(count), taken) for count, taken in each[RANKS]["gather_by_rows"].items()), strict=True)
    row_bytes = each["units_of_a_row"] * each["unit_bytes"]

    def gather(devices: int, nbytes: int) -> float:
        return 0.0 if devices == 1 else float(np.interp(nbytes / row_bytes, rows, seconds))

    return gather

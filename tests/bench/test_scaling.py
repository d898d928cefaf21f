"""The simulator of several devices: known answers; and that every method has a row with what was predicted for it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from bench.scaling import __main__ as command
from bench.scaling import models, predict
from bench.scaling.models import Link, Network, Outside, gather_of, link_of, measured
from bench.scaling.predict import Way
from bench.scaling.probes import fitted
from srds_fast.planner.choose import choose, fixed_at
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.planner.settings import Settings

IN_PROPORTION = CostCurve((1, 64), (1.0, 64.0))
LINK = Link("a link", 1.0, 0.1, 100.0, "made up", host=0.4)
ONE = {"units": [2, 4], "seconds": [0.5, 1.5], "host": [0.5, 0.0], "host_by_method": {}}
TWO = {"units": [2, 4], "seconds": [1.0, 2.0], "host": [0.25, 0.125], "host_by_method": {"sequential": [0.5, 0.0]}}
COSTS = {
    "name": "one",
    "units_of_a_row": 2,
    "unit_bytes": 8,
    models.ALONE: ONE,
    models.RANKS: {
        **TWO,
        "gather_latency": 0.5,
        "gather_seconds_of_a_byte": 0.1,
        "gather_by_rows": {"1": 0.25, "2": 1.0, "4": 2.0},
    },
}


def test_a_gather_takes_its_latency_a_hop_for_each_other_device_and_its_bytes() -> None:
    assert LINK.seconds(1, 1000) == 0.0
    assert LINK.seconds(4, 1000) == pytest.approx(1.0 + 3 * (0.1 + 0.4) + 750 / 100)


def collocation(replicated: bool = False) -> Way:
    """A run of two sweeps."""
    plan = replace(fixed_at(choose(4, Settings(method="collocation")), 2), replicated=replicated)
    return Way("collocation", "", plan, 2)


def test_a_wave_takes_what_the_busiest_device_does_the_gather_and_the_host() -> None:
    network = Network("a network", IN_PROPORTION, 2, 10, "made up", Outside(0.25, 0.5))
    widths = collocation().widths
    waves, rows, host = len(widths), sum(widths), 0.25 * len(widths) + 0.5 * sum(widths)
    assert waves == 2
    assert predict.seconds(collocation(), network, 1, LINK.seconds) == pytest.approx(2 * rows + host)
    shared = predict.seconds(collocation(), network, 2, lambda devices, nbytes: nbytes / 100)
    assert shared == pytest.approx(rows + 20 * rows / 100 + host), "half of the units, and the bytes of all"


def test_where_no_rows_are_shared_nothing_is_gathered() -> None:
    network = Network("a network", IN_PROPORTION, 2, 10, "made up")
    alone = predict.seconds(collocation(), network, 1, LINK.seconds)
    assert predict.seconds(collocation(replicated=True), network, 4, LINK.seconds) == alone


def test_the_hosts_time_is_that_of_the_method_where_it_was_measured() -> None:
    network = Network("a network", IN_PROPORTION, 1, 0, "made up", Outside(0.25), {"collocation": Outside(0.5)})
    rows = sum(collocation().widths)
    assert predict.seconds(collocation(), network, 1, LINK.seconds) == pytest.approx(rows + 2 * 0.5)
    sequential = Way("sequential", "", choose(4, Settings(method="sequential")), 1)
    assert predict.seconds(sequential, network, 1, LINK.seconds) == pytest.approx(4 + 4 * 0.25)


def test_what_was_measured_comes_back_as_a_network_and_a_link() -> None:
    found, link = measured(COSTS), link_of(COSTS)
    assert (found.curve(4), found.units, found.unit_bytes) == (2.0, 2, 8)
    assert (found.outside, found.by_method) == ((0.25, 0.125), {"sequential": (0.5, 0.0)})
    assert measured(COSTS, models.ALONE).curve(4) == 1.5
    assert link.seconds(2, 40) == pytest.approx(0.5 + 40 / 2 / 10)
    row = 2 * 8
    assert [gather_of(COSTS)(2, rows * row) for rows in (1, 2, 3, 4)] == pytest.approx([0.25, 1.0, 1.5, 2.0])
    assert gather_of(COSTS)(1, row) == 0.0


def test_the_hosts_time_is_found_from_runs_whose_waves_are_narrow_and_wide() -> None:
    counts = (50, 50), (7, 210), (3, 15)
    assert fitted([(waves, rows, 0.2 * waves + 0.1 * rows) for waves, rows in counts]) == pytest.approx((0.2, 0.1))


def test_no_cost_is_negative() -> None:
    assert fitted([(1, 1, 3.0), (1, 2, 2.0), (1, 3, 1.0)])[1] == 0.0
    assert fitted([(1, 1, 1.0), (1, 2, 3.0), (1, 3, 5.0)])[0] == 0.0


def test_more_devices_never_take_longer_but_for_their_gathers_and_are_offered_more_plans() -> None:
    network = Network("a network", IN_PROPORTION, 1, 0, "made up")
    free = Link("free", 0.0, 0.0, 1.0, "made up")
    rows, _ = command.predictions(network, free, 50)
    for row in rows[:-1]:
        times = pairwise(row["predicted_seconds"])
        assert all(later <= before * (1 + 1e-12) for before, later in times), row["method"]
    auto, sequential = rows[-1]["predicted_seconds"], rows[0]["predicted_seconds"]
    assert auto[0] == sequential[0] == 50.0, "one device makes one step after another where rows cost in proportion"
    assert auto[15] < auto[3] < 0.8 * sequential[3]


def test_the_hosts_time_is_the_one_that_was_measured() -> None:
    found = json.loads(models.HOSTS.read_text())
    assert models.host() == (found["exchange_seconds"], found["wave_seconds"])
    assert all(0 < seconds < 0.1 for seconds in models.host())

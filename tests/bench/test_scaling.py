"""The simulator of several devices: known answers; and that every method has a row with what was predicted for it."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from bench.scaling import __main__ as command
from bench.scaling import models, predict
from bench.scaling.models import Link, Network, link_of, measured
from bench.scaling.probes import fitted
from srds_fast.planner.cost_curve import CostCurve

IN_PROPORTION = CostCurve((1, 64), (1.0, 64.0))
LINK = Link("a link", 1.0, 0.1, 100.0, "made up", host=0.4)
COSTS = {
    "name": "one",
    "units": [2, 4],
    "seconds": [1.0, 2.0],
    "seconds_alone": [0.5, 1.5],
    "gather_latency": 0.5,
    "gather_seconds_of_a_byte": 0.1,
    "units_of_a_row": 2,
    "unit_bytes": 8,
    "outside": 0.25,
    "outside_of_a_row": 0.125,
}


def test_a_gather_takes_its_latency_a_hop_for_each_other_device_and_its_bytes() -> None:
    assert LINK.seconds(1, 1000) == 0.0
    assert LINK.seconds(4, 1000) == pytest.approx(1.0 + 3 * (0.1 + 0.4) + 750 / 100)


def test_a_wave_takes_what_the_busiest_device_does_the_gather_and_the_host() -> None:
    network = Network("a network", IN_PROPORTION, 2, 10, "made up", outside=0.25, outside_of_a_row=0.5)
    alone = predict.seconds([1, 3], network, 1, LINK.seconds)
    assert alone == pytest.approx((2 + 6) + 2 * 0.25 + 4 * 0.5)
    shared = predict.seconds([1, 3], network, 4, lambda devices, nbytes: nbytes / 100)
    assert shared == pytest.approx((1 + 2) + (20 + 60) / 100 + 2 * 0.25 + 4 * 0.5)


def test_what_was_measured_comes_back_as_a_network_and_a_link() -> None:
    found, link = measured(COSTS), link_of(COSTS)
    assert (found.curve(4), found.units, found.unit_bytes) == (2.0, 2, 8)
    assert (found.outside, found.outside_of_a_row) == (0.25, 0.125)
    assert measured(COSTS, alone=True).curve(4) == 1.5
    assert link.seconds(2, 40) == pytest.approx(0.5 + 40 / 2 / 10)


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

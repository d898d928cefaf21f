"""All benches of the registry under pytest-benchmark: `pytest bench --benchmark-only`, see README.md."""

from __future__ import annotations

from typing import Any

import pytest

from . import green, measures
from .registry import REGISTRY, Bench

WARM_UP = 2
BENCHES = [
    pytest.param(bench, id=name, marks=[getattr(pytest.mark, mark) for mark in bench.marks])
    for name, bench in REGISTRY.items()
]


@pytest.fixture(scope="session")
def red() -> dict[tuple[str, ...], str | None]:
    """By test files, why they are red, or None; of those that were asked for in this session."""
    return {}


@pytest.fixture
def its_tests_are_green(bench: Bench, red: dict[tuple[str, ...], str | None]) -> None:
    if bench.tests not in red:
        try:
            green.require(bench.tests)
            red[bench.tests] = None
        except green.Red as why:
            red[bench.tests] = str(why)
    why_not = red[bench.tests]
    if why_not is not None:
        pytest.fail(why_not, pytrace=False)


@pytest.mark.benchmark(timer=measures.clock())
@pytest.mark.parametrize("bench", BENCHES)
@pytest.mark.usefixtures("its_tests_are_green")
def test_bench(bench: Bench, sizes: dict[str, int], benchmark: Any) -> None:
    prepared = bench.prepare(measures.DEVICE, sizes)
    for _ in range(WARM_UP):  # the second call of a graph replays
        prepared.call()
    benchmark.group = bench.peers
    benchmark(prepared.call)
    benchmark.extra_info |= {
        "what": bench.what,
        "sizes": bench.sizes_on(measures.DEVICE, sizes),
        **measures.around(prepared),
        **measures.where(),
    }

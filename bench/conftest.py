"""Options of `pytest bench`, and what is refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from .registry import REGISTRY


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a size other than the default, of all benches that have it: --size steps=25 --size samples=4",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SIZES] = dict(map(_size, config.getoption("--size")))


SIZES = pytest.StashKey[dict[str, int]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Ask for the baseline now: pytest-benchmark would run everything, and then warn."""
    benchmarks: Any = getattr(session.config, "_benchmarksession", None)
    if benchmarks is None or not (benchmarks.compare or benchmarks.compare_fail):
        return
    if not benchmarks.compare:
        raise pytest.UsageError(
            "--benchmark-compare-fail was given without --benchmark-compare. There is nothing to hold times against. "
            "Pass both."
        )
    asked = () if benchmarks.compare is True else (benchmarks.compare,)
    if not list(benchmarks.storage.load(*asked)):
        which = "none is" if benchmarks.compare is True else f"none that {benchmarks.compare!r} fits is"
        raise pytest.UsageError(
            f"--benchmark-compare asks for a baseline, and {which} saved for this machine in {benchmarks.storage!s} "
            f"({benchmarks.machine_id}). Save one first, on the commit to compare with: "
            "pytest bench --benchmark-only --benchmark-autosave"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sizes(pytestconfig: pytest.Config) -> dict[str, int]:
    """Sizes that were asked for."""
    return pytestconfig.stash[SIZES]


def _size(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name.isidentifier() or not number.isdecimal() or int(number) < 1:
        raise pytest.UsageError(f"--size {text!r} is not a size. It must be NAME=NUMBER, as --size steps=25.")
    known = sorted({each for bench in REGISTRY.values() for sizes in bench.sizes.values() for each in sizes})
    if name not in known:
        raise pytest.UsageError(f"--size {text!r}: no bench has a size {name!r}. Sizes are {', '.join(known)}.")
    return name, int(number)

from __future__ import annotations

import gc
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# also of processes that tests start: workers and they share the cores, on which threads would wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
# nor need a compiler that is called a few times processes of its own, each of which imports torch
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from typing import Any

import pytest
import tape
import torch
from hypothesis import HealthCheck, settings

# nearly all that collecting makes stays: see `pytest_collection_finish`
gc.set_threshold(100_000)

# timings on shared machines jitter: a slow example is no failure
for profile, examples in (("default", 25), ("exhaustive", 50), ("full", 700)):
    settings.register_profile(
        profile, max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


def exhaustive(config: pytest.Config) -> bool:
    return "exhaustive" in config.option.markexpr.replace("not exhaustive", "")


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.getoption("--hypothesis-profile")
    settings.load_profile(chosen or ("exhaustive" if exhaustive(config) else "default"))


# graphs need a CUDA device: on the CPU the tests record with tapes
tape.install()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # tiny networks are slower, and now and then stalled, on several threads
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _levels_of_loggers() -> Any:
    """What a command or a test sets is not for the next test."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "srds_fast")]
    before = [each.level for each in loggers]
    yield
    for each, level in zip(loggers, before, strict=True):
        each.setLevel(level)


# kernels run on a GPU, or in processes that interpret them: see test_kernels.py
collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["kernels"]


@pytest.hookimpl(tryfirst=True)  # before pytest selects by -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if exhaustive(config) and getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("exhaustive")  # it has more examples then
    for marker, wanted in (("exhaustive", exhaustive(config)), ("ray", "ray" in config.option.markexpr)):
        if not wanted:
            left_out = [item for item in items if item.get_closest_marker(marker)]
            items[:] = [item for item in items if item not in left_out]
            config.hook.pytest_deselected(items=left_out)
    # the longest first: at the end one worker would wait for the other
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    # modules and collected tests stay: half a million objects that need not be walked again and again for garbage
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.hookimpl(optionalhook=True)  # also without pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker gets neighbours, which share fixtures and cached results; who is done first takes from the others."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)

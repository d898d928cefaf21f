from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tape
import torch
from hypothesis import HealthCheck, settings

# timings on shared machines jitter: a slow example is no failure
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

# graphs need a CUDA device: on the CPU the tests record with tapes
tape.install()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # tiny networks are slower, and now and then stalled, on several threads
    torch.set_num_threads(1)


# kernels run on a GPU, or in processes that interpret them: see test_kernels.py
collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["kernels"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

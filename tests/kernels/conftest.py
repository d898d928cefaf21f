"""Tests of the kernels against their references: on a GPU, or in Triton's interpreter (see tests/test_kernels.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from srds_fast.kernels.common import dispatch

if dispatch.interpreted():
    from interpreting import quicker

    quicker()


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert dispatch.implementation(device) != "torch", "else a reference is compared with itself"
    return device


FENCE = 64


@pytest.fixture(autouse=True)
def _fenced_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buffers of a shape lie between values that no kernel may write: it would write to somebody else's memory."""
    fences: list[Tensor] = []

    def fenced(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(tensor: Tensor, *shape: Any, **kwargs: Any) -> Tensor:
            size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
            whole = make(tensor, size.numel() + 2 * FENCE, **kwargs)
            for fence in (whole[:FENCE], whole[-FENCE:]):
                fences.append(fence.fill_(77))
            return whole[FENCE:-FENCE].view(size)

        return made

    for name in ("new_empty", "new_zeros"):
        monkeypatch.setattr(Tensor, name, fenced(getattr(Tensor, name)))
    yield
    kept = (torch.equal(fence, torch.full_like(fence, 77)) for fence in fences)
    assert all(kept), "a kernel has written beyond the end of a buffer"


@pytest.fixture(autouse=True)
def _poisoned_memory(_fenced_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh buffers hold NaN, or 113 in integers, so that a value that a kernel forgets to write is noticed."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 113)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))

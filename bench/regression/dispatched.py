"""What a piece of code dispatches to torch, in counts that are the same integers on every machine.

Taken on a CPU they say what a CUDA device would be asked to do: an operation of our kernels counts as the launches that
it is there. What its reference computes in its place is counted under `operations` only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from srds_fast.engine.graphs.capture_checks import new_in, refuse_uncapturable, tensors_in
from srds_fast.errors import CaptureFailed
from srds_fast.kernels.fixed_point_wave import reference as fixed_point_wave
from srds_fast.kernels.secant_sweep import launches
from srds_fast.kernels.secant_sweep import reference as secant_sweep
from srds_fast.kernels.wave_update import reference as wave_update
from srds_fast.kernels.wave_update.traffic import traffic

NAMES = ("launches", "host_waits", "allocations", "bytes_allocated", "bytes_moved", "operations")
"""What is counted.

launches: operations that compute something; views and bare allocations are none.
host_waits: operations for which the host waits for the device, or copies to or from it.
allocations: of new memory; bytes_allocated: their size.
bytes_moved: by `wave_update`, of device memory and caches, see `traffic`.
operations: all that the CPU dispatches, views and the references of our kernels included.
"""
# these read a tensor without dispatching anything on a CPU
_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_EMPTY = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}


def _of_secant_sweep(table: Any, number: int, memory: Any, *others: Any) -> int:
    *_, constrain, _ = others
    if constrain is not None:
        return 0
    steps, expected = table.num_steps - table.waves[number].first, memory.expected
    return launches(steps, expected.shape[2], expected.dtype, table.history)


_KERNELS: tuple[tuple[Any, str, Callable[..., int]], ...] = (
    (wave_update, "wave_update", lambda *args: 1),
    (fixed_point_wave, "sweep", lambda table, *others: int(table.fused)),
    # with history, the inner products are a launch of their own
    (fixed_point_wave, "mix", lambda table, *others: table.fused * (1 + (table.history > 0))),
    (secant_sweep, "secant_sweep", _of_secant_sweep),
)
"""The references of our kernels, and of how many launches a call would be on a CUDA device; 0: no kernel runs."""


class Dispatched(TorchDispatchMode):
    """Counts what runs within it, on a CPU: `counts` has the number so far for each of `NAMES`.

    Nothing is counted while it is `paused`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.in_kernel = self.paused = False
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        for owner, name, launches_of in _KERNELS:
            reference = self._as_kernel(name, getattr(owner, name), launches_of)
            self._patches.enter_context(patch.object(owner, name, reference))
        self._patches.enter_context(_Reads(self))
        super().__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        super().__exit__(*why)
        self._patches.close()

    def around_calls(self) -> Counter[str]:
        """The counts so far. Asked for before and after every call of a network, whose operations are left out."""
        self.paused = not self.paused
        return self.counts.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self.counts["operations"] += 1
        if not self.in_kernel:
            made = self._count_new(out, args, kwargs)
            view = not made and not func._schema.is_mutable
            self.counts["launches"] += not view and func.overloadpacket.__name__ not in _EMPTY
            self.counts["host_waits"] += _waits(func, args, kwargs)
        return out

    def _count_new(self, out: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Count the memory of the tensors in `out` that are not in the arguments, and return these tensors."""
        made = new_in(out, tensors_in((args, kwargs)))
        self.counts["allocations"] += len(made)
        self.counts["bytes_allocated"] += sum(each.untyped_storage().nbytes() for each in made)
        return made

    def _as_kernel(
        self, name: str, reference: Callable[..., Any], launches_of: Callable[..., int]
    ) -> Callable[..., Any]:
        """The reference, counted as the kernel that it stands for; without one, as the operations that it is."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            made = 0 if self.in_kernel else launches_of(*args)
            if not made:
                return reference(*args, **kwargs)
            self.counts["launches"] += made
            if name == "wave_update":
                self.counts["bytes_moved"] += _bytes_moved(*args)
            self.in_kernel = True
            out = reference(*args, **kwargs)
            self.in_kernel = False
            self._count_new(out, args, kwargs)
            return out

        return counted


class _Reads(TorchFunctionMode):
    """The host reads a tensor."""

    def __init__(self, dispatched: Dispatched) -> None:
        super().__init__()
        self._dispatched = dispatched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._dispatched.counts["host_waits"] += func in _READS and not self._dispatched.in_kernel
        return func(*args, **(kwargs or {}))


def _bytes_moved(table: Any, number: int, buffers: Any, m: Tensor | None, guidance: Tensor | None, network: Any) -> int:
    element = (network.dtype or buffers.memory.dtype).itemsize if m is None else m.element_size()
    branches = 1 if guidance is None else len(guidance)
    each: int = traffic(table, number, element, branches, network.branches).moved
    return each * int(buffers.slots[0].numel())


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """What a graph could not hold is what the host waits for, except for random numbers."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    try:
        refuse_uncapturable(func, args, kwargs)
    except CaptureFailed:
        return True
    return False

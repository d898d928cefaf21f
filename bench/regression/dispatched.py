"""What a piece of code dispatches to torch, in counts that are the same integers on every machine.

Taken on a CPU they say what a CUDA device would be asked to do: an operation of our kernels counts as the launches that
it is there. What its reference computes in its place is counted under `operations` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from srds_fast.engine.graphs.capture_checks import new_in, refuse_uncapturable, tensors_in
from srds_fast.errors import CaptureFailed
from srds_fast.kernels.fixed_point_wave import reference as fixed_point_wave
from srds_fast.kernels.wave_update import reference as wave_update
from srds_fast.kernels.wave_update.traffic import traffic

_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_EMPTY = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}


@dataclass(frozen=True)
class Counts:
    """
    Attributes:
        launches: operations that compute something; views and bare allocations are none.
        host_waits: operations for which the host waits for the device, or copies to or from it.
        allocations: of new memory; bytes_allocated: their size.
        bytes_moved: by `wave_update`, of device memory and caches, see `traffic`.
        operations: all that the CPU dispatches, views and the references of our kernels included.
    """

    launches: int = 0
    host_waits: int = 0
    allocations: int = 0
    bytes_allocated: int = 0
    bytes_moved: int = 0
    operations: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in NAMES))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) - getattr(other, name) for name in NAMES))


NAMES = tuple(field.name for field in fields(Counts))


class Kernel(NamedTuple):
    """A reference that stands for a kernel of ours. What the functions are given are the arguments of its call.

    Attributes:
        owner, name: where the reference is looked up when it is called.
        launches: -> kernels that a GPU launches for a call.
        moved: -> bytes that it moves there.
        fused: -> whether a GPU runs it as a kernel; otherwise it counts as the operations it is.
    """

    owner: Any
    name: str
    launches: Callable[..., int] = lambda *_: 1
    moved: Callable[..., int] = lambda *_: 0
    fused: Callable[..., bool] = lambda *_: True


def _moved(table: Any, number: int, buffers: Any, m: Tensor | None, guidance: Tensor | None, network: Any) -> int:
    """Bytes that a `wave_update` moves; 0 if its number is on the device, where the host does not know it."""
    if isinstance(number, Tensor):
        return 0
    element = (network.dtype or buffers.memory.dtype).itemsize if m is None else m.element_size()
    branches = 1 if guidance is None else len(guidance)
    each: int = traffic(table, number, element, branches, network.branches).moved
    return each * int(buffers.slots[0].numel())


KERNELS = (
    Kernel(wave_update, "wave_update", moved=_moved),
    Kernel(fixed_point_wave, "sweep", fused=lambda table, *_: table.fused),
    # with history, inner products are a launch of their own
    Kernel(
        fixed_point_wave,
        "mix",
        launches=lambda table, *_: 2 if table.history else 1,
        fused=lambda table, *_: table.fused,
    ),
)


class Dispatched(TorchDispatchMode):
    """Counts what runs within it, on a CPU.

    Args:
        stand_in: count a reference as the kernel that it stands for; otherwise as the operations it is.

    Attributes:
        counts: so far.
    """

    def __init__(self, stand_in: bool = True) -> None:
        super().__init__()
        self.counts = Counts()
        self._kernels = KERNELS if stand_in else ()
        self._unseen = False
        self._in_kernel = False
        self._functions = _Functions(self)
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        for kernel in self._kernels:
            self._replace(kernel)
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        super().__exit__(*why)
        self._functions.__exit__(*why)
        while self._replaced:
            setattr(*self._replaced.pop())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._unseen:
            return out
        if self._in_kernel:
            self.counts += Counts(operations=1)
            return out
        made = new_in(out, tensors_in((args, kwargs)))
        name = func.overloadpacket.__name__
        view = not made and not func._schema.is_mutable
        self.counts += Counts(
            launches=int(not view and name not in _EMPTY),
            host_waits=int(_waits(func, args, kwargs)),
            allocations=len(made),
            bytes_allocated=sum(map(_bytes, made)),
            operations=1,
        )
        return out

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Within it nothing is counted."""
        before, self._unseen = self._unseen, True
        try:
            yield
        finally:
            self._unseen = before

    def waited(self) -> None:
        """The host has read a tensor."""
        if not self._unseen and not self._in_kernel:
            self.counts += Counts(host_waits=1)

    def _replace(self, kernel: Kernel) -> None:
        reference = getattr(kernel.owner, kernel.name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._in_kernel or not kernel.fused(*args):
                return reference(*args, **kwargs)
            launches = kernel.launches(*args)
            self._in_kernel = True
            try:
                out = reference(*args, **kwargs)
            finally:
                self._in_kernel = False
            if not self._unseen:
                made = new_in(out, tensors_in((args, kwargs)))
                self.counts += Counts(
                    launches=launches,
                    allocations=len(made),
                    bytes_allocated=sum(map(_bytes, made)),
                    bytes_moved=kernel.moved(*args),
                )
            return out

        self._replaced.append((kernel.owner, kernel.name, reference))
        setattr(kernel.owner, kernel.name, counted)


class _Functions(TorchFunctionMode):
    """Sees the functions that read a tensor without dispatching anything on a CPU."""

    def __init__(self, dispatched: Dispatched) -> None:
        super().__init__()
        self._dispatched = dispatched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self._dispatched.waited()
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """What a graph could not hold is what the host waits for, except for random numbers."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    try:
        refuse_uncapturable(func, args, kwargs)
    except CaptureFailed:
        return True
    return False


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()

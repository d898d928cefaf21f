"""What a piece of code dispatches to torch, in counts that do not jitter: on any machine the same integers.

Taken on the CPU they say what a CUDA device would be asked to do: an operation of our kernels is as many launches as it
is there, and what its reference computes in place of it is left out but for `operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

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

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


NAMES = tuple(field.name for field in fields(Counts))


class Dispatched(TorchDispatchMode):
    """Counts what runs within it.

    Args:
        stand_in: on the CPU, count a reference as the kernel that it stands for; otherwise as the operations it is.

    Attributes:
        counts: so far.
    """

    def __init__(self, stand_in: bool = True) -> None:
        super().__init__()
        self.counts = Counts()
        self._kernels = _kernels() if torch.cuda.is_available() else _stand_ins() if stand_in else []
        self._unseen = False
        self._in_kernel = False
        self._functions = _Functions(self)
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        for kernel in self._kernels:
            self._replace(*kernel)
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

    def _replace(
        self,
        owner: Any,
        name: str,
        launches: Callable[..., int],
        moved: Callable[..., int],
        stands: Callable[..., bool],
    ) -> None:
        """Count a kernel, or the reference where it stands for one, as so many launches."""
        kernel = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._in_kernel or not stands(*args):
                return kernel(*args, **kwargs)
            count = launches(*args)
            self._in_kernel = True
            try:
                out = kernel(*args, **kwargs)
            finally:
                self._in_kernel = False
            if not self._unseen:
                made = new_in(out, tensors_in((args, kwargs)))
                self.counts += Counts(
                    launches=count,
                    allocations=len(made),
                    bytes_allocated=sum(map(_bytes, made)),
                    bytes_moved=moved(*args),
                )
            return out

        self._replaced.append((owner, name, kernel))
        setattr(owner, name, counted)


_Kernel = tuple[Any, str, Callable[..., int], Callable[..., int], Callable[..., bool]]
"""Where a function is, its name; of a call: its launches, the bytes that it moves, whether it is one of a kernel."""


def _stand_ins() -> list[_Kernel]:
    return [
        (wave_update, "wave_update", _one, _moved, _always),
        *_of_a_wave(fixed_point_wave, fixed_point_wave),
    ]


def _kernels() -> list[_Kernel]:
    from srds_fast.kernels.fixed_point_wave import mix_kernel, sweep_kernel
    from srds_fast.kernels.wave_update import kernel as wave_update

    return [(wave_update, "wave_update", _one, _moved, _always), *_of_a_wave(sweep_kernel, mix_kernel)]


def _of_a_wave(sweep: Any, mix: Any) -> list[_Kernel]:
    return [(sweep, "sweep", _one, _unknown, _fused), (mix, "mix", _of_mixing, _unknown, _fused)]


class _Functions(TorchFunctionMode):
    """Sees the functions that read a tensor and, on the CPU, dispatch nothing."""

    def __init__(self, dispatched: Dispatched) -> None:
        super().__init__()
        self._dispatched = dispatched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self._dispatched.waited()
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """What a graph could not hold is what the host waits for, but for random numbers."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    try:
        refuse_uncapturable(func, args, kwargs)
    except CaptureFailed:
        return True
    return False


def _moved(
    table: Any, number: int, buffers: Any, m: Tensor | None, guidance: Tensor | None, network: Any, _: Any
) -> int:
    """Bytes that an update moves."""
    element = (network.dtype or buffers.memory.dtype).itemsize if m is None else m.element_size()
    branches = 1 if guidance is None else len(guidance)
    each: int = traffic(table, number, element, branches, network.branches).moved
    return each * int(buffers.slots[0].numel())


def _unknown(*_: Any) -> int:
    return 0


def _one(*_: Any) -> int:
    return 1


def _of_mixing(table: Any, *_: Any) -> int:
    """The inner products are one more."""
    return 2 if table.history else 1


def _always(*_: Any) -> bool:
    return True


def _fused(table: Any, *_: Any) -> bool:
    fused: bool = table.fused
    return fused


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()

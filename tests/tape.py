"""A recorder for the CPU: keeps every operation of a recording, and does them again on the same tensors.

It behaves as a CUDA graph does: Python runs once, while recording; numbers and shapes are frozen; a replay reads and
writes the memory that the recording read and wrote. Recording changes nothing that existed before, and what it made
holds NaN until the first replay. Whatever a capture would get wrong on a GPU is therefore wrong here as well.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from srds_fast.engine.graphs.capture_checks import CaptureCheck, failed, new_in, storage_of, tensors_in
from srds_fast.engine.graphs.recorder import RECORDERS

T = TypeVar("T")

_aten = torch.ops.aten
_MAKES_ROOM = {
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default,
    _aten.new_empty_strided.default, _aten.empty_permuted.default,
}  # fmt: skip


class Tape(CaptureCheck):
    """The operations of one recording. It records while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[Callable[[], None]] = []
        self._made_tensors: list[Tensor] = []
        self._before: dict[Hashable, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def replay(self) -> None:
        """Do the operations again."""
        for operation in self._operations:
            operation()

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Nothing: what is not looked at is not on the tape."""
        yield

    def execute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation and note it; keep what it overwrites."""
        given = list(tensors_in((args, kwargs)))
        writes = func._schema.is_mutable
        for tensor in given if writes else ():
            if storage_of(tensor) not in self.made | self._before.keys():
                # all of the memory that it lies in, as bytes
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
                self._before[storage_of(tensor)] = whole, whole.clone()
        out = func(*args, **kwargs)
        outputs = new_in(out, given)
        self._made_tensors += outputs

        def again() -> None:
            for kept, found in zip(outputs, new_in(func(*args, **kwargs), given), strict=True):
                kept.copy_(found)

        if (outputs or writes) and func not in _MAKES_ROOM:  # a view stays one
            self._operations.append(again)
        return out

    def put_back(self) -> None:
        """Undo what recording has done to tensors that were there before, and spoil what it has made."""
        for whole, before in self._before.values():
            whole.copy_(before)
        self._before.clear()
        for tensor in self._made_tensors:
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(torch.nan)


class TapeRecorder:
    """See `srds_fast.engine.graphs.recorder.Recorder`."""

    @torch.no_grad()
    def record(self, work: Callable[[CaptureCheck], T]) -> tuple[Tape, Tape, T]:
        """Run work once."""
        tape = Tape()
        try:
            with tape:
                return tape, tape, work(tape)
        except Exception as error:
            raise failed(error) from error
        finally:
            tape.put_back()

    def release(self) -> None:
        """Nothing: memory is given back with the tape."""


def install() -> None:
    """Record on the CPU with tapes."""
    RECORDERS["cpu"] = lambda device: TapeRecorder()

"""`fast.stream`: a whole image after every iteration, while the call is still running."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.run import Observer
from ..solvers.contract import Checkpoint


def _mark(tensor: Tensor) -> Any:
    """The computing thread: an event to wait for before another stream reads this tensor; None on a CPU."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None


@contextmanager
def _after(mark: Any, tensor: Tensor, stream_on: Callable[[torch.device], Any]) -> Iterator[None]:
    """The reading thread: in the block, work on the tensor runs on another stream and does not delay the run."""
    if mark is None:
        yield
        return
    stream = stream_on(tensor.device)
    stream.wait_event(mark)
    # the allocator must not reuse its memory before this stream has read it
    tensor.record_stream(stream)
    with torch.cuda.device(tensor.device), torch.cuda.stream(stream):
        yield
    # later work on the results uses the current stream, so that stream must wait
    torch.cuda.current_stream(tensor.device).wait_stream(stream)


@dataclass(eq=False)
class Refinement:
    """A whole image after one iteration; iteration 0 is the coarse sweep.

    Attributes:
        latents: [batch, ...], in the pipeline's dtype.
        change: per sample, mean |x^p - x^(p-1)|; None at iteration 0.
    """

    iteration: int
    latents: Tensor
    change: list[float | None] | None
    _decode: Callable[[], list[Any]]

    def __repr__(self) -> str:
        return f"Refinement(iteration={self.iteration}, latents={tuple(self.latents.shape)}, change={self.change})"

    @functools.cached_property
    def images(self) -> list[Any]:
        """PIL images, decoded on first access as the pipeline decodes its result, while later waves run."""
        return self._decode()


class _Abandoned(Exception):
    """The reader closed the stream."""


def refinements(
    call: Callable[[Observer], None], dtype: torch.dtype, decode: Callable[[Tensor], list[Any]]
) -> Iterator[Refinement]:
    """Run a call and yield its checkpoints as refinements.

    The call runs in a separate thread, because a pipeline's loop cannot be suspended. Closing the iterator ends the
    call at its next checkpoint and waits until it has ended. dtype: of the latents in the refinements.
    """
    arrived: queue.Queue[tuple[Checkpoint, Any] | BaseException | None] = queue.Queue()
    stream_on = functools.cache(torch.cuda.Stream)  # one stream for all refinements of the call
    abandoned = threading.Event()
    threads = torch.get_num_threads()

    def observe(checkpoint: Checkpoint) -> None:
        if abandoned.is_set():
            raise _Abandoned
        arrived.put((checkpoint, _mark(checkpoint.sample)))

    def work() -> None:
        torch.set_num_threads(threads)  # a new thread starts with torch's default
        try:
            with suppress(_Abandoned):
                call(observe)
            arrived.put(None)
        except BaseException as error:  # handed to the reader, who raises it
            arrived.put(error)

    def images(latents: Tensor, mark: Any) -> list[Any]:
        with torch.no_grad(), _after(mark, latents, stream_on):
            return decode(latents)

    worker = threading.Thread(target=work, name="srds_fast.pipelines.stream", daemon=True)
    worker.start()
    latents: Tensor | None = None
    try:
        while (item := arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            checkpoint, mark = item
            with _after(mark, checkpoint.sample, stream_on):
                # a checkpoint holds only the samples that still run; the others keep their latents
                latents = checkpoint.sample.to(dtype, copy=True) if latents is None else latents.clone()
                latents[list(checkpoint.samples)] = checkpoint.sample.to(dtype)
            change = None
            if checkpoint.change is not None:
                by_sample = dict(zip(checkpoint.samples, checkpoint.change.tolist(), strict=True))
                change = [by_sample.get(sample) for sample in range(len(latents))]
            decoded = functools.partial(images, latents, _mark(latents))
            yield Refinement(checkpoint.iteration, latents, change, decoded)
    finally:
        abandoned.set()
        worker.join()

"""Streams: a whole image after every iteration, or every few steps, while the call still runs in a thread of its own.

A pipeline's loop cannot be suspended, so the call runs in a worker thread, in a copy of the context in which the stream
was made. It ends at its next wave once the stream is closed, whoever closes it.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..engine import cancellation
from ..engine.run import Observer
from ..solvers.contract import ITERATION, Checkpoint
from ..telemetry.report import Report

# the thread that reads the stream whose call this is; None: the call is no stream's
reader: ContextVar[int | None] = ContextVar("srds_fast.reader", default=None)


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
    """A whole image: after an iteration, or as the network predicts it in the middle of a run.

    Attributes:
        kind: "iteration": the sample after an iteration; the final one too. "x0 preview", of methods that have no whole
            sample before their end, as "sequential": the clean image that the network predicts in the middle of the
            run, blurred at first. A run has up to seven of them, before every eighth part of its steps.
        iteration: its number, 0 for the coarse sweep; of an "x0 preview": the steps that are done.
        latents: [batch, ...]: of a pipeline, its latents in its dtype; of `sample`, the state in the dtype of x.
        change: per sample, mean |x^p - x^(p-1)|; None at iteration 0 and of an "x0 preview".
        final: this is the result of the call, and no refinement follows.
    """

    iteration: int
    latents: Tensor
    change: list[float | None] | None
    final: bool
    _decode: Callable[[], list[Any]]
    kind: str = ITERATION

    def __repr__(self) -> str:
        shape = tuple(self.latents.shape)
        what = f"kind={self.kind!r}, iteration={self.iteration}, latents={shape}"
        return f"Refinement({what}, change={self.change}, final={self.final})"

    @functools.cached_property
    def images(self) -> list[Any]:
        """PIL images, decoded on first access as the pipeline decodes its result, while later waves run."""
        return self._decode()


@dataclass(frozen=True)
class Source:
    """What a stream runs.

    call: runs the call, which tells its checkpoints to an observer. report: of the call, asked in its thread when it
    has ended. begun: told, in the thread that reads, of the call that has begun. ended: told that report in the thread
    that reads. dtype: of the latents in the refinements. decode: makes images of latents.
    """

    call: Callable[[Observer], object]
    report: Callable[[], Report | None]
    begun: Callable[[Worker], None]
    ended: Callable[[Report | None], None]
    dtype: torch.dtype
    decode: Callable[[Tensor], list[Any]]


_Item = tuple[Checkpoint, Any] | BaseException | None
"""What the worker hands to the reader: a checkpoint with its mark, an error, or None after the last."""


class Worker:
    """The thread that runs the call. It does not know its stream, which may be given up while it runs."""

    def __init__(self, source: Source) -> None:
        self.left = threading.Event()  # nobody reads any more
        self.report: Report | None = None
        self._source, self._context = source, copy_context()
        self._thread: threading.Thread | None = None

    @property
    def begun(self) -> bool:
        return self._thread is not None

    def begin(self, deliver: Callable[[_Item], None]) -> None:
        """deliver: takes each item, in the worker's thread; None is the last."""
        work = functools.partial(self._work, deliver, torch.get_num_threads(), threading.get_ident())
        self._thread = threading.Thread(
            target=self._context.run, args=(work,), name="srds_fast.sampling.stream", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the call has ended; not in its own thread, nor in an interpreter that ends."""
        if self._thread is not None and self._thread is not threading.current_thread() and not sys.is_finalizing():
            self._thread.join()

    def _work(self, deliver: Callable[[_Item], None], threads: int, reading: int) -> None:
        torch.set_num_threads(threads)  # a new thread starts with torch's default
        reader.set(reading)
        try:
            with cancellation.using(cancel=self.left):
                self._source.call(lambda checkpoint: deliver((checkpoint, _mark(checkpoint.sample))))
        except BaseException as error:  # handed to the reader, who raises it
            if not self.left.is_set():
                deliver(error)
        finally:
            self.report = self._source.report()
            deliver(None)


class _Refinements:
    """Makes refinements of checkpoints, in the thread that reads them."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._stream_on = functools.cache(torch.cuda.Stream)  # one stream for all refinements of the call
        self._latents: Tensor | None = None

    def of(self, checkpoint: Checkpoint, mark: Any) -> Refinement:
        dtype, latents = self._source.dtype, self._latents
        with _after(mark, checkpoint.sample, self._stream_on):
            # a checkpoint holds only the samples that still run; the others keep their latents
            latents = checkpoint.sample.to(dtype, copy=True) if latents is None else latents.clone()
            latents[list(checkpoint.samples)] = checkpoint.sample.to(dtype)
        self._latents, change = latents, None
        if checkpoint.change is not None:
            by_sample = dict(zip(checkpoint.samples, checkpoint.change.tolist(), strict=True))
            change = [by_sample.get(sample) for sample in range(len(latents))]
        images = functools.partial(self._images, latents, _mark(latents))
        return Refinement(checkpoint.iteration, latents, change, checkpoint.final, images, checkpoint.kind)

    def _images(self, latents: Tensor, mark: Any) -> list[Any]:
        with torch.no_grad(), _after(mark, latents, self._stream_on):
            return self._source.decode(latents)


class Stream(Iterator[Refinement]):
    """Yields refinements; the call begins when the first one is asked for.

    Leaving the loop, `close` or an exception, such as Ctrl-C while it waits, ends the call at its next wave.
    """

    def __init__(self, source: Source) -> None:
        self._worker, self._refinements, self._source = Worker(source), _Refinements(source), source
        self._arrived: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._told: set[int] = set()  # threads that know of the end

    @property
    def report(self) -> Report | None:
        """Of the call, once it has ended."""
        return self._worker.report

    def __next__(self) -> Refinement:
        worker = self._worker
        if worker.left.is_set():
            raise StopIteration
        try:
            if not worker.begun:
                worker.begin(self._arrived.put)
                self._source.begun(worker)
            item = self._arrived.get()
            if isinstance(item, tuple) and not worker.left.is_set():
                return self._refinements.of(*item)
        except BaseException:
            self.close()
            raise
        self.close()
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def close(self) -> None:
        """End the call at its next wave, and wait until it has ended. From any thread, and as often as you like."""
        self._worker.left.set()
        if self._worker.begun:
            self._worker.wait()
            self._arrived.put(None)  # whoever waits for a refinement waits no longer
            self._tell()

    def _tell(self) -> None:
        if (thread := threading.get_ident()) not in self._told:
            self._told.add(thread)
            self._source.ended(self._worker.report)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # nothing may be waited for here: the collector calls this in any thread, which may hold a lock that the call
        # needs in order to end
        self._worker.left.set()


class AsyncStream(AsyncIterator[Refinement]):
    """The same for asyncio: the call runs in a thread, and the event loop goes on meanwhile.

    Cancelling a task that waits for a refinement ends the call at its next wave. To leave a loop early, use
    `async with stream:` or `await stream.aclose()`; a stream that is forgotten ends too, when it is collected. Decode
    in a thread: `await asyncio.to_thread(lambda: refinement.images)`.
    """

    def __init__(self, source: Source) -> None:
        self._worker, self._refinements, self._source = Worker(source), _Refinements(source), source
        self._arrived: asyncio.Queue[_Item] = asyncio.Queue()
        self._over, self._told = asyncio.Event(), False

    @property
    def report(self) -> Report | None:
        """Of the call, once it has ended."""
        return self._worker.report

    async def __anext__(self) -> Refinement:
        worker = self._worker
        if worker.left.is_set():
            raise StopAsyncIteration
        try:
            if not worker.begun:
                worker.begin(_delivery(asyncio.get_running_loop(), self._arrived, self._over))
            item = await self._arrived.get()
            if isinstance(item, tuple) and not worker.left.is_set():
                return self._refinements.of(*item)
        except BaseException:
            await self.aclose()
            raise
        await self.aclose()
        if isinstance(item, BaseException):
            raise item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the call at its next wave, and wait until it has ended. From any task of the event loop."""
        self._worker.left.set()
        if self._worker.begun:
            await self._over.wait()
            self._arrived.put_nowait(None)
            if not self._told:
                self._told = True
                self._source.ended(self._worker.report)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._worker.left.set()


def _delivery(
    loop: asyncio.AbstractEventLoop, arrived: asyncio.Queue[_Item], over: asyncio.Event
) -> Callable[[_Item], None]:
    """Takes items in the worker's thread to a queue of the event loop."""

    def put(item: _Item) -> None:
        arrived.put_nowait(item)
        if item is None:
            over.set()

    def deliver(item: _Item) -> None:
        with suppress(RuntimeError):  # the event loop was closed: nobody waits
            loop.call_soon_threadsafe(put, item)

    return deliver

"""The thread that owns a worker, for code that runs in an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ..engine.cancellation import Cancel
from .contract import ImageRequest, ImageResult
from .dispatcher import Item


class Makes(Protocol):
    """What a thread calls: a `Worker`, or one that stands for several processes."""

    def generate(self, requests: Sequence[ImageRequest], cancel: Cancel | None, way: str) -> list[ImageResult]: ...

    def stream(self, request: ImageRequest, cancel: Cancel | None) -> Any: ...


class WorkerThread:
    """The thread that calls a worker, as a `Runner` of the dispatcher.

    worker: None until it is warm. ending: set when the server ends.
    """

    def __init__(self) -> None:
        self.worker: Makes | None = None
        self.ending = threading.Event()
        self._pool = ThreadPoolExecutor(1, "srds_fast.serving")

    def slots(self) -> int:
        return 0 if self.worker is None or self.ending.is_set() else 1

    async def generate(self, requests: Sequence[ImageRequest], way: str) -> list[ImageResult]:
        assert self.worker is not None
        cancel = threading.Event()
        work = self.run(self.worker.generate, requests, cancel, way)
        found: list[ImageResult] = await self._cancelled_by(cancel, work)
        return found

    async def stream(self, request: ImageRequest) -> AsyncGenerator[Item, None]:
        assert self.worker is not None
        worker, loop, cancel = self.worker, asyncio.get_running_loop(), threading.Event()
        items: asyncio.Queue[Item | None] = asyncio.Queue()

        def read() -> None:
            try:
                for item in worker.stream(request, cancel):
                    loop.call_soon_threadsafe(items.put_nowait, item)
            finally:
                loop.call_soon_threadsafe(items.put_nowait, None)

        reading = self.run(read)
        try:
            while (item := await items.get()) is not None:
                yield item
            await reading
        finally:
            cancel.set()
            await asyncio.gather(reading, return_exceptions=True)

    def run(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Call a function in the thread."""
        return asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the thread, from outside an event loop: wait for what it returns."""
        return self._pool.submit(function, *arguments).result()

    async def end(self) -> None:
        """End the thread, once what it does has ended."""
        self.ending.set()
        await asyncio.to_thread(self._pool.shutdown)

    @staticmethod
    async def _cancelled_by(cancel: threading.Event, work: asyncio.Future[Any]) -> Any:
        """The result of the work. Who waits for it and is cancelled sets the event, and waits until the work ends."""
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            cancel.set()
            await asyncio.gather(work, return_exceptions=True)
            raise

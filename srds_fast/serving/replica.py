"""A replica: the copy of the pipeline on one device, or on several that make each image together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from .batching import Warmed
from .contract import ImageRequest, ImageResult, PartialImage, Refused
from .settings import ServerSettings
from .worker_thread import WorkerThread

T = TypeVar("T")


class Replica:
    """Makes images in a thread of its own, one call at a time. It is ready once its constructor has returned.

    What is refused is returned, not raised: Ray would wrap it, and log it as a failure of the replica.

    Args:
        settings: as plain JSON types.
        resources: of each of its devices, as Ray names them.

    Raises:
        as `Worker.load`.
    """

    def __init__(self, settings: dict[str, Any], resources: dict[str, float]) -> None:
        self._settings = ServerSettings.from_dict(settings)
        self._lost: str | None = None
        self._lives: list[Any] = []  # of the other processes, see `Rank.live`
        self._loss: asyncio.Future[Any] | None = None
        self._thread = WorkerThread()
        self._thread.call(self._load, resources)

    def _load(self, resources: dict[str, float]) -> None:
        if self._settings.devices_per_replica == 1:
            from .worker import Worker

            worker: Any = Worker.load(self._settings)
        else:
            from .ranks import GroupWorker

            worker = GroupWorker(self._settings, resources)
            self._lives = worker.lives
        self._warmed: Warmed = worker.warm()
        self._thread.worker = worker

    async def warmed(self) -> Warmed:
        """Which calls were prepared, and what they cost."""
        return self._warmed

    async def generate(self, requests: Sequence[ImageRequest], way: str) -> list[ImageResult] | Refused:
        """See `Runner.generate`."""
        return await self._unless_lost(self._thread.generate(requests, way))

    async def stream(self, request: ImageRequest) -> AsyncGenerator[PartialImage | ImageResult | Refused, None]:
        """See `Runner.stream`."""
        async with aclosing(self._thread.stream(request)) as items:
            while True:
                item = await self._unless_lost(anext(items, None))
                if item is None:
                    return
                yield item

    def check_health(self) -> None:
        """Asked by Ray Serve every few seconds. An error has the replica replaced."""
        if self._lost is None and self._lives:
            import ray

            ended, _ = ray.wait(self._lives, num_returns=1, timeout=0)
            if ended:
                self._lost = "The process of one of its devices has ended."
        if self._lost is not None:
            raise RuntimeError(f"{self._lost} The replica is to be replaced.")

    async def _unless_lost(self, work: Coroutine[Any, Any, T]) -> T | Refused:
        """The result of the work, or why there is none: what it raises, or that a device was lost meanwhile."""
        doing = asyncio.ensure_future(work)
        if self._lives and self._loss is None:
            ends = [asyncio.ensure_future(_until_ended(each)) for each in self._lives]
            self._loss = asyncio.ensure_future(asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED))
        try:
            await asyncio.wait([doing, *filter(None, [self._loss])], return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                return self._lose("The process of one of its devices ended in the middle of a call.")
            return doing.result()
        except Refused as why:
            if why.code == "replica_lost":
                return self._lose(why.message)
            return why
        finally:
            doing.cancel()
            if doing.cancelling() and self._lost is None:
                await asyncio.wait([doing])  # the device is busy until its thread has ended the wave

    def _lose(self, why: str) -> Refused:
        from .ranks import lost

        self._lost = why
        return lost()


async def _until_ended(life: Any) -> None:
    """Until the process behind it has ended."""
    try:
        await life
    except Exception:
        return

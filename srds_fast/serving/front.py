"""The deployment that clients talk to: the HTTP application, the queue, and which replicas are there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from .app import create_app
from .contract import ImageRequest, ImageResult, Readiness, Refused
from .dispatcher import Dispatcher, Item
from .metrics import Metrics
from .settings import ServerSettings

logger = logging.getLogger("srds_fast")

REPLICA = "Replica"
# seconds between two looks at which replicas there are: while there is none, and later
EARLY, LATER = 0.25, 1.0
# why there is no replica
LOADING = "replicas load the model and warm up"
FAILED = "a replica has failed, as the log of Ray Serve says, and is replaced"
# after a failure of the replica, which is replaced
AGAIN = 5.0
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Front:
    """Answers HTTP requests by the calls of replicas.

    Args:
        settings: as plain JSON types.
        replicas: a handle of their deployment.
    """

    def __init__(self, settings: dict[str, Any], replicas: Any) -> None:
        self._settings = ServerSettings.from_dict(settings)
        self._metrics = Metrics(with_ray=True)
        self._runner = _Replicas(replicas)
        self._dispatcher = Dispatcher(self._runner, self._settings, self._metrics)
        self._watching: asyncio.Task[None] | None = None
        self._app = create_app(self, self._settings)

    async def answer(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        """The ASGI application."""
        self._watch()
        await self._app(scope, receive, send)

    async def drain(self) -> None:
        """Let nobody in any more, and answer those who are in, see `ServerSettings.drain_seconds`."""
        await self._dispatcher.drain(self._settings.drain_seconds)

    def models(self) -> list[str]:
        return [self._settings.model_name]

    async def readiness(self) -> Readiness:
        return Readiness(self._runner.slots() > 0, self._runner.reason)

    async def generate(self, request: ImageRequest) -> ImageResult:
        return await self._dispatcher.generate(request)

    def stream(self, request: ImageRequest) -> AsyncGenerator[Item, None]:
        return self._dispatcher.stream(request)

    async def metrics(self) -> str:
        return self._metrics.text()

    def _watch(self) -> None:
        """Begin to look at which replicas there are, if that was not begun."""
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._runner.watch(self._dispatcher))


class Application:
    """The ASGI application of the deployment in whose process it is called.

    Ray Serve sends it to the process of the deployment, so it holds nothing itself.
    """

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
        else:
            front: Front = serve.get_replica_context().servable_object
            await front.answer(scope, receive, send)


class _Replicas:
    """The replicas, as a `Runner` of the dispatcher. reason: why there is none."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._slots, self.reason = handle, 0, LOADING

    def slots(self) -> int:
        return self._slots

    async def generate(self, requests: Sequence[ImageRequest], way: str) -> list[ImageResult]:
        response = self._handle.generate.remote(list(requests), way)
        try:
            found: list[ImageResult] | Refused = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayError, RayServeException) as why:
            raise _lost(why) from why
        if isinstance(found, Refused):
            raise found
        return found

    async def stream(self, request: ImageRequest) -> AsyncGenerator[Item, None]:
        items = self._handle.options(stream=True).stream.remote(request)
        try:
            async for item in items:
                if isinstance(item, Refused):
                    raise item
                yield item
        except (RayError, RayServeException) as why:
            raise _lost(why) from why
        finally:
            items.cancel()  # of one that has ended it does nothing

    async def watch(self, dispatcher: Dispatcher) -> None:
        """Look again and again how many replicas run, and tell the dispatcher of changes."""
        known = False
        while True:
            try:
                slots, self.reason = await asyncio.to_thread(_running)
                if slots and not known:
                    dispatcher.prepare(await self._handle.warmed.remote())
                    known = True
            except Exception as why:  # the controller of Ray Serve starts anew, say
                logger.warning("It is not known which replicas run: %s", why)
            else:
                if slots != self._slots:
                    self._slots = slots
                    dispatcher.wake()
            await asyncio.sleep(LATER if self._slots else EARLY)


def _running() -> tuple[int, str]:
    """How many replicas run, and why no more do, for clients: what Ray Serve says has tracebacks."""
    name = serve.get_replica_context().app_name
    deployment = serve.status().applications[name].deployments.get(REPLICA)
    if deployment is None:
        return 0, LOADING
    reason = FAILED if deployment.status.name in ("UNHEALTHY", "DEPLOY_FAILED") else LOADING
    return deployment.replica_states.get("RUNNING", 0), reason


def _lost(why: Exception) -> Refused:
    logger.error("A replica was lost in the middle of a call: %s", why)
    return Refused(
        503,
        "The replica was lost while it made the image. Try again: another one takes its place.",
        code="replica_lost",
        retry_after=AGAIN,
    )

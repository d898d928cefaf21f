"""A server in one process, without Ray: the application, a queue, and one thread that owns the pipeline.

app = create_local_app(ServerSettings(model="digits"))  # then: uvicorn module:app

"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from ..errors import Cancelled, InvalidArgument
from .app import create_app
from .contract import ImageRequest, ImageResult, PartialImage, Readiness
from .dispatcher import Dispatcher
from .metrics import Metrics
from .packages import require
from .settings import ServerSettings
from .worker import Worker
from .worker_thread import WorkerThread


class LocalBackend:
    """Makes images in a thread of this process, see `contract.Backend`.

    Args:
        settings: of the server.
        load: makes the worker, in that thread. By default it loads the model of the settings.
        failed: called in the event loop with the error that ended loading or warming up.
    """

    def __init__(
        self,
        settings: ServerSettings,
        load: Callable[[ServerSettings], Worker] = Worker.load,
        failed: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._settings, self._load, self._failed = settings, load, failed
        self._thread, self._metrics = WorkerThread(), Metrics()
        self._dispatcher = Dispatcher(self._thread, settings, self._metrics)
        self._reason = "it loads the model"
        self._beginning: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Load the model and warm it up, while the event loop goes on."""
        self._beginning = asyncio.ensure_future(self._begin())

    async def close(self) -> None:
        """Answer those who are in, see `ServerSettings.drain_seconds`, and end the thread."""
        if self._beginning is not None:
            self._beginning.cancel()
        await self._dispatcher.drain(self._settings.drain_seconds)
        await self._thread.end()

    def models(self) -> list[str]:
        return [self._settings.model_name]

    async def readiness(self) -> Readiness:
        return Readiness(self._thread.slots() > 0, self._reason)

    async def generate(self, request: ImageRequest) -> ImageResult:
        return await self._dispatcher.generate(request)

    def stream(self, request: ImageRequest) -> AsyncIterator[PartialImage | ImageResult]:
        return self._dispatcher.stream(request)

    async def metrics(self) -> str:
        return self._metrics.text()

    async def _begin(self) -> None:
        try:
            worker = await self._thread.run(self._load, self._settings)
            self._reason = "it warms up"
            self._dispatcher.prepare(await self._thread.run(worker.warm, self._thread.ending))
        except Cancelled:
            return
        except Exception as error:
            self._reason = "its model could not be loaded, as the log says"
            self._failed(error)
            return
        self._reason = ""
        self._thread.worker = worker
        self._dispatcher.wake()


def create_local_app(
    settings: ServerSettings,
    load: Callable[[ServerSettings], Worker] = Worker.load,
    failed: Callable[[Exception], None] = lambda error: None,
) -> Any:
    """A FastAPI application whose images are made in this process, by one thread. See `LocalBackend`.

    Raises:
        InvalidArgument: a package is missing, or the file of keys cannot be read.
    """
    require("prometheus_client")
    backend = LocalBackend(settings, load, failed)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        backend.start()
        yield
        await backend.close()

    return create_app(backend, settings, lifespan)


def run(settings: ServerSettings, told: Callable[[str], None] = print) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        told: is told where the server listens.

    Raises:
        InvalidArgument: the address cannot be used, or a package is missing.
        SrdsFastError: the model cannot be loaded, see `Worker.load`.
    """
    require("uvicorn")
    import uvicorn

    errors: list[Exception] = []

    def failed(error: Exception) -> None:
        errors.append(error)
        server.should_exit = True

    app, listening = create_local_app(settings, failed=failed), _listening(settings)
    drain = math.ceil(settings.drain_seconds)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=drain))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    place = f"http://{host}:{listening.getsockname()[1]}"
    told(f"Serving {settings.model_name} at {place}. It warms up; {place}/readyz tells when it is ready.")
    with listening:
        server.run(sockets=[listening])
    if errors:
        raise errors[0]


def _listening(settings: ServerSettings) -> socket.socket:
    try:
        family, *_, place = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        found = socket.create_server(place[:2], family=family, backlog=2048)
    except OSError as error:
        raise InvalidArgument(
            f"The server cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}. Pass "
            "another host or port."
        ) from error
    found.setblocking(False)
    return found

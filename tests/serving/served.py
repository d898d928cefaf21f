"""A server on a free port of this machine, and backends whose doings a test decides."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pytest
from waiting import ended, until

from srds_fast.serving.contract import ImageRequest, ImageResult, PartialImage, Readiness, Usage
from srds_fast.serving.settings import ServerSettings

PNG = b"\x89PNG not really"


def needs(*packages: str) -> None:
    """Skip the tests of a module where a package is missing. `.ci/run` installs them in a step of its own."""
    if missing := [each for each in packages if find_spec(each) is None]:
        pytest.skip(f"needs {', '.join(missing)}: pip install '.[test,serve]' openai", allow_module_level=True)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Runs an application; gives its address, as http://127.0.0.1:12345. It drains at the end of the block."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=60))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert until(lambda seconds: threading.Event().wait(seconds) or server.started)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            assert ended(thread)


def client(address: str, key: str = "any", **options: Any) -> Any:
    """The client of OpenAI for a server. It asks once, unless it is told to."""
    from openai import OpenAI

    return OpenAI(base_url=f"{address}/v1", api_key=key, **{"max_retries": 0, "timeout": 120.0, **options})


@dataclass
class FakeBackend:
    """Answers at once, unless a test has set something else.

    doing: called with each request, and awaited; what it raises is raised. previews: of each stream. seen: all
    requests. left: how many were given up.
    """

    settings: ServerSettings
    doing: Callable[[ImageRequest], Any] | None = None
    previews: int = 0
    ready: Readiness = field(default_factory=lambda: Readiness(True))
    seen: list[ImageRequest] = field(default_factory=list)
    left: int = 0

    def models(self) -> list[str]:
        return [self.settings.model_name]

    async def readiness(self) -> Readiness:
        return self.ready

    async def generate(self, request: ImageRequest) -> ImageResult:
        self.seen.append(request)
        await self._do(request)
        return self._result(request)

    async def stream(self, request: ImageRequest) -> AsyncIterator[PartialImage | ImageResult]:
        self.seen.append(request)
        for index in range(self.previews):
            yield PartialImage(PNG + bytes([index]), index)
        await self._do(request)
        yield self._result(request)

    async def metrics(self) -> str:
        return "# TYPE made counter\n"

    async def _do(self, request: ImageRequest) -> None:
        if self.doing is None:
            return
        try:
            await self.doing(request)
        except asyncio.CancelledError:
            self.left += 1
            raise

    def _result(self, request: ImageRequest) -> ImageResult:
        assert request.seed is not None
        images = tuple(PNG + str(request.seed + number).encode() for number in range(request.n))
        return ImageResult(images, Usage(1.5, 0.5, waves=7, rows=70, plan="srds"))


@contextmanager
def connected(address: str, body: dict[str, Any]) -> Iterator[None]:
    """In the block there is a connection on which images were asked for; at its end it is closed."""
    content = json.dumps(body).encode()
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + content)
        yield


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])

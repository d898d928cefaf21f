"""The HTTP application: OpenAI's images API, health, metrics and a page, over any `Backend`."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException

from . import openai_answer
from .connection import CLIENT_LEFT, FAILED, ClientLeft, EventStream, body_of, refusal, while_connected
from .contract import Backend, ImageResult, Refused
from .openai_request import DEADLINE, Asked, parsed
from .settings import ServerSettings

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
# seconds after which a client that came too early is to try again
AGAIN = 5.0
FOLDER = Path(__file__).parent / "page"
PAGE = (
    ("", "index.html", "text/html"),
    ("page.js", "page.js", "text/javascript"),
    ("page.css", "page.css", "text/css"),
)
# the page loads nothing from elsewhere, runs no script of its own text, and is shown in no other page
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]


def create_app(backend: Backend, settings: ServerSettings, lifespan: Lifespan | None = None) -> FastAPI:
    """The application.

    Args:
        backend: makes the images.
        lifespan: as FastAPI takes it: what is opened before the first request and closed after the last.

    Raises:
        InvalidArgument: the file of keys cannot be read, or holds none.
    """
    # FastAPI's own pages of documentation would load scripts from another site
    app = FastAPI(title="srds_fast", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _tell_errors(app)
    _add_health(app, backend)
    _add_page(app, backend, settings)
    locked = APIRouter(dependencies=[Depends(_key_check(settings.api_keys()))])
    _add_images(locked, backend, settings)
    _add_models(locked, backend)

    @locked.get("/metrics")
    async def metrics() -> Response:
        return Response(await backend.metrics(), media_type=PROMETHEUS)

    app.include_router(locked)
    return app


def _add_images(router: APIRouter, backend: Backend, settings: ServerSettings) -> None:
    late = Refused(
        408,
        f"The request took longer than {settings.request_seconds:g} seconds, the time limit of this server. Ask for "
        "fewer steps or images.",
        code="time_limit",
    )

    @router.post("/v1/images/generations")
    async def images(request: Request) -> Response:
        until = asyncio.get_running_loop().time() + settings.request_seconds
        try:
            async with asyncio.timeout_at(until):
                body = await body_of(request, settings.max_body_bytes)
                asked = parsed(body, settings, backend.models(), request.headers.get(DEADLINE))
                await _check_ready(backend)
                if asked.stream:
                    return EventStream(_events(backend, asked), until, late)
                made = await while_connected(request.receive, backend.generate(asked.request))
        except TimeoutError:
            return refusal(late)
        except ClientLeft:
            return Response(status_code=CLIENT_LEFT)
        return _json(openai_answer.images(asked, made, int(time.time())))


async def _events(backend: Backend, asked: Asked) -> AsyncGenerator[bytes]:
    """The events of a stream. Leaving it leaves that of the backend."""
    items = backend.stream(asked.request)
    try:
        async for item in items:
            if isinstance(item, ImageResult):
                yield openai_answer.completed(asked, item, int(time.time()))
            else:
                yield openai_answer.partial_image(asked, item, int(time.time()))
    finally:
        if (close := getattr(items, "aclose", None)) is not None:
            await close()


async def _check_ready(backend: Backend) -> None:
    readiness = await backend.readiness()
    if not readiness.ready:
        raise Refused(
            503,
            f"The server is not ready: {readiness.reason or 'it warms up'}. Try again in {AGAIN:.0f} seconds; /readyz "
            "tells when it is.",
            code="not_ready",
            retry_after=AGAIN,
        )


def _add_models(router: APIRouter, backend: Backend) -> None:
    started = int(time.time())

    @router.get("/v1/models")
    async def models() -> Response:
        return _json(openai_answer.models(backend.models(), started))

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in backend.models():
            known = ", ".join(backend.models())
            raise Refused(404, f"There is no such model here. This server has {known}.", code="model_not_found")
        return _json(openai_answer.model(name, started))


def _add_health(app: FastAPI, backend: Backend) -> None:
    @app.get("/healthz")
    async def live() -> Response:
        return _json({"status": "ok"})

    @app.get("/readyz")
    async def ready() -> Response:
        readiness = await backend.readiness()
        if readiness.ready:
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": readiness.reason}, 503)


def _add_page(app: FastAPI, backend: Backend, settings: ServerSettings) -> None:
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    @app.get("/settings.json")
    async def shown() -> Response:
        return _json(
            {
                "models": backend.models(),
                "steps": settings.steps,
                "sizes": [f"{width}x{height}" for width, height in settings.sizes],
                "partial_images": settings.max_partial_images,
                "asks_for_key": settings.api_key_file is not None,
            }
        )

    def answers(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
        async def answer() -> Response:
            return Response(content, headers=headers, media_type=kind)

        return answer

    for place, name, kind in PAGE:
        app.add_api_route(f"/{place}", answers((FOLDER / name).read_bytes(), kind))


def _key_check(keys: tuple[bytes, ...]) -> Callable[[Request], Awaitable[None]]:
    """Refuses requests that do not carry one of the keys; none: all are let in."""

    async def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        found = False
        for key in keys:  # all of them, so that the time tells nothing
            found |= hmac.compare_digest(given.strip().encode("latin-1"), key)
        if keys and not (found and scheme.lower() == "bearer"):
            raise Refused(
                401,
                "The API key is missing or wrong. Send it in a header: Authorization: Bearer KEY.",
                code="invalid_api_key",
            )

    return check


def _tell_errors(app: FastAPI) -> None:
    """Every error is answered in OpenAI's shape, and none with a traceback."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return refusal(error)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        told = {404: "There is no such page.", 405: "This page does not take this method."}
        what = told.get(error.status_code, str(error.detail))
        return refusal(Refused(error.status_code, f"{what} Images are made by POST /v1/images/generations."))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return refusal(FAILED)  # whoever runs the application logs the error


def _json(found: dict[str, Any], status: int = 200) -> Response:
    return Response(openai_answer.as_json(found), status, {"Cache-Control": "no-store"}, media_type="application/json")

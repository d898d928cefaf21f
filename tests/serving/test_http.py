"""The HTTP application over a backend whose doings the test decides, asked by OpenAI's client and by plain requests."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import PNG, FakeBackend, client, connected, needs, served
from waiting import until

needs("fastapi", "uvicorn", "openai")

import httpx2 as httpx
import openai

from srds_fast.serving.app import create_app
from srds_fast.serving.contract import ImageRequest, Readiness, Refused
from srds_fast.serving.settings import ServerSettings

SETTINGS = ServerSettings(steps=(50, 25), sizes=((32, 32), (64, 32)), max_body_bytes=2000)
PATH = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}


class Server:
    """A server over a `FakeBackend`, which tests change and put back."""

    def __init__(self, address: str, backend: FakeBackend) -> None:
        self.address, self.backend, self.openai = address, backend, client(address)

    def post(self, body: Any = None, **more: Any) -> httpx.Response:
        content = json.dumps({"prompt": "a"} if body is None else body)  # in ASCII: also halves of surrogate pairs
        headers = {**JSON, **more.pop("headers", {})}
        return httpx.post(f"{self.address}{PATH}", content=content, headers=headers, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(f"{self.address}{path}", **more)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    backend = FakeBackend(SETTINGS)
    with served(create_app(backend, SETTINGS)) as address:
        yield Server(address, backend)


@pytest.fixture
def server(running: Server) -> Server:
    vars(running.backend).update(vars(FakeBackend(SETTINGS)))
    return running


def decoded(image: Any) -> bytes:
    return base64.b64decode(image.b64_json)


def test_the_client_gets_images_and_what_they_cost(server: Server) -> None:
    found = server.openai.images.generate(
        prompt="a", n=3, size="64x32", quality="low", response_format="b64_json", user="me", extra_body={"seed": 7}
    )
    assert [decoded(image) for image in found.data] == [PNG + b"7", PNG + b"8", PNG + b"9"]
    assert [image.seed for image in found.data] == [7, 8, 9]
    usage = found.usage
    assert (usage.total_tokens, usage.waves, usage.rows, usage.plan) == (0, 7, 70, "srds")
    assert (usage.seconds, usage.queued_seconds) == (1.5, 0.5)
    assert (found.size, found.quality, found.output_format) == ("64x32", "low", "png")
    (request,) = server.backend.seen
    assert (request.n, request.width, request.height, request.steps) == (3, 64, 32, 25)


def test_the_client_reads_a_stream(server: Server) -> None:
    server.backend.previews = 2
    events = list(server.openai.images.generate(prompt="a", stream=True, partial_images=2, extra_body={"seed": 7}))
    types = [type(event).__name__ for event in events]
    assert types == ["ImageGenPartialImageEvent"] * 2 + ["ImageGenCompletedEvent"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert [decoded(event) for event in events] == [PNG + b"\0", PNG + b"\1", PNG + b"7"]
    for event in events:
        promised = [name for name, each in type(event).model_fields.items() if each.is_required()]
        assert promised
        assert all(getattr(event, name) is not None for name in promised)
    assert events[2].usage.waves == 7


def test_models_are_listed(server: Server) -> None:
    assert [model.id for model in server.openai.models.list()] == ["digits"]
    assert server.openai.models.retrieve("digits").object == "model"
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("another/one")


@pytest.mark.parametrize(
    ("arguments", "error", "parameter"),
    [
        ({"size": "1024x1024"}, openai.UnprocessableEntityError, "size"),
        ({"size": "big"}, openai.BadRequestError, "size"),
        ({"extra_body": {"steps": 1000}}, openai.BadRequestError, "steps"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model"),
        ({"n": 100}, openai.BadRequestError, "n"),
    ],
)
def test_mistakes_are_errors_of_the_client(
    server: Server, arguments: dict[str, Any], error: type[openai.APIStatusError], parameter: str
) -> None:
    with pytest.raises(error) as caught:
        server.openai.images.generate(prompt="a", **arguments)
    assert caught.value.param == parameter
    assert caught.value.body is not None
    assert caught.value.body["message"]
    assert not server.backend.seen


def test_a_refusal_of_the_backend_is_the_answer(server: Server) -> None:
    async def full(request: ImageRequest) -> None:
        raise Refused(429, "Full.", code="queue_full", retry_after=2.1)

    server.backend.doing = full
    with pytest.raises(openai.RateLimitError) as caught:
        server.openai.images.generate(prompt="a")
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.code == "queue_full"
    with pytest.raises(openai.RateLimitError):  # of a stream, before its first event
        server.openai.images.generate(prompt="a", stream=True)
    server.backend.previews = 1
    with pytest.raises(openai.APIError, match="Full") as late:
        list(server.openai.images.generate(prompt="a", stream=True, partial_images=1))
    assert late.value.code == "queue_full"


def test_a_failure_shows_no_traceback(server: Server) -> None:
    async def fail(request: ImageRequest) -> None:
        raise RuntimeError("a secret path")

    server.backend.doing = fail
    for streams in (False, True):
        for server.backend.previews in (0, 1):
            found = server.post({"prompt": "a", "stream": streams})
            assert "secret" not in found.text
            assert "Traceback" not in found.text
            if not streams or server.backend.previews == 0:
                assert found.status_code == 500
                assert found.json()["error"]["type"] == "server_error"
                assert found.headers["x-should-retry"] == "false"
            else:
                assert '"code":"server_failed"' in found.text.split("event: error\n")[1]


def test_while_it_warms_up_nothing_is_made(server: Server) -> None:
    server.backend.ready = Readiness(False, "it warms up")
    assert server.get("/healthz").status_code == 200
    assert server.get("/readyz").json() == {"status": "not ready", "reason": "it warms up"}
    with pytest.raises(openai.InternalServerError, match="it warms up") as caught:
        server.openai.images.generate(prompt="a")
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "5")
    server.backend.ready = Readiness(True)
    assert server.get("/readyz").status_code == 200
    assert server.openai.images.generate(prompt="a").data


def test_bodies_and_pages_that_are_not_taken(server: Server) -> None:
    cases = [
        (server.post({"prompt": "a" * 3000}), 413),
        (httpx.post(f"{server.address}{PATH}", content=iter([b"x"] * 3000), headers=JSON), 413),
        (httpx.post(f"{server.address}{PATH}", content=b'{"prompt": "a"}'), 415),
        (httpx.post(f"{server.address}{PATH}", content=b"\xff{", headers=JSON), 400),
        (server.post({"prompt": "\ud800"}), 400),
        (server.post({"\ud800": 1}), 400),
        (server.post({"prompt": "a"}, headers={"X-Deadline-Ms": "soon"}), 400),
        (server.get(PATH), 405),
        (server.get("/v1/nothing"), 404),
        (server.get("/docs"), 404),
        (server.get("/openapi.json"), 404),
        (server.get("/%2e%2e/app.py"), 404),
    ]
    for found, status in cases:
        assert found.status_code == status, found.text
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert not server.backend.seen


def test_the_deadline_is_a_header(server: Server) -> None:
    server.post(headers={"X-Deadline-Ms": "250"})
    assert server.backend.seen[0].deadline == 0.25


def test_metrics_are_those_of_the_backend(server: Server) -> None:
    found = server.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "made" in found.text


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    page = server.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("page.js", "page.css"):
        assert f'"{name}"' in page.text
        assert server.get(f"/{name}").status_code == 200
    for text in (page.text, server.get("/page.js").text, server.get("/page.css").text):
        assert "http:" not in text
        assert "https:" not in text
        assert "innerHTML" not in text
    shown = server.get("/settings.json").json()
    assert (shown["models"], shown["steps"], shown["sizes"]) == (["digits"], [50, 25], ["32x32", "64x32"])


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first\nsecond\n")
    settings = ServerSettings(api_key_file=str(file))
    backend = FakeBackend(settings)
    with served(create_app(backend, settings)) as address:
        for key in ("third", "firs", "firstt", "f\xfcr"):
            found = httpx.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {key}".encode("latin-1")})
            assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
        with pytest.raises(openai.AuthenticationError):
            client(address, "wrong").images.generate(prompt="a")
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(f"{address}{path}").status_code == 401
            assert httpx.get(f"{address}{path}", headers={"Authorization": "Basic first"}).status_code == 401
        for path in ("/healthz", "/readyz", "/"):
            assert httpx.get(f"{address}{path}").status_code == 200
        assert not backend.seen
        for key in ("first", "second"):
            assert client(address, key).images.generate(prompt="a").data


@pytest.mark.parametrize("streams", [False, True])
def test_a_time_limit_ends_the_work(streams: bool) -> None:
    settings = ServerSettings(request_seconds=0.2)
    backend = FakeBackend(settings, doing=forever)
    with served(create_app(backend, settings)) as address:
        with pytest.raises(openai.APIStatusError) as caught:
            client(address).images.generate(prompt="a", stream=streams)
        assert (caught.value.status_code, caught.value.code) == (408, "time_limit")
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert backend.left == 1
        backend.previews = 1
        if streams:
            with pytest.raises(openai.APIError, match="time limit"):
                list(client(address).images.generate(prompt="a", stream=True))
            assert backend.left == 2


async def forever(request: ImageRequest) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("previews", [0, 1])
def test_a_client_that_leaves_ends_the_work(server: Server, streams: bool, previews: int) -> None:
    begun = threading.Event()

    async def wait(request: ImageRequest) -> None:
        begun.set()
        await forever(request)

    server.backend.doing, server.backend.previews = wait, previews
    with connected(server.address, {"prompt": "a", "stream": streams}):
        assert until(begun.wait)
        assert server.backend.left == 0
    assert until(lambda seconds: threading.Event().wait(seconds) or server.backend.left == 1)
    server.backend.doing = None
    assert server.openai.images.generate(prompt="a").data


def test_the_client_leaves_a_stream_by_closing_it(server: Server) -> None:
    server.backend.doing, server.backend.previews = forever, 1
    with server.openai.images.generate(prompt="a", stream=True, partial_images=1) as stream:
        assert next(iter(stream)).partial_image_index == 0
    assert until(lambda seconds: threading.Event().wait(seconds) or server.backend.left == 1)

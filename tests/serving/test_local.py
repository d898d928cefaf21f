"""A server in this process with a real pipeline, asked by OpenAI's client."""

from __future__ import annotations

import base64
import dataclasses
import gc
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
from served import client, connected, needs, served
from waiting import until

needs("fastapi", "uvicorn", "openai", "prometheus_client")

import httpx2 as httpx
import openai

import srds_fast
from srds_fast.serving.contract import ImageRequest, ImageResult
from srds_fast.serving.local import create_local_app
from srds_fast.serving.settings import ServerSettings
from srds_fast.serving.worker import Worker

STEPS = 12
SETTINGS = ServerSettings(steps=(STEPS,), guidance=(3.0,), batch_sizes=(1,), max_queue=2, replicas=0, drain_seconds=60)


class Watched(Worker):
    """It can be held at a network call, until the call is cancelled or the test lets it go.

    network_calls: of the call under way. before: of the one before it. cancel: set once it is cancelled.
    """

    def __init__(self, pipe: Any, settings: ServerSettings) -> None:
        super().__init__(pipe, settings)
        self.holds, self.held, self.go_on = False, threading.Event(), threading.Event()
        self.cancel: Any = threading.Event()
        self.network_calls = self.before = 0
        pipe.unet.register_forward_pre_hook(self._look)

    def generate(self, requests: Any, cancel: Any = None, way: str = "parallel") -> list[ImageResult]:
        self._begin(cancel)
        return super().generate(requests, cancel, way)

    def stream(self, request: ImageRequest, cancel: Any = None) -> Iterator[Any]:
        self._begin(cancel)
        return super().stream(request, cancel)

    def hold(self) -> None:
        self.holds = True
        self.held.clear()
        self.go_on.clear()

    def _begin(self, cancel: Any) -> None:
        self.cancel = cancel or threading.Event()
        self.before, self.network_calls = self.network_calls, 0

    def _look(self, *_: Any) -> None:
        self.network_calls += 1
        if self.holds and self.network_calls == 3:
            self.held.set()
            cancel = self.cancel
            assert until(lambda seconds: self.go_on.wait(seconds) or cancel.is_set())


class Server:
    def __init__(self, address: str, worker: Watched) -> None:
        self.address, self.worker, self.openai = address, worker, client(address)

    def png(self, prompt: str = "a", **more: Any) -> bytes:
        (image,) = self.openai.images.generate(prompt=prompt, extra_body=more).data
        return base64.b64decode(image.b64_json)

    def ready(self) -> bool:
        return httpx.get(f"{self.address}/readyz").status_code == 200


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    srds_fast.compile(tiny.stable_diffusion(), method="srds").plan_for(num_inference_steps=STEPS).save(file)
    return str(file)


@pytest.fixture(scope="module")
def server(plan: str) -> Iterator[Server]:
    made: list[Watched] = []

    def load(settings: ServerSettings) -> Worker:
        made.append(Watched(tiny.stable_diffusion(), settings))
        return made[0]

    with served(create_local_app(dataclasses.replace(SETTINGS, plan=plan), load)) as address:
        assert until(lambda seconds: threading.Event().wait(seconds) or httpx.get(f"{address}/readyz").is_success)
        yield Server(address, made[0])


@pytest.fixture(autouse=True)
def _let_go(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        server.worker.holds = False
        server.worker.go_on.set()


@pytest.fixture(scope="module")
def expected(plan: str) -> Worker:
    """Makes images of the same plan, without a server."""
    return Worker(tiny.stable_diffusion(), dataclasses.replace(SETTINGS, plan=plan))


def test_images_are_those_of_the_pipeline(server: Server, expected: Worker) -> None:
    found = server.openai.images.generate(prompt="a", n=3, extra_body={"seed": 5})
    for number, image in enumerate(found.data):
        (alone,) = expected.generate([ImageRequest("a", STEPS, seed=5 + number, guidance_scale=3.0)])
        assert base64.b64decode(image.b64_json) == alone.images[0], "each is a call of its own here, so bit for bit"
    assert found.usage.waves == 3 * alone.usage.waves
    assert found.usage.seconds >= found.usage.queued_seconds >= 0


def test_a_stream_ends_in_the_image_of_a_plain_request(server: Server) -> None:
    stream = server.openai.images.generate(prompt="a", stream=True, partial_images=2, extra_body={"seed": 5})
    *partial, last = list(stream)
    assert [each.type for each in partial] == ["image_generation.partial_image"] * len(partial)
    assert [each.partial_image_index for each in partial] == list(range(len(partial)))
    assert 1 <= len(partial) <= 2
    assert last.type == "image_generation.completed"
    assert base64.b64decode(last.b64_json) == server.png(seed=5)
    assert last.usage.waves > 0


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_closes_its_connection_ends_the_sampling(server: Server, streams: bool) -> None:
    server.worker.hold()
    with connected(server.address, {"prompt": "a", "stream": streams}):
        assert until(server.worker.held.wait)
        assert not server.worker.cancel.is_set()
    assert until(server.worker.cancel.wait), "the server has noticed"
    server.worker.holds = False
    assert server.png(seed=5), "the next request is answered"
    assert server.worker.before == 3, "no network call followed"


def test_who_comes_when_the_queue_is_full_is_refused(server: Server) -> None:
    server.worker.hold()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(server.png, seed=7)]
        assert until(server.worker.held.wait)
        asked += [pool.submit(server.png, seed=seed) for seed in (8, 9)]
        assert until(lambda seconds: threading.Event().wait(seconds) or _waiting(server) == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            server.png()
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        server.worker.holds = False
        server.worker.go_on.set()
        assert len({each.result() for each in asked}) == 3


def _waiting(server: Server) -> float:
    text = httpx.get(f"{server.address}/metrics").text
    return float(next(line for line in text.splitlines() if line.startswith("srds_fast_queue_length ")).split()[1])


def test_a_deadline_that_cannot_be_met_is_refused_at_once(server: Server) -> None:
    calls = server.worker.network_calls
    with pytest.raises(openai.UnprocessableEntityError, match="predicted to take") as caught:
        server.openai.images.generate(prompt="a", extra_headers={"X-Deadline-Ms": "0.001"})
    assert caught.value.code == "deadline_cannot_be_met"
    assert server.worker.network_calls == calls
    server.openai.images.generate(prompt="a", extra_headers={"X-Deadline-Ms": "600000"})


def test_metrics_tell_what_was_done(server: Server) -> None:
    server.png()
    text = httpx.get(f"{server.address}/metrics").text
    for name in (
        "requests_total",
        "request_seconds_bucket",
        "queue_length",
        "waves_bucket",
        "rows_bucket",
        "calls_total",
    ):
        assert f"srds_fast_{name}" in text


def test_it_is_not_ready_until_it_is_warm_and_answers_all_who_are_in_before_it_ends(plan: str) -> None:
    begin, loaded = threading.Event(), list[Watched]()

    def load(settings: ServerSettings) -> Worker:
        assert until(begin.wait)
        loaded.append(Watched(tiny.stable_diffusion(), settings))
        return loaded[0]

    with ThreadPoolExecutor(1) as pool:
        with served(create_local_app(dataclasses.replace(SETTINGS, plan=plan), load)) as address:
            server = Server(address, None)  # type: ignore[arg-type]
            assert not server.ready()
            with pytest.raises(openai.InternalServerError, match="loads the model") as caught:
                server.png()
            assert caught.value.status_code == 503
            begin.set()
            assert until(lambda seconds: threading.Event().wait(seconds) or server.ready())
            loaded[0].hold()
            asked = pool.submit(server.png, seed=1)
            assert until(loaded[0].held.wait)
            loaded[0].go_on.set()
        assert asked.result().startswith(b"\x89PNG"), "the server was told to end while it drew this"


def test_a_model_that_cannot_be_loaded_is_told() -> None:
    errors: list[Exception] = []

    def load(settings: ServerSettings) -> Worker:
        raise srds_fast.errors.InvalidArgument("There is no such model.")

    with served(create_local_app(SETTINGS, load, errors.append)) as address:
        assert until(lambda seconds: threading.Event().wait(seconds) or bool(errors))
        found = httpx.get(f"{address}/readyz")
        assert (found.status_code, found.json()["reason"]) == (503, "its model could not be loaded, as the log says")


def _crowd(server: Server, expected: Worker, requests: int, clients: int) -> None:
    """So many requests, of which some leave early: the others get their own images."""
    chance, wanted = random.Random(0), {}
    for number in range(8):
        (alone,) = expected.generate([ImageRequest(f"prompt {number}", STEPS, seed=number, guidance_scale=3.0)])
        wanted[number] = alone.images[0]

    def ask(number: int, leaves: float | None) -> str:
        prompt = number % len(wanted)
        patient = client(server.address, max_retries=100, timeout=120.0 if leaves is None else leaves)
        if leaves is not None:
            patient = patient.with_options(max_retries=0)
        try:
            found = patient.images.generate(prompt=f"prompt {prompt}", extra_body={"seed": prompt})
        except (openai.APITimeoutError, openai.RateLimitError):
            assert leaves is not None
            return "left"
        assert base64.b64decode(found.data[0].b64_json) == wanted[prompt]
        return "answered"

    leaving = [chance.uniform(0.001, 0.2) if chance.random() < 0.3 else None for _ in range(requests)]
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(ask, range(requests), leaving))
    assert len(found) == requests
    assert found.count("answered") >= leaving.count(None)


@pytest.mark.parametrize(
    ("requests", "clients"), [(16, 3), pytest.param(200, 8, marks=pytest.mark.exhaustive)], ids=["16", "200"]
)
def test_of_many_requests_with_clients_that_leave_none_gets_a_wrong_image(
    server: Server, expected: Worker, requests: int, clients: int
) -> None:
    _crowd(server, expected, requests, clients)
    assert _waiting(server) == 0


@pytest.mark.exhaustive
def test_memory_stays_flat_over_a_thousand_requests(server: Server) -> None:
    def kept(requests: int) -> int:
        for number in range(requests):
            server.png(f"prompt {number}", seed=number)
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    first = kept(100)
    assert kept(900) - first < 16 * 2**20


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from srds_fast.serving import packages

    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(srds_fast.errors.InvalidArgument, match=r"pip install 'srds-fast\[serve\]'"):
        create_local_app(SETTINGS)

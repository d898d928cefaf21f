"""The server on Ray Serve, started as its users start it, and asked over HTTP.

Run by `pytest -m ray`. Where Ray cannot start, pytest ends with exit code 3 and says so.
"""

from __future__ import annotations

import base64
import functools
import http.client
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from served import connected, needs

from srds_fast import zoo
from srds_fast.engine.run import UNHEARD_WAVES
from srds_fast.errors import InvalidArgument
from srds_fast.serving.settings import ServerSettings

needs("ray", "fastapi", "prometheus_client")

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# seconds for Ray to start, for a replica to be ready or replaced, and for an answer; a machine may be busy
PATIENCE = 600.0
STEPS, PROMPT = 6, "the digit seven"
NO_RAY = 3
GUIDE = Path(__file__).parents[2] / "srds_fast" / "GUIDE.md"
SERVER = Path(__file__).with_name("counted_server.py")
Answer = tuple[int, Any, dict[str, str]]


@dataclass
class Server:
    settings: ServerSettings
    process: subprocess.Popen[str]
    folder: Path  # see `counted_server`

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.settings.port}"

    def get(self, path: str) -> Answer:
        return ask(self.settings.port, "GET", path)

    def images(self, seed: int = 1, **more: Any) -> Answer:
        body = {"prompt": PROMPT, "seed": seed, **more}
        return ask(self.settings.port, "POST", "/v1/images/generations", body)

    def metric(self, start: str) -> float:
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))

    def until_ready(self) -> None:
        self.until(lambda: self.get("/readyz")[0] == 200)

    def until(self, seen: Any) -> None:
        end = time.monotonic() + PATIENCE
        while not seen():
            assert self.process.poll() is None, "the server has ended"
            assert time.monotonic() < end
            time.sleep(0.05)

    def calls_of_one_who_leaves(self, **more: Any) -> list[int]:
        """Network calls, in each process, of a request whose client leaves in the first of them."""
        left = self.metric('srds_fast_requests_total{status="499"}')
        hold, held = self.folder / "hold", self.folder / "held"
        hold.touch()
        with connected(self.address, {"prompt": PROMPT, **more}):
            self.until(held.exists)
        self.until(lambda: self.metric('srds_fast_requests_total{status="499"}') == left + 1)
        hold.unlink()
        held.unlink()
        assert self.images()[0] == 200, "the next one is answered"
        return [len(file.read_text().split("\n")[-2]) for file in self.folder.glob("calls-*")]

    def pids(self, name: str) -> list[int]:
        """Processes of this server, children of its children too, whose title has a name."""
        parents, titles = {}, {}
        for each in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                titles[int(each.name)] = (each / "cmdline").read_bytes().decode(errors="replace")
                parents[int(each.name)] = int((each / "stat").read_text().rpartition(")")[2].split()[1])
        found = []
        for pid, title in titles.items():
            above = pid
            while above in parents and above != self.process.pid:
                above = parents[above]
            if above == self.process.pid and name in title:
                found.append(pid)
        return found


def ask(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    content = None if body is None else json.dumps(body)
    connection.request(method, path, content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    kind = response.headers.get("content-type", "")
    connection.close()
    return response.status, json.loads(text) if "json" in kind else text, dict(response.headers)


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Server]:
    """A server that is told to end at the end of the block, and then drains."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = ServerSettings(port=port, steps=(STEPS,), replicas=1, request_seconds=PATIENCE, **settings)
    command = [sys.executable, "-u", str(SERVER), json.dumps(given.to_dict()), str(folder)]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reading.start()
    try:
        end = time.monotonic() + PATIENCE / 2
        while not any("warms up" in line for line in lines) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        if not any("warms up" in line for line in lines):
            pytest.exit(f"Ray could not start: exit code {process.poll()}, {lines[-5:]}", returncode=NO_RAY)
        yield Server(given, process, folder)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE / 4)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("calls"), batch_sizes=(1, 2), max_images=64, drain_seconds=60.0) as found:
        status, body, headers = found.images()
        while status == 404:  # Ray Serve does not know the application yet
            time.sleep(0.05)
            status, body, headers = found.images()
        assert status == 503, "while it warms up"
        assert body["error"]["code"] == "not_ready"
        assert int(headers["retry-after"]) >= 1
        assert found.get("/healthz")[0] == 200
        found.until_ready()
        yield found


def pixels(answer: Any) -> list[Any]:
    files = [base64.b64decode(each["b64_json"]) for each in answer["data"]]
    return [numpy.asarray(Image.open(io.BytesIO(file)).convert("L"), dtype=float) for file in files]


@functools.cache
def pipe() -> Any:
    found = zoo.load("digits")
    found.set_progress_bar_config(disable=True)
    return found


@functools.cache
def expected(seed: int) -> Any:
    """The image of the pipeline called alone."""
    generator = torch.Generator("cpu").manual_seed(seed)
    given = {"num_inference_steps": STEPS, "guidance_scale": zoo.GUIDANCE, "generator": generator}
    return numpy.asarray(pipe()(PROMPT, **given).images[0].convert("L"), dtype=float)


def test_images_are_those_of_the_pipeline_called_alone(server: Server) -> None:
    status, answer, _ = server.images(seed=5, n=3)
    assert status == 200
    for number, image in enumerate(pixels(answer)):
        assert abs(image - expected(5 + number)).mean() <= 0.5, "half a grey level"


def test_many_at_once_are_all_answered_and_not_mixed_up(server: Server) -> None:
    alone = {seed: pixels(server.images(seed=seed)[1])[0] for seed in (1, 2)}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda number: server.images(seed=1 + number % 2), range(6)))
    assert [status for status, _, _ in answers] == [200] * 6
    for number, (_, answer, _) in enumerate(answers):
        assert abs(pixels(answer)[0] - alone[1 + number % 2]).mean() <= 0.5
    assert server.metric('srds_fast_requests_total{status="200"}') >= 8
    assert all(answer["usage"]["batch"] in (1, 2) for _, answer, _ in answers)


def test_a_stream_ends_with_the_image_that_a_plain_request_gets(server: Server) -> None:
    status, text, _ = server.images(seed=3, stream=True, partial_images=2)
    assert status == 200
    events = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("event")]
    assert events[-1] == "image_generation.completed"
    assert set(events[:-1]) <= {"image_generation.partial_image"}
    last = json.loads([line for line in text.splitlines() if line.startswith("data")][-1].partition(": ")[2])
    assert last["b64_json"] == server.images(seed=3)[1]["data"][0]["b64_json"]


@pytest.mark.parametrize("more", [{"n": 64}, {"stream": True}], ids=["images", "stream"])
def test_a_client_that_leaves_ends_the_sampling_within_one_network_call(server: Server, more: dict[str, Any]) -> None:
    (calls,) = server.calls_of_one_who_leaves(**more)
    assert calls <= 2


def listening(server: Server) -> set[tuple[int, str, int]]:
    """Process, address as Linux writes it, and port of all that the processes of a server listen on."""
    sockets, found = {}, set()
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            _, place, _, state, *_, inode = line.split()[:10]
            if state == "0A":
                address, port = place.split(":")
                sockets[f"socket:[{inode}]"] = address, int(port, 16)
    for pid in server.pids(""):
        with suppress(OSError):
            for each in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if (held := os.readlink(each)) in sockets:
                        found.add((pid, *sockets[held]))
    return found


def test_replicas_have_the_priority_of_the_command(server: Server) -> None:
    (replica,) = server.pids("ServeReplica:srds-fast:Replica")
    of_command, of_replica = (os.getpriority(os.PRIO_PROCESS, pid) for pid in (server.process.pid, replica))
    assert of_replica == of_command


def test_no_port_of_ray_is_open_to_others(server: Server) -> None:
    """Who reaches one may run any code. Ray Serve opens one of each replica on all addresses: it asks for the token."""
    import grpc

    found, replicas = listening(server), server.pids("ServeReplica")
    assert len(found) > 3, "those of Ray and of the server"
    for pid, address, port in found:
        if address not in ("0100007F", "0000000000000000FFFF00000100007F"):  # 127.0.0.1
            assert pid in replicas
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
                with pytest.raises(grpc.RpcError) as caught:
                    call(b"", timeout=PATIENCE, wait_for_ready=True)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_metrics_are_exported_by_ray_too(server: Server) -> None:
    agents = server.pids("ray::DashboardAgent")
    ports = {port for pid, address, port in listening(server) if pid in agents and len(address) == 8}

    def exported() -> bool:
        texts = (ask(port, "GET", "/metrics")[1] for port in ports)
        return any("ray_srds_fast_requests_total" in text for text in texts if isinstance(text, str))

    server.until(exported)


def test_a_replica_that_is_killed_costs_its_requests_a_clear_answer_and_is_replaced(server: Server) -> None:
    (replica,) = server.pids("ServeReplica:srds-fast:Replica")
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(server.images, seed=seed, n=16) for seed in range(3)]
        server.until(lambda: server.metric("srds_fast_running_calls") == 1)
        os.kill(replica, signal.SIGKILL)
        found = [each.result() for each in answers]
    assert any(status == 503 for status, _, _ in found)
    for status, answer, headers in found:
        assert status in (200, 503)
        if status == 503:
            assert answer["error"]["code"] in ("replica_lost", "not_ready")
            assert "retry-after" in headers
    server.until(lambda: server.images()[0] == 200)
    assert server.pids("ServeReplica:srds-fast:Replica") != [replica]


def test_sigterm_answers_who_is_in(server: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.images, n=8)
        server.until(lambda: server.metric("srds_fast_running_calls") == 1)
        server.process.send_signal(signal.SIGTERM)
        assert answer.result()[0] == 200
    assert server.process.wait(PATIENCE / 4) == 0


def test_two_processes_of_a_replica_make_each_image_and_the_loss_of_one_is_told(server: Server, tmp_path: Path) -> None:
    assert server.process.poll() is not None, "one Ray at a time"
    with running(tmp_path, devices_per_replica=2, max_images=64) as found:
        found.until(lambda: found.images()[0] == 200)
        status, answer, _ = found.images(seed=5)
        assert status == 200
        assert abs(pixels(answer)[0] - expected(5)).mean() <= 0.5
        calls = found.calls_of_one_who_leaves(n=64)
        assert len(calls) == 2, "processes"
        # two, or where a plan that is replicated was the fastest: until the processes hear of each other
        assert max(calls) <= 2 + UNHEARD_WAVES
        (rank,) = found.pids("ray::CountedRank")
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(found.images, n=64)
            found.until(lambda: found.metric("srds_fast_running_calls") == 1)
            os.kill(rank, signal.SIGKILL)
            status, answer, headers = waits.result()
        assert status == 503
        assert answer["error"]["code"] == "replica_lost"
        assert "retry-after" in headers
        # Ray Serve gives the replica up, and starts another one. Before it does, what is left of the old one may still
        # answer a call whose plan is replicated.
        found.until(lambda: bool(set(found.pids("ray::CountedRank")) - {rank}))
        answers: list[Any] = []

        def answered() -> bool:
            answers[:] = found.images(seed=6)
            return bool(answers[0] == 200)

        found.until(answered)
        assert abs(pixels(answers[1])[0] - expected(6)).mean() <= 0.5


def test_the_command_of_the_guide_writes_the_file_of_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    from srds_fast.cli import main
    from srds_fast.serving import ray_serve

    line = next(each for each in GUIDE.read_text().splitlines() if "--print-config >" in each)
    main(shlex.split(line.partition(">")[0])[1:])
    document = yaml.safe_load(capsys.readouterr().out)
    assert document["http_options"] == {"host": "127.0.0.1", "port": 8000}
    (application,) = document["applications"]
    assert application["args"]["replicas"] == "auto"
    assert application["import_path"] == f"{ray_serve.build.__module__}:{ray_serve.build.__name__}"
    settings = ServerSettings(steps=(STEPS, 50), sizes=((32, 32),), port=8123, devices_per_replica=2)
    (application,) = yaml.safe_load(ray_serve.config_yaml(settings))["applications"]
    assert ServerSettings.from_dict(application["args"]) == settings
    assert ray_serve.build(application["args"]) is not None
    with pytest.raises(InvalidArgument, match="There is no setting"):
        ray_serve.build({**application["args"], "stpes": [1]})

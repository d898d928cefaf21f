"""What a server adds to a call, and how long it takes until it is ready.

    python -m bench.speed.serving_overhead --requests 40

Overhead: from the client's request to its images, less the call of the pipeline itself.

The digits pipeline on a loopback address, in this process: one client, one connection, one request after another. Of
each request the worker's call is timed, PNG files included; what the client waits for beyond that is the overhead:
HTTP, JSON, the queue, the way to the thread and back. Half of the requests are streams with two previews, which the
worker decodes.

Start: `srds-fast serve` is started in each of three ways, as a user starts it. Told is when it listens, which is after
its imports and the start of Ray, and when /readyz first answers 200, which is after the model was loaded and warmed up.
Needs `pip install 'srds-fast[serve]'` and httpx2.
"""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import quantiles
from typing import Any

from bench.command import parser, write
from srds_fast.cli.output import show_table
from srds_fast.serving.contract import ImageRequest, ImageResult
from srds_fast.serving.local import create_local_app
from srds_fast.serving.settings import ServerSettings
from srds_fast.serving.worker import Worker

PATH = "/v1/images/generations"
PROMPT = "the digit seven"
STARTS = ("--local --batch-sizes 1", "--local", "--replicas 1")


class Timed(Worker):
    """It notes what its last call took."""

    seconds = 0.0

    def generate(self, *args: Any, **kwargs: Any) -> list[ImageResult]:
        begun = time.perf_counter()
        found = super().generate(*args, **kwargs)
        self.seconds = time.perf_counter() - begun
        return found

    def stream(self, request: ImageRequest, cancel: Any = None) -> Iterator[Any]:
        begun = time.perf_counter()
        for item in super().stream(request, cancel):
            if isinstance(item, ImageResult):
                self.seconds = time.perf_counter() - begun
            yield item


@contextmanager
def served(steps: int) -> Iterator[tuple[Any, Timed]]:
    """A client of a warm server, and its worker."""
    import httpx2
    import uvicorn

    made: list[Timed] = []

    def load(settings: ServerSettings) -> Worker:
        made.append(Timed.load(settings))
        return made[0]

    app = create_local_app(ServerSettings(steps=(steps,), batching="never", replicas=0), load)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            with httpx2.Client(base_url=address, timeout=600.0) as http:
                while not server.started or not http.get("/readyz").is_success:
                    time.sleep(0.05)
                yield http, made[0]
        finally:
            server.should_exit = True
            thread.join()


def measured(http: Any, worker: Timed, requests: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each request as the client sees them, and of the worker's call, by kind of request."""
    found: dict[str, list[tuple[float, float]]] = {"images": [], "stream": []}
    for number, kind in itertools.islice(zip(itertools.count(), itertools.cycle(found)), 2 * requests):
        body = {"prompt": PROMPT, "seed": number}
        if kind == "stream":
            body |= {"stream": True, "partial_images": 2}
        begun = time.perf_counter()
        answer = http.post(PATH, json=body)
        seconds = time.perf_counter() - begun
        assert answer.is_success, answer.text
        assert kind == "stream" or json.loads(answer.text)["data"]
        found[kind].append((seconds, worker.seconds))
    return found


def row_of(kind: str, times: list[tuple[float, float]]) -> dict[str, Any]:
    over = [1e3 * (seconds - call) for seconds, call in times]
    cuts = quantiles(over, n=20, method="inclusive")
    calls = quantiles([1e3 * call for _, call in times], n=2, method="inclusive")
    return {
        "request": kind,
        "requests": len(times),
        "call, p50 ms": round(calls[0], 1),
        "overhead, p50 ms": round(cuts[9], 2),
        "p95 ms": round(cuts[18], 2),
    }


def started(options: str, steps: int) -> dict[str, Any]:
    """Seconds from the start of the command until it listens, and until it is ready."""
    import httpx2

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "srds_fast.cli", "serve", "--port", port, "--steps", str(steps), *options.split()]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().startswith("Serving"), "it did not start; run the command to see why"
            listens = time.perf_counter() - begun
            while not httpx2.get(f"http://127.0.0.1:{port}/readyz", timeout=600.0).is_success:
                assert process.poll() is None, "it has ended; run the command to see why"
                time.sleep(0.05)
            ready = time.perf_counter() - begun
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    return {"srds-fast serve": options, "listens, s": round(listens, 1), "ready, s": round(ready, 1)}


def main(argv: list[str] | None = None) -> None:
    options = parser("bench.speed.serving_overhead", __doc__)
    options.add_argument("--requests", type=int, default=40, help="of each kind (40)")
    options.add_argument("--steps", type=int, default=50, help="of the sampler (50)")
    options.add_argument("--start", action="append", help=f"options of a server to start ({', '.join(STARTS)})")
    args = options.parse_args(argv)
    with served(args.steps) as (http, worker):
        measured(http, worker, 2)
        rows = [row_of(*each) for each in measured(http, worker, args.requests).items()]
    show_table(rows, text=["request"])
    starts = [started(each, args.steps) for each in args.start or STARTS]
    show_table(starts, text=["srds-fast serve"])
    write(args.json, rows=rows, starts=starts, steps=args.steps)


if __name__ == "__main__":
    main()

"""A server on Ray whose processes write down their network calls: `python counted_server.py SETTINGS FOLDER`.

Each process that has a pipeline appends to a file of its own: a dot for each network call, and a line end before each
request. While there is a file `hold`, the process that answers writes `held` in the first network call of a request,
and stays in it until the request is cancelled. So what is counted does not depend on how fast the machine is.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from srds_fast.serving import ranks, ray_serve, settings
from srds_fast.serving.replica import Replica
from srds_fast.serving.worker import Worker

FOLDER = Path(sys.argv[2])
PATIENCE = 600.0  # seconds after which a request that was not cancelled goes on, and makes too many calls


class Counting:
    """Counts the network calls of a worker by requests."""

    def __init__(self, worker: Worker) -> None:
        self.file, self.first = FOLDER / f"calls-{os.getpid()}", False
        self.cancel: Any = threading.Event()
        worker._pipe.unet.register_forward_pre_hook(self._count)

    def begin(self, cancel: Any) -> None:
        self.cancel, self.first = cancel, cancel is not None
        self._write("\n")

    def _count(self, *_: Any) -> None:
        self._write(".")
        if self.first and (FOLDER / "hold").exists():
            (FOLDER / "held").touch()
            self.cancel.wait(PATIENCE)
        self.first = False

    def _write(self, text: str) -> None:
        with self.file.open("a") as file:
            file.write(text)


class CountedRank(ranks.Rank):
    def warm_shared(self, sizes: tuple[int, ...]) -> None:
        super().warm_shared(sizes)
        self.counting = Counting(self._worker)

    def generate(self, requests: Any, way: str) -> None:
        self.counting.begin(None)
        super().generate(requests, way)

    def stream(self, request: Any) -> None:
        self.counting.begin(None)
        super().stream(request)


class CountedReplica(Replica):
    def __init__(self, settings: dict[str, Any], resources: dict[str, float]) -> None:
        ranks.Rank = CountedRank  # type: ignore[misc]
        super().__init__(settings, resources)
        worker: Any = self._thread.worker
        counting = Counting(getattr(worker, "_worker", worker))
        generate, stream = worker.generate, worker.stream

        def counted_generate(requests: Any, cancel: Any, way: str) -> Any:
            counting.begin(cancel)
            return generate(requests, cancel, way)

        def counted_stream(request: Any, cancel: Any) -> Any:
            counting.begin(cancel)
            return stream(request, cancel)

        worker.generate, worker.stream = counted_generate, counted_stream


if __name__ == "__main__":
    ray_serve.Replica = CountedReplica  # type: ignore[misc]
    ray_serve.run(settings.ServerSettings.from_dict(json.loads(sys.argv[1])))

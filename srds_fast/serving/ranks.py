"""Several devices of one replica: a process for each, and all of them make every image together."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray
import torch.distributed as dist
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..engine.cancellation import Cancel
from ..errors import Cancelled, RankError, RankLost
from .batching import Warmed
from .contract import ImageRequest, ImageResult, PartialImage, Refused
from .settings import ServerSettings

if TYPE_CHECKING:
    from .worker import Worker

# a method that never returns waits in a thread of its own: the end of its process is then noticed at once
LIFE = "life"


class Rank:
    """The process of one device but the first. Its worker makes the same calls as that of the first rank."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = ServerSettings.from_dict(settings)

    def join(self, host: str, port: int, rank: int, backend: str) -> None:
        """Meet the other ranks, and load the model."""
        _meet(dist.TCPStore(host, port, is_master=False), rank, self._settings, backend)
        self._worker = _loaded(self._settings)

    def warm_single(self) -> None:
        self._worker.warm_single()

    def warm_shared(self, sizes: tuple[int, ...]) -> None:
        self._worker.warm_shared(sizes)

    def generate(self, requests: Sequence[ImageRequest], way: str) -> None:
        with _told_by_the_first_rank():
            self._worker.generate(requests, way=way)

    def stream(self, request: ImageRequest) -> None:
        with _told_by_the_first_rank():
            for _ in self._worker.stream(request):
                pass

    @ray.method(concurrency_group=LIFE)
    def live(self) -> None:
        """Never returns."""
        threading.Event().wait()


class GroupWorker:
    """The worker of the first rank. It has the methods of `Worker`; the other ranks make the same calls.

    Args:
        settings: of the server; they ask for two devices or more.
        resources: of each rank, as Ray names them.

    Raises:
        as `Worker.load`.
    """

    def __init__(self, settings: ServerSettings, resources: dict[str, float]) -> None:
        size = settings.devices_per_replica
        actor = ray.remote(concurrency_groups={LIFE: 1}, **resources)(Rank)
        group = ray.util.get_current_placement_group()
        bundles = (PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(1, size))
        self._ranks = [actor.options(scheduling_strategy=each).remote(settings.to_dict()) for each in bundles]
        self.lives = [each.live.remote() for each in self._ranks]
        host = ray.util.get_node_ip_address()
        backend = "nccl" if resources.get("num_gpus") else "gloo"
        # the store takes any free port, so two replicas never choose the same one
        store = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        joined = [each.join.remote(host, store.port, rank, backend) for rank, each in enumerate(self._ranks, start=1)]
        _meet(store, 0, settings, backend)
        self._worker = _loaded(settings)
        ray.get(joined)

    def warm(self) -> Warmed:
        """See `Worker.warm`. The first rank decides which calls are prepared: each has measured other seconds."""
        warmed = [each.warm_single.remote() for each in self._ranks]
        sizes = self._worker.warm_single()
        ray.get(warmed)
        warmed = [each.warm_shared.remote(sizes) for each in self._ranks]
        self._worker.warm_shared(sizes)
        ray.get(warmed)
        return self._worker.warmed()

    def generate(self, requests: Sequence[ImageRequest], cancel: Cancel | None, way: str) -> list[ImageResult]:
        with _refused_where_ranks_fail():
            for each in self._ranks:
                each.generate.remote(requests, way)
            return self._worker.generate(requests, cancel, way)

    def stream(self, request: ImageRequest, cancel: Cancel | None) -> Iterator[PartialImage | ImageResult]:
        with _refused_where_ranks_fail():
            for each in self._ranks:
                each.stream.remote(request)
            yield from self._worker.stream(request, cancel)


def _meet(store: Any, rank: int, settings: ServerSettings, backend: str) -> None:
    """Make the process group. Who waits for a rank longer than a request may take has lost it."""
    limit = timedelta(seconds=settings.request_seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=settings.devices_per_replica, timeout=limit)


def _loaded(settings: ServerSettings) -> Worker:
    from .worker import Worker  # only now: it imports diffusers, and the processes of other ranks start meanwhile

    return Worker.load(settings, parallel=dist.group.WORLD)


@contextmanager
def _told_by_the_first_rank() -> Iterator[None]:
    """What a request ends in is the same on every rank."""
    with suppress(Refused, Cancelled):
        yield


@contextmanager
def _refused_where_ranks_fail() -> Iterator[None]:
    """A worker tells of a failure of other ranks as of its own. It is one of the server: another replica may do it."""
    try:
        yield
    except Refused as why:
        if isinstance(why.__cause__, RankError):
            raise lost() if isinstance(why.__cause__, RankLost) else failed() from why.__cause__
        raise


def lost() -> Refused:
    return Refused(
        503,
        "A device of this replica was lost while it made the image. Try again: another replica takes its place.",
        code="replica_lost",
        retry_after=1.0,
    )


def failed() -> Refused:
    return Refused(
        503, "A device of this replica failed while it made the image. Try again.", code="rank_failed", retry_after=1.0
    )

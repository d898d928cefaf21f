"""A server on Ray Serve: one command on this machine, the same application on a cluster.

Clients talk to one deployment, `Front`, which keeps the queue and needs no device. It sends calls to replicas, each of
which has the pipeline on devices of its own and makes one call at a time. So there is one order of arrival, and a
replica that is lost costs its clients an answer with status 503, not a broken connection. The queue is ours and not
`serve.batch`, which knows neither deadlines nor costs, and does not end a call whose clients have left.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import ray
import torch
import yaml
from ray import serve
from ray._private import ray_constants

from ..errors import InvalidArgument, SrdsFastError
from .front import REPLICA, Application, Front
from .replica import Replica
from .settings import AUTO, ServerSettings

NAME, LOOPBACK = "srds-fast", "127.0.0.1"
# requests that the front may hold at once; its own queue refuses long before
MOST_REQUESTS = 4096
# seconds between two questions whether a replica is well, and to wait for an answer: its event loop is never busy
HEALTH_PERIOD, HEALTH_TIMEOUT = 1.0, 30.0
# replicas are added while those that are there are busy for a larger share of the time
BUSY = 0.7
# of the pictures that replicas send; Ray would take a third of the memory of the machine
OBJECT_STORE_BYTES = 100 * 2**20


def build(settings: dict[str, Any]) -> serve.Application:
    """The application, as `serve deploy` builds it. settings: as plain JSON types, see `ServerSettings.from_dict`.

    Raises:
        InvalidArgument: a setting is unknown or wrong.
    """
    return _application(ServerSettings.from_dict(settings), cpus=1)


def _application(settings: ServerSettings, cpus: int) -> serve.Application:
    """cpus: of each device of a replica."""
    resources: dict[str, float] = {"num_cpus": cpus, **({"num_gpus": 1} if _on_gpu(settings) else {})}
    given = settings.to_dict()
    replicas = serve.deployment(Replica).options(name=REPLICA, **_options(settings, resources))
    front = serve.deployment(serve.ingress(Application())(Front)).options(
        name="Front",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MOST_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_seconds + 5,
    )
    return front.bind(given, replicas.bind(given, resources))


def config_yaml(settings: ServerSettings) -> str:
    """A file for `serve deploy`: the same application on a cluster."""
    document = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": settings.host, "port": settings.port},
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": f"{__name__}:build",
                "args": settings.to_dict(),
            }
        ],
    }
    return str(yaml.safe_dump(document, sort_keys=False))


def run(settings: ServerSettings, told: Callable[[str], None] = print) -> None:
    """Serve on this machine until Ctrl-C or SIGTERM, which drains.

    Args:
        told: is told where the server listens, and when it is ready.

    Raises:
        InvalidArgument: the address cannot be used.
        SrdsFastError: Ray did not start, or no replica did.
    """
    ready, ended = threading.Event(), threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        if ended.is_set() or not ready.is_set():  # the second time, or nobody is in
            raise KeyboardInterrupt
        ended.set()

    signals = signal.SIGTERM, signal.SIGINT
    before = {each: signal.getsignal(each) for each in signals}
    try:
        start(settings)
        for each in signals:  # not earlier: Ray sets handlers of its own when it starts
            signal.signal(each, end)
        place = f"http://{settings.host}:{settings.port}"
        told(f"Serving {settings.model_name} at {place}. It warms up; {place}/readyz tells when it is ready.")
        deploy(settings)
        told("It is ready.")
        ready.set()
        while not ended.wait(1.0):
            pass
        serve.get_app_handle(NAME).drain.remote().result()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        serve.shutdown()
        ray.shutdown()


def start(settings: ServerSettings) -> None:
    """Start Ray on this machine alone, without its dashboard, and the HTTP server of Ray Serve.

    Who reaches a port of Ray may run any code. So its processes listen on the loopback address, and ask for a token,
    which other users of this machine do not know. So does the one port of each replica that Ray Serve opens on all
    addresses.

    Raises: as `run`.
    """
    _check_free(settings)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # the priority of this process: Ray would give replicas a low one, and any other work would make requests wait
    os.environ.setdefault("RAY_worker_niceness", "0")
    if not any(name.startswith("RAY_AUTH_") for name in os.environ):  # Ray would write its own where all can read it
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # or Ray would take the address in the network, also where 127.0.0.1 is asked for
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(
            num_cpus=os.cpu_count(),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address=LOOPBACK,
            log_to_driver=False,
        )
        address = ray.nodes()[0]["NodeManagerAddress"]
        if address != LOOPBACK:
            raise RuntimeError(f"it listens on {address}, not on {LOOPBACK} alone")
        serve.start(http_options={"host": settings.host, "port": settings.port})
    except Exception as why:
        raise SrdsFastError(
            f"Ray did not start: {why}. Its log is in /tmp/ray/session_latest/logs. Serve without it: --replicas 0."
        ) from why


def deploy(settings: ServerSettings) -> None:
    """Run the application. Returns when a replica is ready. Raises SrdsFastError if none can be started."""
    try:
        serve.run(_application(*_shared_out(settings)), name=NAME, route_prefix="/")
    except RuntimeError as why:
        raise SrdsFastError(f"No replica could be started: {why}") from why


def _options(settings: ServerSettings, resources: dict[str, float]) -> dict[str, Any]:
    """Of the deployment of the replicas."""
    found: dict[str, Any] = {
        "ray_actor_options": resources,
        "max_ongoing_requests": 1,
        "health_check_period_s": HEALTH_PERIOD,
        "health_check_timeout_s": HEALTH_TIMEOUT,
        "graceful_shutdown_timeout_s": settings.drain_seconds + 5,
    }
    if settings.replicas == AUTO:
        found["autoscaling_config"] = {"min_replicas": 1, "max_replicas": 100, "target_ongoing_requests": BUSY}
    else:
        found["num_replicas"] = settings.replicas
    if settings.devices_per_replica > 1:
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        bundle = {names[name]: amount for name, amount in resources.items()}
        found["placement_group_bundles"] = [bundle] * settings.devices_per_replica
        found["placement_group_strategy"] = "PACK"
    return found


def _on_gpu(settings: ServerSettings) -> bool:
    return settings.device.startswith("cuda") or (settings.device == "auto" and torch.cuda.is_available())


def _shared_out(settings: ServerSettings) -> tuple[ServerSettings, int]:
    """This machine, shared out: the settings with the number of replicas, and how many CPUs each device has.

    Ray lets a process compute with as many threads as it has CPUs.
    """
    size = settings.devices_per_replica
    if settings.replicas == AUTO:
        devices = torch.cuda.device_count() if _on_gpu(settings) else size
        settings = replace(settings, replicas=max(1, devices // size))
    assert isinstance(settings.replicas, int)
    return settings, max(1, (os.cpu_count() or 1) // (settings.replicas * size))


def _check_free(settings: ServerSettings) -> None:
    """Raise InvalidArgument if the server cannot listen: Ray Serve would try again and again."""
    try:
        socket.create_server((settings.host, settings.port)).close()
    except OSError as error:
        raise InvalidArgument(
            f"The server cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}. Pass "
            "another host or port."
        ) from error

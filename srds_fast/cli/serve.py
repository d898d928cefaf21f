"""`srds-fast serve`: a model over HTTP, as OpenAI's images API, on Ray Serve or in this process."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import re
import sys
from typing import Any

from ..environment import environment
from ..errors import InvalidArgument
from ..serving.packages import require
from ..serving.settings import ServerSettings
from .checks import check_place, plan_of
from .loading import quieten_libraries

# settings, which are options of the same names
NAMES = (
    *("model", "device", "dtype", "ddim", "steps", "sizes", "guidance", "negative_prompts"),
    *(
        "tolerance",
        "latency",
        "plan",
        "replicas",
        "devices_per_replica",
        "batching",
        "batch_sizes",
        "host",
        "port",
        "api_key_file",
    ),
    *("max_images", "max_prompt_chars", "max_queue", "request_seconds", "drain_seconds"),
)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve until Ctrl-C or SIGTERM, or print the configuration that `serve deploy` takes."""
    check_place(args)
    settings = server_settings(args)
    settings.api_keys()
    require("fastapi", "uvicorn", "prometheus_client", *([] if args.local else ["ray"]))
    document = {"settings": settings.to_dict(), "environment": environment()}
    if args.print_config:
        from ..serving.ray_serve import config_yaml

        print(config_yaml(settings), end="")
        return document
    quieten_libraries()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("srds_fast").setLevel(logging.INFO)
    if not _is_loopback(settings.host) and settings.api_key_file is None:
        print(f"Whoever reaches {settings.host} can use it: no --api-key-file was given.", file=sys.stderr)
    if args.local:
        from ..serving.local import run as run_here

        run_here(settings)
    else:
        from ..serving.ray_serve import run as run_on_ray

        run_on_ray(settings)
    return document


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """The settings of the server that the arguments ask for.

    Raises:
        InvalidArgument: one of them is out of its range, in the words of the command line.
        PlanMismatch: the file of the plan holds none.
    """
    given = {name: value for name in NAMES if (value := getattr(args, name)) is not None}
    for name in ("plan", "api_key_file"):
        if name in given:
            given[name] = str(given[name])
    plan = plan_of(args)
    if plan is not None and "steps" not in given:
        given["steps"] = [plan.num_inference_steps]
    if args.local:
        given["replicas"] = 0
    try:
        return ServerSettings.from_dict(given)
    except InvalidArgument as error:
        told = str(error)
        for name in NAMES:
            told = re.sub(rf"(?<!A )\b{name}\b", f"--{name.replace('_', '-')}", told)
        raise InvalidArgument(told) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

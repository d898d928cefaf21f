"""`srds-fast serve`: a model over HTTP, as OpenAI's images API, on Ray Serve or in this process."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import re
import sys
from dataclasses import fields
from typing import Any

from ..environment import environment
from ..errors import InvalidArgument
from ..serving.packages import require
from ..serving.settings import ServerSettings
from .checks import check_place, plan_of


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
    if not _is_loopback(settings.host) and settings.api_key_file is None:
        print(f"Whoever reaches {settings.host} can use it: no --api-key-file was given.", file=sys.stderr)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    if args.local:
        from ..serving.local import run as run_here
        from .loading import quieten_libraries

        quieten_libraries()
        logging.getLogger("srds_fast").setLevel(logging.INFO)
        run_here(settings)
    else:  # the model is loaded in other processes, and this one does not wait for diffusers
        from ..serving.ray_serve import run as run_on_ray

        run_on_ray(settings)
    return document


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """The settings of the server that the arguments ask for.

    Raises:
        InvalidArgument: one of them is out of its range, in the words of the command line.
        PlanMismatch: the file of the plan holds none.
    """
    names = [each.name for each in fields(ServerSettings) if hasattr(args, each.name)]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
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
        for name in names:
            told = re.sub(rf"(?<!A )\b{name}\b", f"--{name.replace('_', '-')}", told)
        raise InvalidArgument(told) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""`srds-fast demo`: what this machine gains; with --method, how that method converges."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol

from ..environment import environment
from ..errors import InvalidArgument
from ..files import check_file, check_folder
from ..solvers.registry import AUTO
from ..telemetry.report import Report
from .checks import STEPS, check_place, check_steps, prompts_of, request_of, settings_of
from .convergence import check_walk
from .demo_image import image
from .demo_policy import policy_demo
from .demo_walk import walk
from .loading import open_for
from .measure import Request
from .pictures import CONTACT_SHEET, CONVERGENCE


class Part(Protocol):
    """What one part of the demo has measured: a dataclass with times of ours and of whoever uses the model today.

    Its text says in a few lines what was gained, or that nothing was.
    """

    @property
    def ratio(self) -> float:
        """How many times as long the other call takes: the median of pairs. Above 1 ours is faster."""


# each is given the arguments, the pipeline of --model and the call that is asked for
PARTS: dict[str, Callable[[argparse.Namespace, Any, Request], Part]] = {
    "image": image,
    "policy": lambda args, pipe, request: policy_demo(device=pipe.device),
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print what is gained, or how a method converges, and draw it."""
    check_place(args)
    steps, prompts = check_steps(args.steps or STEPS), prompts_of(args)
    method = AUTO if args.method is None else args.method
    settings = settings_of(args, steps)
    check_walk(method)
    request = request_of(args, _batch(args, prompts), steps)
    check_folder(args.out)
    for name in (CONTACT_SHEET, CONVERGENCE):
        if args.out.is_dir():
            check_file(args.out / name)
    pipe = open_for(args, steps)
    args.out.mkdir(parents=True, exist_ok=True)
    if method != AUTO:
        return {**walk(args, pipe, request, settings), "environment": environment()}
    found = {}
    for name, part in PARTS.items():
        measured = part(args, pipe, request)
        print(f"\n{measured}", flush=True)
        found[name] = {**_fields(measured), "text": str(measured)}
    return {"parts": found, "out": str(args.out), "environment": environment()}


def _fields(part: Any) -> dict[str, Any]:
    """What was measured as plain JSON types."""
    found = {each.name: getattr(part, each.name) for each in fields(part)}
    return {name: value.to_dict() if isinstance(value, Report) else value for name, value in found.items()}


def _batch(args: argparse.Namespace, prompts: tuple[str, ...]) -> tuple[str, ...]:
    """The prompts of one call: one for each image."""
    given = bool(args.prompt) or args.prompts is not None
    if given and args.batch is not None and args.batch < len(prompts):
        raise InvalidArgument(
            f"--batch is {args.batch}, and {len(prompts)} prompts were given. Each prompt is one image. Ask for more "
            "images or give fewer prompts."
        )
    count = args.batch or (len(prompts) if given else 1)
    return tuple(prompts[number % len(prompts)] for number in range(count))

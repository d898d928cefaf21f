"""What the arguments ask for, checked before a model is loaded."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import zoo
from ..errors import InvalidArgument, PlanMismatch
from ..pipelines.devices import device_of
from ..planner.choose import choose
from ..planner.plan import Plan
from ..planner.settings import MOST_STEPS, Settings
from ..solvers.registry import AUTO, DEFAULT, METHODS, REGISTERED, SRDS
from .arguments import EXACT, FIXED_BY_A_PLAN, did_you_mean
from .measure import Request

STEPS = 50
PUBLISHED = "paper"
ABOUT: dict[str, str] = {
    AUTO: "the plan that is the fastest here",
    **{method.name: method.about for method in REGISTERED},
    PUBLISHED: "SRDS as published: ddim jumps, sqrt(N) blocks",
    EXACT: "srds, run until it is the sequential result",
}
"""What --method may be, in every command, with a line about each."""
MOST_PROMPT_BYTES = 2**24  # of a file of prompts


# an id on the hub, as its owners write it: two names with a slash between
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_place(args: argparse.Namespace) -> None:
    """Raise InvalidArgument if there is no such device, or no model can have that name."""
    device_of(args.device)
    model, bundled = args.model, zoo.names()
    if model in bundled or _is_folder(model) or HUB_ID.fullmatch(model):
        return
    raise InvalidArgument(
        f"There is no model {model!r}.{did_you_mean(model, bundled)} It is neither bundled ({', '.join(bundled)}) nor "
        "a folder, and no id on the hub, such as owner/name. Give the folder that pipe.save_pretrained wrote."
    )


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except ValueError:  # a null byte
        return False


def check_steps(steps: int) -> int:
    """The number of steps. Raises InvalidArgument if there are too many for any model."""
    if steps > MOST_STEPS:
        raise InvalidArgument(f"{steps} steps are too many. The most is {MOST_STEPS}. Ask for fewer.")
    return steps


def settings_of(args: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Those that are arguments of `compile`, for a call of so many steps."""
    given = {name: getattr(args, name, None) for name in FIXED_BY_A_PLAN if name not in ("method", "exact")}
    found = {name: value for name, value in given.items() if value is not None}
    found |= method_of(AUTO if args.method is None else args.method, steps)
    if getattr(args, "exact", False):
        found[EXACT] = True
    # how many turns a loop takes, which blocks must fit, is known of the bundled pipelines alone
    check_settings(found, steps if args.model in zoo.names() else None)
    return found


def method_of(name: str, steps: int) -> dict[str, Any]:
    """A value of --method as arguments of `compile`. Raises InvalidArgument if there is no such method."""
    if name in METHODS:
        return {"method": name}
    if name == PUBLISHED:
        return {"method": SRDS.published(steps)}
    if name == EXACT:
        return {"method": DEFAULT, "exact": True}
    raise InvalidArgument(f"There is no method {name!r}.{did_you_mean(name, ABOUT)} Known are {', '.join(ABOUT)}.")


def check_settings(settings: dict[str, Any], turns: int | None = None) -> None:
    """Raise InvalidArgument in the words of the command line if `compile` would refuse the settings.

    turns: of the loop that they are for; None if it is not known.
    """
    try:
        asked = Settings(**settings)
        if turns is not None:
            choose(turns, asked)
    except InvalidArgument as error:
        told = str(error).replace("This keyword", "This option")
        told = re.sub(r"method=['\"]?([^ '\"]+)['\"]", r"--method \1", told)
        told = told.replace("exact=True", "--exact")
        for name, flag in FIXED_BY_A_PLAN.items():
            if name not in ("method", "exact"):
                # "same" and "tolerance" are English words too
                setting = rf"\b{name}\b" if "_" in name else rf"\b{name}(?= is |=)"
                told = re.sub(setting, flag, told)
        raise InvalidArgument(told) from error


def prompts_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The prompts that were given, or those of the bundled pipeline."""
    given = tuple(args.prompt or ()) + (_lines(args.prompts) if args.prompts is not None else ())
    if given:
        return given
    if args.model in zoo.names():
        return tuple(zoo.prompts(args.model))
    raise InvalidArgument(f"It is not known what {args.model} can draw. Give a --prompt for every image.")


def _lines(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_PROMPT_BYTES + 1)
        if len(content) > MOST_PROMPT_BYTES:
            raise ValueError(f"it is longer than {MOST_PROMPT_BYTES} bytes")
        found = tuple(line.strip() for line in content.decode().splitlines() if line.strip())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidArgument(f"The prompts in {path} cannot be read: {why}. Give a text file in UTF-8.") from error
    if not found:
        raise InvalidArgument(f"{path} holds no prompt. Write one prompt a line.")
    return found


def plan_of(args: argparse.Namespace) -> Plan | None:
    """The saved plan that was given. Raises InvalidArgument if it cannot be read, PlanMismatch if it is none."""
    if args.plan is None:
        return None
    try:
        return Plan.load(args.plan)
    except PlanMismatch as error:
        raise PlanMismatch(str(error).replace("with Plan.save(path)", "by srds-fast plan --save FILE")) from error
    except OSError as error:
        raise InvalidArgument(
            f"The plan {args.plan} cannot be read: {error.strerror or error}. Write one by srds-fast plan --save FILE."
        ) from error


def request_of(args: argparse.Namespace, prompts: Sequence[str], steps: int) -> Request:
    """The call that is asked for."""
    more = {name: getattr(args, name) for name in ("images_per_prompt", "negative_prompt") if hasattr(args, name)}
    return Request(tuple(prompts), steps, guidance_of(args), args.seed, **more)


def guidance_of(args: argparse.Namespace) -> float | None:
    """The guidance scale; None leaves it to the pipeline."""
    guidance: float | None = args.guidance
    return zoo.GUIDANCE if guidance is None and args.model in zoo.names() else guidance

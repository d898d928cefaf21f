"""How many turns the loop of a call takes, from its arguments alone."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import Tensor

from ..errors import InvalidArgument
from .modular.arguments import is_modular, with_defaults
from .replaced import shallow_copy
from .state import Arguments


def steps_of(fast: Any, arguments: Arguments) -> int:
    """Number of steps in the loop; 0: a `strength` leaves none. InvalidArgument: it is not known."""
    return -(-turns_of(fast, arguments) // _order(fast))


def turns_of(fast: Any, arguments: Arguments) -> int:
    """Number of turns of the loop: schedulers of second order, as Heun, take two a step, but for the last step.

    InvalidArgument: the arguments do not tell.
    """
    if is_modular(fast.original):
        arguments = with_defaults(fast.original, arguments)
    given = {name: arguments[name] for name in ("timesteps", "sigmas") if arguments.get(name) is not None}
    if not given and arguments.get("num_inference_steps") is None:
        raise InvalidArgument(
            f"It is not known how many steps this call of {type(fast).__name__} takes: it has no num_inference_steps. "
            "Give it, or call plan_for with measure=True, which runs the loop up to its first step."
        )
    whole = int(arguments["num_inference_steps"]) if not given else len(next(iter(given.values())))
    strength, start, end = (arguments.get(name) for name in ("strength", "denoising_start", "denoising_end"))
    if (strength is None or strength == 1) and not _is_share(start) and not _is_share(end):
        return _order(fast) * (whole - 1) + 1
    timesteps = _timesteps(fast, given or {"num_inference_steps": whole})
    if timesteps is not None:
        if strength is not None or _is_share(start):
            timesteps = _left_by_the_image(fast, timesteps, whole, strength, start)
        return _before(timesteps, fast.scheduler, end)
    steps = whole if strength is None else min(int(whole * strength), whole)
    return _order(fast) * (steps - 1) + 1 if steps > 0 else 0


def _order(fast: Any) -> int:
    return int(getattr(fast.scheduler, "order", 1))  # a few schedulers of first order do not say so


def _is_share(value: Any) -> bool:
    """Whether a `denoising_start` or `_end` has an effect."""
    return isinstance(value, float) and 0 < value < 1


def _timesteps(fast: Any, given: dict[str, Any]) -> Tensor | None:
    """The whole grid of a call; None if the scheduler asks for more than the arguments tell."""
    trial = copy.deepcopy(fast.scheduler)
    # dynamic shifting needs a number that depends on the image, and decides nothing of how many there are
    shift = {"mu": 1.0} if trial.config.get("use_dynamic_shifting", False) else {}
    try:
        trial.set_timesteps(**given, **shift)
    except Exception:
        return None
    found: Tensor = trial.timesteps
    return found


def _left_by_the_image(fast: Any, timesteps: Tensor, whole: int, strength: Any, start: Any) -> Tensor:
    """The timesteps that the pipeline's own `get_timesteps` leaves of a grid: families round in their own ways."""
    scheduler = copy.deepcopy(fast.scheduler)
    scheduler.timesteps = timesteps
    twin = shallow_copy(fast, type(fast.original), scheduler=scheduler)
    known = {"num_inference_steps": whole, "timesteps": timesteps, "device": timesteps.device}
    known |= {"strength": strength, "denoising_start": start if _is_share(start) else None}
    try:
        asked = inspect.signature(twin.get_timesteps).parameters
        found: Tensor = twin.get_timesteps(**{name: known[name] for name in asked})[0]
    except Exception:  # another signature, or no such method
        steps = whole if strength is None else min(int(whole * strength), whole)
        return timesteps[_order(fast) * (whole - steps) :]
    return found


def _before(timesteps: Tensor, scheduler: Any, end: Any) -> int:
    """How many of the timesteps lie before a share of the noise schedule, as the pipelines of SDXL count them."""
    if not _is_share(end):
        return len(timesteps)
    trained = scheduler.config.num_train_timesteps
    return int((timesteps >= round(trained - end * trained)).sum())

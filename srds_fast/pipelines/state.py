"""What a compiled pipeline keeps from call to call, and the arguments of one call."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine.graphs.cache import Graphs
from ..errors import InvalidArgument
from ..planner.settings import MOST_STEPS
from ..sampling.session import Planner, Session
from ..telemetry.report import Report
from .acceleration import NetworkOptions
from .loop import Arguments
from .tokenizers import Spares


class Last(threading.local):
    """What the last call of each thread left behind."""

    report: Report | None = None
    trajectory: Tensor | None = None
    session: Session | None = None


OURS = ("warm_start", "keep_trajectory")
"""Arguments of a call that are not the pipeline's."""


@dataclass
class State:
    """What a compiled pipeline knows beyond the pipeline itself.

    Attributes:
        original: the pipeline that was compiled.
        planner: chooses the plan of every call.
        strict: raise where a call would not run as asked for.
        lazy_capture: record calls of a new kind when they come.
        graphs: the recordings.
        network_options: how the networks are computed.
        overlap: how coarse rows run.
        last: what the last call of each thread left behind.
        told: reasons that the log has named.
        tokenizers: one set for each call at a time.
        guidance: weights that were found, by kind of call.
        quiet: show no progress bar; refuse calls of the stock loop.
        plan_only: choose the plan of a call, run none of its waves.
    """

    original: Any
    planner: Planner
    strict: bool
    lazy_capture: bool
    graphs: Graphs
    network_options: NetworkOptions
    overlap: str
    last: Last = field(default_factory=Last)
    told: set[str] = field(default_factory=set)
    tokenizers: Spares = field(default_factory=Spares)
    guidance: dict[Hashable, Tensor] = field(default_factory=dict)
    quiet: bool = False
    plan_only: bool = False

    @property
    def engine(self) -> str:
        """The engine asked for."""
        return self.planner.engine


def bind(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments of a call by name, defaults filled in, **kwargs flattened. A TypeError is the pipeline's own.

    Raises:
        InvalidArgument: a number of steps that no loop can have.
    """
    theirs = {name: value for name, value in kwargs.items() if name not in OURS}
    bound = inspect.signature(type(fast.original).__call__).bind(fast, *args, **theirs)
    bound.apply_defaults()
    arguments: Arguments = dict(bound.arguments)
    extra: Arguments = arguments.pop("kwargs", {})
    arguments |= extra
    steps = arguments.get("num_inference_steps")
    if isinstance(steps, int) and not 1 <= steps <= MOST_STEPS:
        raise InvalidArgument(
            f"num_inference_steps is {steps}. A loop has 1 to {MOST_STEPS} steps. Pass such a number."
        )
    return arguments


def steps_of(arguments: Arguments) -> int:
    """Steps the loop will walk, as far as the arguments tell: `denoising_start` and `_end` ask the scheduler."""
    given = arguments.get("timesteps")
    given = arguments.get("sigmas") if given is None else given
    steps = int(arguments["num_inference_steps"] if given is None else len(given))
    if arguments.get("strength") is not None and arguments.get("denoising_start") is None:
        return max(1, min(int(steps * arguments["strength"]), steps))
    return steps


def undecoded(fast: Any) -> dict[str, Any]:
    """Arguments that spare a call its decoding."""
    known = inspect.signature(type(fast.original).__call__).parameters
    return {"output_type": "latent"} if "latents" in known else {}


class RandomState:
    """The generators a call may draw from, to be put back where it has to begin again."""

    def __init__(self, pipe: Any, arguments: Arguments) -> None:
        given = arguments.get("generator")
        generators = given if isinstance(given, list | tuple) else [given]
        self._generators = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]
        self._cpu = torch.get_rng_state()
        self._device = pipe.device if pipe.device.type == "cuda" else None
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device is not None else None

    def restore(self) -> None:
        for generator, state in self._generators:
            generator.set_state(state)
        torch.set_rng_state(self._cpu)
        if self._cuda is not None and self._device is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

"""The state that a compiled pipeline keeps between calls, and the arguments of one call."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine.graphs.cache import Graphs
from ..planner.exploration import Exploration
from ..planner.settings import MOST_STEPS
from ..sampling.planner import Planner
from ..sampling.session import Session
from ..solvers.checks import check_whole
from ..telemetry.report import Report
from .acceleration import NetworkOptions
from .keywords import refuse_unknown
from .lockstep.memory import LoopMemory
from .modular.arguments import bind_modular, is_modular
from .tokenizers import TokenizerPool

Arguments = dict[str, Any]  # of a pipeline's call, by name


class Last(threading.local):
    """Results of the last call of each thread."""

    report: Report | None = None
    trajectory: Tensor | None = None
    session: Session | None = None


OWN_ARGUMENTS = ("warm_start", "keep_trajectory")  # call arguments that srds_fast adds to those of the pipeline


@dataclass
class State:
    """The state that `compile` adds to a pipeline: its settings, and what calls leave for later ones."""

    original: Any
    planner: Planner
    strict: bool
    lazy_capture: bool
    graphs: Graphs
    network_options: NetworkOptions
    overlap: str
    audit: float = 0.0  # the share of calls that are compared with their sequential samples
    calls: Iterator[int] = field(default_factory=itertools.count)  # numbers of calls
    last: Last = field(default_factory=Last)
    notified: set[str] = field(default_factory=set)  # reasons that were already logged
    tokenizers: TokenizerPool = field(default_factory=TokenizerPool)
    loops: LoopMemory = field(default_factory=LoopMemory)  # what is known of loops
    # by `stock.kind_of_call`: whether the next call of a kind is to run on the stock loop
    explorations: dict[Hashable, Exploration] = field(default_factory=dict)
    quiet: bool = False  # show no progress bar; refuse calls that need the stock loop
    plan_only: bool = False  # choose the plan of a call, but run no waves


def with_state(cls: type, state: State) -> Any:
    """A compiled pipeline. It shares the dictionary of the original: an attribute set on one is set on both."""
    fast: Any = object.__new__(cls)
    object.__setattr__(fast, "__dict__", vars(state.original))
    object.__setattr__(fast, "_srds", state)
    return fast


def bind(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments of a call by name, defaults filled in, **kwargs flattened.

    InvalidArgument: num_inference_steps is out of range. UnknownArgument: the pipeline does not know a keyword.
    TypeError: the arguments do not fit the pipeline's signature.
    """
    pipe_kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
    modular = is_modular(fast.original)
    refuse_unknown(fast.original, pipe_kwargs, OWN_ARGUMENTS, modular)
    if modular:
        arguments = bind_modular(fast.original, args, pipe_kwargs)
    else:
        bound = inspect.signature(type(fast.original).__call__).bind(fast, *args, **pipe_kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments |= arguments.pop("kwargs", {})
    if isinstance(steps := arguments.get("num_inference_steps"), int):
        check_whole("num_inference_steps", steps, 1, MOST_STEPS)
    return arguments


def undecoded(fast: Any) -> dict[str, Any]:
    """Arguments with which a call skips decoding."""
    known = inspect.signature(type(fast.original).__call__).parameters
    return {"output_type": "latent"} if "latents" in known else {}


class RandomState:
    """A copy of the state of all generators that a call may draw from, for a call that must start again."""

    def __init__(self, arguments: Arguments, device: torch.device) -> None:
        given = arguments.get("generator")
        generators = [*(given if isinstance(given, list | tuple) else [given]), torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
        self._states = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]

    @property
    def generators(self) -> list[torch.Generator]:
        return [generator for generator, _ in self._states]

    def restore(self) -> None:
        for generator, state in self._states:
            generator.set_state(state)

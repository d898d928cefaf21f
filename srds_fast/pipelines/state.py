"""The state that a compiled pipeline keeps between calls, and the arguments of one call."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..caches import Cache, signature_of
from ..engine.distributed import call as distributed
from ..engine.distributed.ranks import Ranks, ranks_of
from ..engine.graphs.cache import Graphs
from ..planner.curve_cache import CurveCache
from ..planner.exploration import Exploration
from ..planner.plan import Plan
from ..planner.settings import MOST_STEPS, Settings
from ..sampling.planner import Planner
from ..sampling.session import Session
from ..sampling.stream import Worker
from ..schedulers.private_draws import PrivateDraws, Replayed, global_generator
from ..solvers.checks import check_whole
from ..telemetry.report import Report
from .acceleration import NetworkOptions
from .hooks import execution_device, hooked_parts
from .interrupts import Interrupts, interrupts_of
from .keywords import refuse_unknown
from .lockstep.memory import LoopMemory
from .modular.arguments import bind_modular, is_modular
from .networks import networks_of
from .tokenizers import TokenizerPool

MOST_KINDS = 64
Arguments = dict[str, Any]  # of a pipeline's call, by name


class Last(threading.local):
    """Results of the last call of each thread.

    worker: runs the call of a stream that the thread has read last; None: another call was made since it began.
    """

    _report: Report | None = None
    worker: Worker | None = None
    trajectory: Tensor | None = None
    session: Session | None = None
    exploration: Exploration | None = None
    settings: Mapping[str, Any] = MappingProxyType({})  # of the call, that the pipeline's own properties show

    @property
    def report(self) -> Report | None:
        """Waits for the call of a stream that was left, which ends at its next wave."""
        if self.worker is not None and self.worker.left.is_set():
            self.worker.wait()
            self.report = self.worker.report
        return self._report

    @report.setter
    def report(self, report: Report | None) -> None:
        self._report, self.worker = report, None


OWN_ARGUMENTS = ("warm_start", "keep_trajectory")  # call arguments that srds_fast adds to those of the pipeline


@dataclass(frozen=True)
class Options:
    """What `compile` was asked for, checked. See there."""

    settings: Settings
    plan: Plan | None
    cache: CurveCache | None
    learn_stop: bool
    strict: bool
    lazy_capture: bool
    max_graphs: int
    network_options: NetworkOptions
    overlap: str
    audit: float
    parallel: Any  # what `ranks_of` takes


@dataclass
class State:
    """The state that `compile` adds to a pipeline: its options, and what calls leave for later ones."""

    original: Any
    options: Options
    planner: Planner
    graphs: Graphs
    interrupts: Interrupts  # of the original, however often it is compiled
    calls: Iterator[int] = field(default_factory=itertools.count)  # numbers of calls
    last: Last = field(default_factory=Last)
    notified: Cache[bool] = field(default_factory=partial(Cache, "warnings"))  # by reasons that were already logged
    tokenizers: TokenizerPool = field(default_factory=TokenizerPool)
    loops: LoopMemory = field(default_factory=LoopMemory)  # what is known of loops
    # by `stock.kind_of_call`: whether the next call of a kind is to run on the stock loop
    explorations: Cache[Exploration] = field(
        default_factory=lambda: Cache("kinds of calls", MOST_KINDS, stays=lambda each: each.held)
    )
    # by the same: why calls of a kind run on the stock loop, as their rehearsal has shown
    refused: Cache[str] = field(default_factory=lambda: Cache("kinds on the stock loop", MOST_KINDS))
    ranks: Ranks | None = None  # None: this process alone
    quiet: bool = False  # show no progress bar; refuse calls that need the stock loop
    plan_only: bool = False  # choose the plan of a call, but run no waves

    def clear(self) -> None:
        """Forget everything that calls have left for later ones, but for the report of the last one."""
        self.forget_calls()
        for each in (self.graphs, self.planner.calibrated, self.notified, self.tokenizers):
            each.clear()

    def forget_calls(self) -> None:
        """Forget what calls have found out by themselves, so that the next one finds it again."""
        planner = self.planner
        for each in (planner.costs, planner.audits, planner.first_stops, self.loops, self.explorations, self.refused):
            each.clear()


def new_state(original: Any, options: Options) -> State:
    """With nothing measured and nothing recorded."""
    planner = Planner(options.settings, options.plan, cache=options.cache, learn_stop=options.learn_stop)
    ranks = ranks_of(options.parallel)
    return State(original, options, planner, Graphs(options.max_graphs), interrupts_of(original), ranks=ranks)


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
        bound = signature_of(type(fast.original).__call__).bind(fast, *args, **pipe_kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments |= arguments.pop("kwargs", {})
    if isinstance(steps := arguments.get("num_inference_steps"), int):
        check_whole("num_inference_steps", steps, 1, MOST_STEPS)
    return arguments


@dataclass(frozen=True)
class PipelineCall:
    """A call of a compiled pipeline. arguments: by name, see `bind`.

    The modules of the pipeline are looked at once: what a call finds there it finds as it begins.
    """

    fast: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: Arguments

    @classmethod
    def of(cls, fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PipelineCall:
        """Raises what `bind` does."""
        return cls(fast, args, kwargs, bind(fast, args, kwargs))

    @cached_property
    def networks(self) -> dict[str, Any]:
        """The networks that its loop may call, by name."""
        return networks_of(self.fast)

    @cached_property
    def hooked(self) -> dict[str, list[nn.Module]]:
        """By part of the pipeline: its modules that have hooks."""
        return hooked_parts(self.fast)

    @cached_property
    def device(self) -> torch.device:
        """That its networks run on."""
        return execution_device(self.fast, self.hooked)


def undecoded(fast: Any) -> dict[str, Any]:
    """Arguments with which a call skips decoding."""
    known = signature_of(type(fast.original).__call__).parameters
    return {"output_type": "latent"} if "latents" in known else {}


class RandomState:
    """The random numbers of a call that may have to start again: where all generators that it may draw from begin.

    given: those that the caller passed, each with its state. shared: states of torch's global ones, by device.
    own: draws without a generator begin here instead, as the call is one of several ranks; see `SharedCall.random`.
    """

    def __init__(self, arguments: Arguments, device: torch.device) -> None:
        generator = arguments.get("generator")
        generators = generator if isinstance(generator, list | tuple) else [generator]
        self.given = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]
        shared = {each: global_generator(each) for each in (torch.device("cpu"), device)}
        self.shared = {each: found.get_state() for each, found in shared.items() if found is not None}
        call = distributed.current()
        self.own = None if call is None else call.random

    def replayed(self) -> AbstractContextManager[object]:
        """In this context the call draws its numbers again. The global generators are not put back."""
        for generator, state in self.given:
            generator.set_state(state)
        if self.own is not None:
            return PrivateDraws(self.own)
        advanced = any(not torch.equal(_state_of(device), state) for device, state in self.shared.items())
        return Replayed(self.shared) if advanced else nullcontext()


def _state_of(device: torch.device) -> Tensor:
    found = global_generator(device)
    assert found is not None
    return found.get_state()

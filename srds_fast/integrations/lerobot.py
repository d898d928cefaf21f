"""LeRobot's diffusion policy, parallel in time: `srds_fast.compile(policy)`.

A policy is known by its parts, so LeRobot is not imported: `DiffusionModel` has `unet`, `noise_scheduler`,
`num_inference_steps` and the loop `conditional_sample`, and `DiffusionPolicy` holds one as `diffusion`. The bundled
policy has the same parts. Everything else (queues of observations and actions, encoders, normalisation) stays the
policy's own code.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import caches
from ..caches import cached
from ..engine.cancellation import Cancel, OnWave
from ..engine.graphs.cache import Graphs
from ..errors import UnsupportedPipeline, UnsupportedScheduler
from ..planner.exploration import EXPLORING
from ..planner.plan import Plan, refuse_beside
from ..planner.settings import Settings
from ..sampling.sample import DEFAULTS, Inside, sampled
from ..schedulers.private_draws import PrivateDraws
from ..schedulers.verify import adds_noise, check_scheduler
from ..solvers.checks import check_one_of, check_switch
from ..solvers.method import Method
from ..solvers.registry import check_warm_start_method, options_of
from ..telemetry.report import Report, stock_report

logger = logging.getLogger("srds_fast")

PARTS = ("unet", "noise_scheduler", "num_inference_steps", "conditional_sample")
PREVIOUS = "previous"
# most calls in one warm-up: a call may show that another plan is faster
MOST_WARM_UPS = 4


def is_model(found: object) -> bool:
    """Whether it has the parts of LeRobot's DiffusionModel."""
    return isinstance(found, nn.Module) and all(hasattr(found, name) for name in PARTS)


def is_policy(found: object) -> bool:
    """Whether it is such a model, or a policy that holds one."""
    return is_model(found) or (isinstance(found, nn.Module) and is_model(getattr(found, "diffusion", None)))


@dataclass(frozen=True)
class Options:
    """What `compile_policy` was asked for."""

    arguments: Mapping[str, Any]  # of `sample`
    warm_start: str | None
    strict: bool


@dataclass(frozen=True)
class Chunk:
    """What a call has sampled: a chunk of actions, and by how many of them the next one begins later."""

    actions: Tensor
    shift: int

    def guess(self) -> Tensor:
        """The next chunk, if the robot goes on as it was planned to: the last action stands for those behind it."""
        last = self.actions[:, -1:].expand(-1, self.shift, *self.actions.shape[2:])
        return torch.cat([self.actions[:, self.shift :], last], 1)


class _Last(threading.local):
    report: Report | None = None
    chunk: Chunk | None = None
    warming: bool = False


@dataclass(eq=False)
class State:
    """What a compiled policy and its model share: options, and what calls leave for later ones."""

    options: Options
    graphs: Graphs = field(default_factory=Graphs)
    last: _Last = field(default_factory=_Last)


class CompiledPart:
    """What `compile` adds to a policy and to its model."""

    __slots__ = ()
    _srds: State
    _original: Any

    @property
    def report(self) -> Report | None:
        """Report of the last call of this thread that sampled actions; None before the first."""
        return self._srds.last.report

    @property
    def original(self) -> Any:
        """The policy, or the model, that was compiled."""
        return self._original

    def __copy__(self) -> Any:
        return _made(copy.copy(self._original), State(self._srds.options))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _made(copy.deepcopy(self._original, memo), State(self._srds.options))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the policy and the settings: what was measured and recorded belongs to this process."""
        return _remade, (self._original, self._srds.options)


def compile_policy(
    policy: Any,
    *,
    method: str | Method = "auto",
    tolerance: float = 4e-3,
    exact: bool = False,
    num_blocks: int | None = None,
    max_iterations: int | None = None,
    coarse_solver: str = "auto",
    pipelined: bool = True,
    in_flight: int | None = None,
    max_rows: int | None = None,
    engine: str = "auto",
    plan: Plan | None = None,
    explore: float = 3.0,
    cache_dir: str | os.PathLike[str] | None = None,
    latency: str = "adaptive",
    same: str = "sample",
    strict: bool = False,
    parallel: Any = None,
    cancel: Cancel | None = None,
    on_wave: OnWave | None = None,
    warm_start: str | None = None,
) -> Any:
    """A drop-in for LeRobot's DiffusionPolicy or its DiffusionModel, or for the bundled policy.

    It has the class name, the weights and all attributes of the policy, which is not changed. `select_action`,
    `predict_action_chunk`, `generate_actions` and `conditional_sample` run parallel in time; generators and the global
    random state end where LeRobot's own loop leaves them. `report` tells of the last call that sampled, `original` is
    the policy, and `warmup(observation)` chooses the plan beforehand. A copy, deep copy or pickle of it is compiled
    with the same settings; `save_pretrained` saves the policy alone, so compile again what `from_pretrained` loads.

    Args:
        policy: on the device where it runs. Its observation encoders run as they are.
        method, tolerance, exact, num_blocks, max_iterations, coarse_solver, pipelined, in_flight, max_rows, engine,
            plan, explore, cache_dir, latency, same, parallel, cancel, on_wave: as of `srds_fast.sample`. The tolerance
            is in the units of normalised actions.
        strict: raise where a call would run on the policy's own loop, or where a method diverges.
        warm_start: "previous": begin with the last chunk of this thread, shifted by the actions that were carried out.
            It needs a method that refines all points: "collocation", "parataa" or "paradigms". `reset()` forgets the
            chunk. The actions are the same within the tolerance.

    Raises:
        UnsupportedPipeline: it has not the parts of such a policy.
        UnsupportedScheduler: its noise scheduler is not supported.
        InvalidArgument: a setting is out of its range.
    """
    original = policy.original if isinstance(policy, CompiledPart) else policy
    if not is_policy(original):
        raise UnsupportedPipeline(
            f"{type(original).__name__} has not the parts of LeRobot's diffusion policy: {', '.join(PARTS)}, on itself "
            "or on its `diffusion`. Call srds_fast.sample with its network."
        )
    settings = Settings(
        method,
        tolerance,
        exact,
        num_blocks,
        max_iterations,
        coarse_solver,
        pipelined,
        max_rows,
        engine,
        in_flight,
        explore,
        latency,
        same,
    )
    refuse_beside(plan, settings, Settings())
    check_switch("strict", strict)
    if warm_start is not None:
        check_one_of("warm_start", warm_start, (PREVIOUS,))
        check_warm_start_method(options_of(method) if plan is None else plan.options)
    model = original if is_model(original) else original.diffusion
    check_scheduler(model.noise_scheduler)
    own = ("policy", "warm_start", "strict", "original", "settings", "model", "own")
    arguments = {name: value for name, value in locals().items() if name not in own}
    return _made(original, State(Options(arguments, warm_start, strict)))


def _made(original: Any, state: State) -> Any:
    """The compiled policy or model. It shares the dictionary of the original: what is set on one is set on both."""
    base = _ModelParts if is_model(original) else _PolicyParts
    fast: Any = object.__new__(_fast_class(original.__class__, base))
    object.__setattr__(fast, "__dict__", vars(original))
    object.__setattr__(fast, "_srds", state)
    object.__setattr__(fast, "_original", original)
    return fast


def _remade(original: Any, options: Options) -> Any:
    return _made(original, State(options))


@functools.cache
def _fast_class(base: Any, parts: type) -> type:
    """A subclass of the policy's class with the same name."""

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:  # `from_pretrained` comes here
        logger.warning(
            "The class of a compiled %s makes policies that are not compiled: write srds_fast.compile(policy).",
            base.__name__,
        )
        return base(*args, **kwargs)

    shown = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"__slots__": ("_srds", "_original"), "__new__": __new__, **shown}
    return type(base.__name__, (parts, base), own)


class _PolicyParts(CompiledPart):
    """What `compile` adds to a policy that holds a model."""

    __slots__ = ()

    @property
    def diffusion(self) -> Any:
        """The policy's own model, compiled; it follows one that takes its place."""
        return _made(self._original.diffusion, self._srds)

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's own `reset`; the last chunk is forgotten too."""
        self._srds.last.chunk = None
        return super().reset(*args, **kwargs)  # type: ignore[misc]

    def warmup(self, observation: Mapping[str, Tensor]) -> Report:
        """Choose the plan of calls with observations like this one, and keep it for good.

        Args:
            observation: as `select_action` takes it. The policy's queues and all random states stay as they are.

        Returns:
            the report of the last call that was made.
        """
        policy: Any = self
        queues = policy._queues

        def call() -> None:
            self._original.reset()  # an empty queue of actions: the call samples
            policy.select_action(dict(observation))

        try:
            return _warmed(self._srds, call)
        finally:
            policy._queues = queues


class _ModelParts(CompiledPart):
    """What `compile` adds to a model."""

    __slots__ = ()

    def conditional_sample(
        self,
        batch_size: int,
        global_cond: Tensor | None = None,
        generator: Any = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Chunks of actions, [batch_size, horizon, action_dim], as the model's own loop samples them; no gradients."""
        state, model = self._srds, self._original
        state.last.report = None
        x = self._noise(batch_size, generator) if noise is None else noise
        why: Exception | str | None = _why_own_loop(model, x)
        if why is None:
            try:
                return _sampled(state, model, x, global_cond, generator)
            except UnsupportedScheduler as error:
                why = error
        if state.options.strict:
            raise why if isinstance(why, Exception) else UnsupportedPipeline(f"{why}, and strict=True was given.")
        _log_once(str(why))
        begun = time.perf_counter()
        found: Tensor = model.conditional_sample(batch_size, global_cond=global_cond, generator=generator, noise=x)
        seconds = time.perf_counter() - begun
        state.last.report = stock_report(model.num_inference_steps, seconds, path="policy", fallback_reason=str(why))
        return found

    def warmup(self, batch_size: int = 1, global_cond: Tensor | None = None) -> Report:
        """Choose the plan of calls of this batch size, and keep it for good. No random state advances.

        Args:
            global_cond: [batch_size, ...], as `conditional_sample` takes it.

        Returns:
            the report of the last call that was made.
        """

        def call() -> None:
            with torch.no_grad():
                self.conditional_sample(batch_size, global_cond)

        return _warmed(self._srds, call)

    def _noise(self, batch_size: int, generator: Any) -> Tensor:
        """The starting noise, drawn as the model draws it."""
        config, like = self._original.config, next(self._original.parameters())
        actions = config.action_feature.shape[0] if hasattr(config, "action_feature") else config.action_dim
        shape = batch_size, config.horizon, actions
        if isinstance(generator, list | tuple):
            drawn = [torch.randn(1, *shape[1:], dtype=like.dtype, generator=each) for each in generator]
            return torch.cat(drawn).to(like)
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


def _why_own_loop(model: Any, x: Tensor) -> str | None:
    """Why a call must run on the model's own loop; None: it need not."""
    if hasattr(model.unet, "_orig_mod"):  # as what torch.compile returns
        return (
            "the UNet is compiled by torch (config.compile_model), which would compile it again for each number of "
            "rows: load the policy with compile_model=False"
        )
    if torch.is_autocast_enabled(x.device.type) and adds_noise(model.noise_scheduler):
        return "autocast is on, so the steps draw their noise in another dtype: turn it off, or convert the policy"
    return None


def _sampled(state: State, model: Any, x: Tensor, global_cond: Tensor | None, generator: Any) -> Tensor:
    options, last = state.options, state.last
    cond = {} if global_cond is None else {"global_cond": global_cond}
    guess = None
    if options.warm_start is not None and last.chunk is not None and last.chunk.actions.shape == x.shape:
        guess = last.chunk.guess().to(x)
    found = sampled(
        **{
            **DEFAULTS,
            **options.arguments,
            "denoiser": model.unet,
            "x": x,
            "scheduler": model.noise_scheduler,
            "num_inference_steps": model.num_inference_steps,
            "cond": cond,
            "generator": generator,
            "graphs": state.graphs,
            "warm_start": guess,
            "strict": options.strict,
        },
        inside=Inside(freeze=last.warming),
    )
    last.report = found.report
    if options.warm_start is not None:
        last.chunk = Chunk(found.sample, model.config.n_action_steps)
    return found.sample


def _warmed(state: State, call: Callable[[], None]) -> Report:
    """Make calls until their plan is chosen, and keep it."""
    last, chunk = state.last, state.last.chunk
    report: Report | None = None
    last.warming = True
    try:
        with caches.keeping(), PrivateDraws():
            for _ in range(MOST_WARM_UPS):
                call()
                report = last.report
                if report is None or report.plan_state != EXPLORING:
                    break
    finally:
        last.warming, last.chunk = False, chunk
    # collect garbage now: a collection of all objects takes as long as many calls of a small network
    gc.collect()
    assert report is not None
    return report


@cached
def _log_once(reason: str) -> None:
    logger.warning("policy runs on its own loop: %s", reason)

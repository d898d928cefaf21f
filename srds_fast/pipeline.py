"""`compile(pipe)`: a drop-in for a diffusers pipeline."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .drive import NETWORKS, Drive, driven_copy, network_family
from .errors import InvalidArgument, PlanMismatch, UnsupportedPipeline
from .noise import check_scheduler
from .plan import Plan, Settings, choose, refuse_beside
from .report import Report
from .run import Observer
from .stream import Refinement, refinements

logger = logging.getLogger("srds_fast")


@dataclass(frozen=True)
class Family:
    """A pipeline class whose loop is known.

    Attributes:
        denoiser: name of the denoiser component.
        decode: (pipe, latents) -> images, as the end of the pipe's own call does it.
        stock_only: arguments that, when given, send the call to the stock loop, with the reason.
    """

    denoiser: str
    decode: Callable[[Any, Tensor], Any]
    stock_only: dict[str, str] = field(default_factory=dict)


def _decode_latents(pipe: Any, latents: Tensor) -> Any:
    images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    images, flagged = pipe.run_safety_checker(images, latents.device, latents.dtype)
    denormalize = [True] * len(images) if flagged is None else [not each for each in flagged]
    return pipe.image_processor.postprocess(images, output_type="pil", do_denormalize=denormalize)


def _decode_pixels(pipe: Any, pixels: Tensor) -> Any:
    images = (pixels / 2 + 0.5).clamp(0, 1)
    return pipe.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).float().numpy())


_CALLBACK = "a callback looks at every step of the sequential loop"
_IP_ADAPTER = "an IP-Adapter is not driven yet"
FAMILIES = {
    "StableDiffusionPipeline": Family(
        "unet",
        _decode_latents,
        {
            "callback_on_step_end": _CALLBACK,
            "callback": _CALLBACK,
            "ip_adapter_image": _IP_ADAPTER,
            "ip_adapter_image_embeds": _IP_ADAPTER,
        },
    ),
    "DDIMPipeline": Family("unet", _decode_pixels),
}


class FastPipeline:
    """What `compile` adds to a pipeline. Instances also are of the pipeline's own class and share its attributes."""

    __slots__ = ()
    _srds: _State

    @property
    def report(self) -> Report | None:
        """Report of the last call made in this thread, None before the first."""
        return self._srds.last.report

    @property
    def original(self) -> Any:
        """The pipeline that was compiled."""
        return self._srds.original

    def plan_for(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan a call with these arguments would run. Nothing is run.

        Raises:
            PlanMismatch: the plan given to `compile` is for another number of steps.
        """
        arguments = _bind(self, args, kwargs)
        return self._srds.plan_for(int(arguments["num_inference_steps"]))

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Refinement]:
        """Call the pipeline and yield a whole image after every iteration, the last one being the result.

        Takes the arguments of the call; `output_type` and `return_dict` do not matter. Closing the iterator ends the
        call. `report` is set in the thread that iterates.

        Raises:
            InvalidArgument: the call would run on the stock loop, which has no iterations.
        """
        reason = _stock_reason(self, _bind(self, args, kwargs))
        if reason is not None:
            raise InvalidArgument(
                f"This call cannot be streamed: {reason}. The stock loop has no iterations to show. "
                "Leave the argument out, or call without stream."
            )
        return _stream(self, args, kwargs)


class _Last(threading.local):
    """What the last call of each thread left behind."""

    report: Report | None = None


@dataclass
class _State:
    """What a compiled pipeline knows beyond the pipeline itself."""

    original: Any
    family: Family
    settings: Settings
    plan: Plan | None
    strict: bool
    last: _Last = field(default_factory=_Last)
    told: set[str] = field(default_factory=set)

    def plan_for(self, num_steps: int) -> Plan:
        if self.plan is None:
            return choose(num_steps, self.settings)
        if self.plan.num_inference_steps != num_steps:
            raise PlanMismatch(
                f"The plan is for {self.plan.num_inference_steps} steps, this call has {num_steps}. A plan fits one "
                "number of steps. Compile without plan, or with one saved for this number."
            )
        return self.plan


def compile(
    pipe: Any,
    *,
    method: str = "auto",
    tolerance: float = 4e-3,
    exact: bool = False,
    num_blocks: int | None = None,
    max_iterations: int | None = None,
    coarse_solver: str = "auto",
    pipelined: bool = True,
    max_rows: int | None = None,
    engine: str = "auto",
    plan: Plan | None = None,
    strict: bool = False,
) -> Any:
    """A drop-in for a diffusers pipeline that samples parallel in time.

    The result is called as the pipeline is, with the same arguments and the same output; it is an instance of a class
    of the same name that shares the pipeline's attributes, so LoRA, `.to()` and the rest act on both. The pipeline
    itself is not changed and can be called as before. No device work is done here. Compiling a compiled pipeline gives
    it the new settings.

    Args:
        pipe: a StableDiffusionPipeline or DDIMPipeline.
        method: "srds", "sequential" (our path, one row a wave) or "auto" (srds, sequential below six steps).
        tolerance: bound of the mean absolute difference to the sequential sample, per sample, in the units of the
            latents (data in [-1, 1]: one grey level is 1 / 127.5). 0 runs until nothing moves.
        exact: run until the result is the sequential one by construction.
        num_blocks: B, blocks the steps are cut into. Default: blocks of about sqrt(N) / 2 steps.
        max_iterations: iterations at most. Default: B, where the result is exact.
        coarse_solver: "2m" (DPM-Solver++(2M) jump), "ddim" (first order) or "auto" (2m).
        pipelined: start rows of the next iteration as soon as their input exists.
        max_rows: widest wave allowed; memory grows with it.
        engine: "eager" or "auto".
        plan: a plan to run instead of choosing one for each number of steps; it fixes all settings above.
        strict: raise where a call would run on the stock loop.

    Returns:
        The drop-in, with `report`, `plan_for`, `stream` and `original` added.

    Raises:
        UnsupportedPipeline: its loop is not known.
        UnsupportedScheduler: its scheduler is not supported; the message holds the line to write.
        InvalidArgument: a setting is out of its range.
    """
    settings = Settings(
        method, tolerance, exact, num_blocks, max_iterations, coarse_solver, pipelined, max_rows, engine
    )
    refuse_beside(plan, settings, Settings())
    original = pipe.original if isinstance(pipe, FastPipeline) else pipe
    family = _family(original)
    check_scheduler(original.scheduler)
    cls = _fast_class(original.__class__)
    fast: Any = object.__new__(cls)
    # the very same dictionary: what is loaded into one is there in the other
    object.__setattr__(fast, "__dict__", original.__dict__)
    object.__setattr__(fast, "_srds", _State(original, family, settings, plan, strict))
    return fast


def _family(pipe: Any) -> Family:
    """The family by the class that defines the loop: a subclass with a loop of its own is another pipeline."""
    owner = next((cls for cls in type(pipe).__mro__ if "__call__" in cls.__dict__), None)
    name = type(pipe).__name__
    if owner is None or owner.__name__ not in FAMILIES or not owner.__module__.startswith("diffusers."):
        raise UnsupportedPipeline(
            f"{name} cannot be compiled. Its denoising loop is not one of those known here: "
            f"{', '.join(FAMILIES)}. Call the pipeline as it is, or srds_fast.sample with its denoiser."
        )
    family = FAMILIES[owner.__name__]
    denoiser = getattr(pipe, family.denoiser, None)
    if network_family(denoiser) is None:
        raise UnsupportedPipeline(
            f"The {family.denoiser} of this {name} is a {type(denoiser).__name__}. How it takes rows is known for "
            f"{', '.join(NETWORKS)}. Call srds_fast.sample with it instead."
        )
    return family


@functools.cache
def _fast_class(base: Any) -> type:
    """A subclass of the pipeline's class, of the same name, whose own state lies outside the shared attributes."""

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(self, args, kwargs)

    members = {"__slots__": ("_srds",), "__call__": __call__, "__module__": base.__module__, "__doc__": base.__doc__}
    cls = type(base.__name__, (FastPipeline, base), members)
    cls.__qualname__ = base.__qualname__
    return cls


def _bind(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, defaults filled in, **kwargs flattened. A TypeError is the pipeline's own."""
    bound = inspect.signature(type(fast.original).__call__).bind(fast, *args, **kwargs)
    bound.apply_defaults()
    arguments: dict[str, Any] = dict(bound.arguments)
    extra: dict[str, Any] = arguments.pop("kwargs", {})
    return arguments | extra


def _stock_reason(fast: Any, arguments: dict[str, Any]) -> str | None:
    """Why this call must run on the stock loop, or None."""
    family = fast._srds.family
    for name, reason in family.stock_only.items():
        if arguments.get(name) is not None:
            return f"{name} was given: {reason}"
    if getattr(getattr(fast, family.denoiser), "is_cache_enabled", False):
        return "a cache is enabled on the denoiser: it takes the previous call for the previous step"
    return None


def _call(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any], observer: Observer | None = None) -> Any:
    state = fast._srds
    cls = type(state.original)
    _family(state.original)  # a component may have been replaced since compile
    reason = _stock_reason(fast, _bind(fast, args, kwargs))
    if reason is not None:
        return _stock_call(fast, args, kwargs, reason)
    drive = Drive(fast.scheduler, state.plan_for, observer)
    twin = driven_copy(fast, cls, state.family.denoiser, drive)
    try:
        return cls.__call__(twin, *args, **kwargs)
    finally:
        if drive.run is not None:
            state.last.report = drive.run.report


def _stock_call(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
    state = fast._srds
    if state.strict:
        raise UnsupportedPipeline(
            f"This call cannot be accelerated: {reason}. strict=True forbids the stock loop. "
            "Leave the argument out, or compile without strict."
        )
    if reason not in state.told:
        state.told.add(reason)
        logger.warning("%s runs on its stock loop: %s.", type(fast).__name__, reason)
    steps = int(_bind(fast, args, kwargs)["num_inference_steps"])
    started = time.perf_counter()
    output = type(state.original).__call__(state.original, *args, **kwargs)
    seconds = time.perf_counter() - started
    state.last.report = Report("stock", "stock", "stock", steps, seconds=seconds, fallback_reason=reason)
    return output


def _stream(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Refinement]:
    state = fast._srds
    reports: list[Report | None] = []

    def call(observer: Observer) -> None:
        try:
            _call(fast, args, {**kwargs, "output_type": "latent"}, observer)
        finally:
            reports.append(state.last.report)  # of the thread that made the call

    network = getattr(fast, state.family.denoiser)
    try:
        yield from refinements(call, network.dtype, functools.partial(state.family.decode, fast))
    finally:
        state.last.report = reports[-1]

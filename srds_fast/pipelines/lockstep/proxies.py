"""Proxies for parts of a pipe during one call: scheduler, timesteps, states, networks, progress bar.

They pass what the pipeline's loop does to the call's `LockstepLoop`. Everything else goes to the real part.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedPipeline, UnsupportedScheduler
from ...schedulers.table import NoiseTable
from ...schedulers.verify import noise_table
from ..networks import Loop, Network, NetworkCall, network_family, unwrapped
from .inpaint import Inpainting


class SchedulerProxy:
    """Replaces the pipe's scheduler in one call."""

    def __init__(self, inner: Any, lockstep: Any) -> None:
        self.inner = inner
        if hasattr(inner, "order"):
            self.order = inner.order  # loops look it up in every turn
        self._lockstep = lockstep
        self._defaults = {name: p.default for name, p in inspect.signature(inner.step).parameters.items()}
        self._options = list(self._defaults)[3:]
        # pipelines inspect its signature to see which options the scheduler takes
        self.step = functools.update_wrapper(functools.partial(self._step), inner.step)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet while this object is being copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def timesteps(self) -> Tensor:
        """The real timesteps, but a loop over them, or over a slice, turns once per wave."""
        return TimestepsProxy.of(self.inner.timesteps, self._lockstep, 0)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Any:
        return self._lockstep.scale(sample, timestep)

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = dict(zip(self._options, args, strict=False)) | kwargs if args else kwargs
        return_dict = options.pop("return_dict", True)
        output = self._lockstep.step(model_output, sample, options)
        if not return_dict:
            return output
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=output[0])

    def table_and_generator(self, options: dict[str, Any]) -> tuple[NoiseTable, Any]:
        """The noise table for a step with these options, and the generator that the step was given.

        Raises:
            UnsupportedScheduler: an option changes the step in a way that the table does not know.
        """
        options = {
            name: value
            for name, value in options.items()
            if value is not (default := self._defaults.get(name))
            and not (isinstance(value, bool | int | float) and bool(value == default))
        }
        clip_epsilon = bool(options.pop("use_clipped_model_output", False))
        eta, generator = options.pop("eta", None), options.pop("generator", None)
        for name, value in options.items():
            raise UnsupportedScheduler(
                f"{type(self.inner).__name__}.step was given {name}={value!r}. The step then depends on more than "
                "sample, network output and noise. Call the pipeline without it."
            )
        return noise_table(self.inner, clip_epsilon=clip_epsilon, eta=eta), generator


class TimestepsProxy(Tensor):
    """Timesteps whose iterator yields once per wave. Slices are proxies too; other results are plain tensors."""

    lockstep: Any
    start: int

    @classmethod
    def of(cls, timesteps: Tensor, lockstep: Any, start: int) -> TimestepsProxy:
        """The timesteps of steps start, start + 1, ... of the scheduler's grid."""
        proxy: TimestepsProxy = timesteps.as_subclass(cls)
        proxy.lockstep, proxy.start = lockstep, start
        return proxy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __getitem__(self, index: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(plain))
            if stride == 1 and stop > start:
                return TimestepsProxy.of(plain[index], self.lockstep, self.start + start)
        return plain[index]

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return TimestepsProxy.of(self.as_subclass(Tensor).to(*args, **kwargs), self.lockstep, self.start)

    def __iter__(self) -> Iterator[Tensor]:
        timesteps, lockstep = self.as_subclass(Tensor), self.lockstep
        no_step = UnsupportedPipeline(
            "The pipeline's loop turned without a scheduler step. Such a loop cannot be driven from its scheduler. "
            "Run this call on the original pipeline."
        )
        steps, first = lockstep.steps, timesteps[0]
        lockstep.enter(self.start, timesteps)
        yield first
        if lockstep.steps == steps:
            # no denoising loop: SDXL reads the timesteps to find denoising_end; or every turn is skipped
            for timestep in timesteps[1:]:
                yield timestep
                if lockstep.steps != steps:
                    raise no_step
            return
        while not lockstep.finished:
            steps = lockstep.steps
            yield first
            if lockstep.steps == steps and not lockstep.finished:
                raise no_step


class RowStates(Tensor):
    """States of a wave. Conditioning that a loop concatenates to them along the channels is repeated for the rows."""

    lockstep: Any

    @classmethod
    def of(cls, states: Tensor, lockstep: Any) -> RowStates:
        rows: RowStates = states.as_subclass(cls)
        rows.lockstep = lockstep
        return rows

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.cat, torch.concat):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        parts = kwargs.get("tensors", args[0] if args else ())
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        states = next(part for part in parts if isinstance(part, RowStates))
        with torch._C.DisableTorchFunctionSubclass():
            if dim == 0:  # one copy per guidance branch
                return RowStates.of(torch.cat(parts, dim=0), states.lockstep)
            plain = [part if isinstance(part, RowStates) else states.lockstep.for_rows(part, states) for part in parts]
            return torch.cat(plain, dim=dim)


class NetworkProxy(nn.Module):
    """Replaces one of the pipe's networks in one call. Calls go to the lockstep loop, all else to the network."""

    def __init__(self, network: nn.Module, family: Network, lockstep: Any) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self._lockstep, self._family = lockstep, family
        self._names = list(inspect.signature(unwrapped(network).forward).parameters)
        if hasattr(network, "cache_context"):
            self.cache_context = network.cache_context  # loops look it up in every turn

    def __getattr__(self, name: str) -> Any:
        network = self.__dict__["_modules"]["network"]
        return network if name == "network" else getattr(network, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # not nn.Module.__call__: the network runs its own hooks, and global hooks must run once
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        states = arguments[self._family.state]
        if isinstance(states, RowStates):
            arguments[self._family.state] = states.as_subclass(Tensor)
        return self._lockstep.call(NetworkCall(self.network, self._family, arguments, len(args)))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The network's own class: pipelines use isinstance to tell one ControlNet from several."""
        return type(self.__dict__["_modules"]["network"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)


def progress_proxy(
    progress_bar: Callable[..., Any], lockstep: Any, iterable: Any = None, total: int | None = None
) -> Any:
    """The pipe's own progress bar, but it counts final steps instead of turns of the loop."""

    @contextmanager
    def step_bar() -> Iterator[Any]:
        shown = 0

        def update(_count: int = 1) -> None:
            nonlocal shown
            if lockstep.final_steps > shown:
                bar.update(lockstep.final_steps - shown)
                shown = lockstep.final_steps

        with progress_bar(total=total if iterable is None else len(iterable)) as bar:
            lockstep.progress = update
            yield SimpleNamespace(update=update)
            update()

    def turns() -> Iterator[Any]:
        with step_bar() as bar:
            for timestep in iterable:
                yield timestep
                bar.update()

    return step_bar() if iterable is None else turns()


def copy_scheduler(scheduler: Any) -> Any:
    """A deep copy. dict.copy() is atomic, which matters if another thread sets timesteps on the original."""
    twin = object.__new__(type(scheduler))
    twin.__dict__.update(copy.deepcopy(vars(scheduler).copy()))
    return twin


def copy_with_proxies(pipe: Any, cls: Any, loop: Loop, lockstep: Any, parts: dict[str, Any]) -> Any:
    """The shallow copy of a pipe, of its own class, that one call runs on: with these parts, and with proxies."""
    twin = object.__new__(cls)
    networks = {}
    for name in loop.networks:
        family = network_family(getattr(pipe, name))
        assert family is not None, "compile() checks the family of every network"
        networks[name] = NetworkProxy(getattr(pipe, name), family, lockstep)
    twin.__dict__.update(
        {
            **pipe.__dict__,
            **parts,
            **networks,
            "scheduler": lockstep.scheduler,
            "progress_bar": functools.partial(progress_proxy, functools.partial(cls.progress_bar, twin), lockstep),
            # offloading hooks belong to the networks, not to their proxies
            "maybe_free_model_hooks": functools.partial(cls.maybe_free_model_hooks, pipe),
        }
    )
    if loop.blends:
        lockstep.inpainting = Inpainting(twin)
    return twin

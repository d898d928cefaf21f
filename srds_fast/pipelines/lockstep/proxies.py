"""What stands in for parts of a pipe during one driven call: scheduler, timesteps, states, networks, progress bar.

What the pipeline's loop does to them becomes calls of the `LockstepLoop`; the rest is the real part's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ... import telemetry
from ...errors import UnsupportedPipeline
from ..networks import Network, unwrapped


class LoopState(Protocol):
    """What the proxies report to, and ask: the `LockstepLoop` of the call.

    Attributes:
        steps: scheduler steps so far.
        finished: the samples are there; the loop ends.
        progress: shows the steps that are final by now on the pipe's progress bar.
    """

    steps: int
    finished: bool
    progress: Callable[[], None]

    @property
    def final_steps(self) -> int: ...

    def enter(self, start: int, timesteps: Tensor) -> None: ...

    def scale(self, x: Tensor, timestep: Any) -> Tensor: ...

    def step(self, m: Tensor, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]: ...

    def for_rows(self, conditioning: Tensor, states: Tensor) -> Tensor: ...

    def call(
        self, network: nn.Module, family: Network, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...


class DrivenScheduler:
    """Stands in for the pipe's scheduler in one call."""

    def __init__(self, inner: Any, drive: LoopState) -> None:
        self.inner = inner
        if hasattr(inner, "order"):
            self.order = inner.order  # loops look it up in every turn
        self._drive = drive
        self._defaults = {name: p.default for name, p in inspect.signature(inner.step).parameters.items()}
        self._options = list(self._defaults)[3:]
        # pipelines look at its signature to see which options the scheduler takes
        self.step = functools.update_wrapper(functools.partial(self._step), inner.step)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet while this object is being copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def timesteps(self) -> Tensor:
        """The real timesteps; a loop over them, or over a slice, turns once per wave."""
        return DrivenTimesteps.of(self.inner.timesteps, self._drive, 0)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return self._drive.scale(sample, timestep)

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = dict(zip(self._options, args, strict=False)) | kwargs if args else kwargs
        return_dict = options.pop("return_dict", True)
        output = self._drive.step(model_output, sample, options)
        if self._drive.finished:
            telemetry.phase("decode")
        if not return_dict:
            return output
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=output[0])

    def unusual(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of `step` that do not have their default value."""
        return {name: value for name, value in options.items() if not _same(value, self._defaults.get(name))}


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, bool | int | float) and value == default)


class DrivenTimesteps(Tensor):
    """Timesteps that a pipeline's loop goes through once per wave. Slices are driven too, other results are plain."""

    drive: LoopState
    start: int

    @classmethod
    def of(cls, timesteps: Tensor, drive: LoopState, start: int) -> DrivenTimesteps:
        """The timesteps of steps start, start + 1, ... of the scheduler's grid."""
        driven: DrivenTimesteps = timesteps.as_subclass(cls)
        driven.drive, driven.start = drive, start
        return driven

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __getitem__(self, index: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(plain))
            if stride == 1 and stop > start:
                return DrivenTimesteps.of(plain[index], self.drive, self.start + start)
        return plain[index]

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return DrivenTimesteps.of(self.as_subclass(Tensor).to(*args, **kwargs), self.drive, self.start)

    def __iter__(self) -> Iterator[Tensor]:
        return self._turns(self.as_subclass(Tensor), self.drive, self.start)

    @staticmethod
    def _turns(timesteps: Tensor, drive: LoopState, start: int) -> Iterator[Tensor]:
        steps = drive.steps
        drive.enter(start, timesteps)
        first = timesteps[0]
        yield first
        if drive.steps == steps:
            # someone reads the timesteps, as SDXL does to find where denoising_end lies; or every turn is skipped
            for timestep in timesteps[1:]:
                yield timestep
                if drive.steps != steps:
                    raise _no_step()
            return
        while not drive.finished:
            steps = drive.steps
            yield first
            if drive.steps == steps and not drive.finished:
                raise _no_step()


def _no_step() -> UnsupportedPipeline:
    return UnsupportedPipeline(
        "The pipeline's loop went round without a scheduler step. Such a loop cannot be driven from its scheduler. "
        "Run this call on the original pipeline."
    )


class RowStates(Tensor):
    """States of a wave. Conditioning that a loop joins to them channel by channel is repeated for the rows."""

    drive: LoopState

    @classmethod
    def of(cls, states: Tensor, drive: LoopState) -> RowStates:
        rows: RowStates = states.as_subclass(cls)
        rows.drive = drive
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
                return RowStates.of(torch.cat(parts, dim=0), states.drive)
            plain = [part if isinstance(part, RowStates) else states.drive.for_rows(part, states) for part in parts]
            return torch.cat(plain, dim=dim)


class DrivenNetwork(nn.Module):
    """Stands in for one of the pipe's networks in one call. Calls go through the drive; all else is the network's."""

    def __init__(self, network: nn.Module, family: Network, drive: LoopState) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        names = list(inspect.signature(unwrapped(network).forward).parameters)
        self._driven = functools.partial(drive.call, network, family, names)
        if hasattr(network, "cache_context"):
            self.cache_context = network.cache_context  # loops look it up in every turn

    def __getattr__(self, name: str) -> Any:
        network = self.__dict__["_modules"]["network"]
        return network if name == "network" else getattr(network, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # not a module's call: hooks are the network's own, and global ones are to see it once
        return self._driven(args, kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The network's own class: pipelines tell one ControlNet from several by isinstance."""
        return type(self.__dict__["_modules"]["network"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._driven(args, kwargs)


def driven_progress(
    progress_bar: Callable[..., Any], drive: LoopState, iterable: Any = None, total: int | None = None
) -> Any:
    """The pipe's own progress bar, counting the steps that are final instead of the turns of the loop."""
    if iterable is not None:
        return _bar_over(progress_bar, drive, iterable)
    return _bar_to_update(progress_bar, drive, total)


def _bar_over(progress_bar: Callable[..., Any], drive: LoopState, timesteps: Any) -> Iterator[Any]:
    with _bar_to_update(progress_bar, drive, len(timesteps)) as bar:
        for timestep in timesteps:
            yield timestep
            bar.update()


@contextmanager
def _bar_to_update(progress_bar: Callable[..., Any], drive: LoopState, total: int | None) -> Iterator[Any]:
    with progress_bar(total=total) as bar:
        counted = _StepBar(bar, drive)
        drive.progress = counted.update
        yield counted
        counted.update()


class _StepBar:
    """A progress bar whose `update()` shows the steps of the exact prefix, and all of them at the end."""

    def __init__(self, bar: Any, drive: LoopState) -> None:
        self._bar = bar
        self._drive = drive
        self._shown = 0

    def update(self, _count: int = 1) -> None:
        final = self._drive.final_steps
        if final > self._shown:
            self._bar.update(final - self._shown)
            self._shown = final

"""Lockstep: a pipeline's own loop, driven from its scheduler.

A call runs on a shallow copy of the pipe in which two components are stand-ins. The loop then turns once per wave
instead of once per step: the scheduler's `step` takes the guided outputs of all rows, hands them to the solver core and
returns the next rows as "latents"; the denoiser gives each row its own timestep and repeats the conditioning. Prompt
encoding, guidance and decoding are the pipe's own code, and nothing the user holds is changed.

Rows lie in the batch as (guidance branch, row, sample).
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .denoiser import RowInputs, state_dtype, tile
from .errors import UnsupportedPipeline, UnsupportedScheduler
from .noise import noise_table
from .plan import Plan
from .run import Observer, Run
from .solvers.core import Evaluate


@dataclass(frozen=True)
class Network:
    """How a family of denoisers is called.

    Attributes:
        state: name of the argument that holds the states.
        per_sample: arguments whose tensors have one entry per branch and sample; repeated for the rows.
        shared: arguments that hold for the whole call; passed on as they are.
    """

    state: str
    per_sample: frozenset[str]
    shared: frozenset[str]


NETWORKS = {
    "UNet2DConditionModel": Network(
        state="sample",
        per_sample=frozenset(
            {
                "encoder_hidden_states",
                "class_labels",
                "timestep_cond",
                "attention_mask",
                "encoder_attention_mask",
                "added_cond_kwargs",
            }
        ),
        shared=frozenset({"cross_attention_kwargs", "return_dict"}),
    ),
    "UNet2DModel": Network(state="sample", per_sample=frozenset({"class_labels"}), shared=frozenset({"return_dict"})),
}


def network_family(module: object) -> Network | None:
    """The family a denoiser belongs to, by class name; torch.compile's wrapper is looked through."""
    module = getattr(module, "_orig_mod", module)
    names = (cls.__name__ for cls in type(module).__mro__)
    return next((NETWORKS[name] for name in names if name in NETWORKS), None)


class Drive:
    """State of one driven call: the run, and the wave the loop is in.

    Args:
        scheduler: the pipe's scheduler; a copy of it is driven.
        plan_for: gives the plan for a number of steps.
        observer: sees every checkpoint.
    """

    def __init__(self, scheduler: Any, plan_for: Callable[[int], Plan], observer: Observer | None = None) -> None:
        self.scheduler = DrivenScheduler(copy.deepcopy(scheduler), self)
        self.run: Run | None = None
        self.steps = 0
        self._plan_for = plan_for
        self._observer = observer
        self._inputs: RowInputs | None = None
        self._wave: Evaluate | None = None
        self._num_samples = 0
        self._started: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has its samples."""
        return self.run is not None and self.run.sample is not None

    def step(self, m: Tensor, x: Tensor, clip_epsilon: bool) -> Tensor:
        """Take the guided output of a wave, return the states of the next, or the samples: [rows * samples, ...]."""
        self.steps += 1
        if self.run is None:
            noise = noise_table(self.scheduler.inner, clip_epsilon=clip_epsilon)
            state = x.to(state_dtype(x.dtype))
            self._num_samples = len(x)
            self._inputs = RowInputs(noise, state.dtype, x.device)
            plan = self._plan_for(noise.num_steps)
            self.run = Run(plan, state, noise, "drive", observer=self._observer, started=self._started)
            self._wave = self.run.next(None)
        assert self._wave is not None
        m = m.unflatten(0, (len(self._wave.positions), len(self._wave.samples)))
        self._wave = self.run.next(m)
        if self._wave is None:
            assert self.run.sample is not None
            return self.run.sample.to(x.dtype)
        return self._wave.x.flatten(0, 1).to(x.dtype)

    def scale(self, x: Tensor) -> Tensor:
        """The states of the wave times their input scale, for all guidance branches."""
        assert self._wave is not None
        assert self._inputs is not None
        rows = [position for position in self._wave.positions for _ in self._wave.samples]
        return self._inputs.scaled(x, rows * (len(x) // len(rows)))

    def call(
        self, network: nn.Module, family: Network, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the denoiser with per-row timesteps and repeated conditioning. names: of its parameters, in order."""
        if self._wave is None:  # the first wave is the starting noise alone: a plain call
            self._started = time.perf_counter()
            return network(*args, **kwargs)
        assert self._inputs is not None
        inputs, wave, rows = self._inputs, self._wave, len(self._wave.positions)
        states = dict(zip(names, args, strict=False)) | kwargs
        branches = len(states[family.state]) // (rows * len(wave.samples))

        def repeat(value: Any) -> Any:
            if isinstance(value, Tensor):
                if len(value) != branches * self._num_samples:
                    raise UnsupportedPipeline(
                        f"{type(network).__name__} was given conditioning of shape {tuple(value.shape)} for "
                        f"{branches} x {self._num_samples} branches and samples. It is not known which entry belongs "
                        "to which sample. Run this call on the original pipeline."
                    )
                return tile(value, wave.samples, rows, self._num_samples, branches)
            if isinstance(value, dict):
                return {key: repeat(entry) for key, entry in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(repeat(entry) for entry in value)
            return value

        def for_rows(name: str, value: Any) -> Any:
            if name == "timestep":
                return inputs.timesteps(wave).repeat(branches)
            if name in family.per_sample:
                return repeat(value)
            if name == family.state or name in family.shared or value is None:
                return value
            raise UnsupportedPipeline(
                f"The pipeline passes {name!r} to {type(network).__name__}. It is not known how that argument belongs "
                "to samples. Run this call on the original pipeline."
            )

        # positional arguments stay positional: hooks on the network may look at either
        return network(
            *(for_rows(name, value) for name, value in zip(names, args, strict=False)),
            **{name: for_rows(name, value) for name, value in kwargs.items()},
        )


class DrivenScheduler:
    """Stands in for the pipe's scheduler in one call. What it does not define is the scheduler's own."""

    def __init__(self, inner: Any, drive: Drive) -> None:
        self.inner = inner
        self._drive = drive
        self._defaults = {name: p.default for name, p in inspect.signature(inner.step).parameters.items()}
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
        """The real timesteps; going through them turns the loop once per wave."""
        timesteps: _WaveByWave = self.inner.timesteps.as_subclass(_WaveByWave)
        timesteps.drive = self._drive
        return timesteps

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        if self._drive.run is None:
            return self.inner.scale_model_input(sample, timestep)  # type: ignore[no-any-return]
        return self._drive.scale(sample)

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(list(self._defaults)[3:], args, strict=False)) | kwargs
        return_dict = given.pop("return_dict", True)
        clip_epsilon = bool(given.pop("use_clipped_model_output", False))
        given.pop("generator", None)  # a deterministic step draws nothing from it
        for name, value in given.items():
            if value is not None and value != self._defaults.get(name):
                raise UnsupportedScheduler(
                    f"{type(self.inner).__name__}.step was given {name}={value!r}. The step then draws noise or "
                    f"depends on more than the sample. Call the pipeline with {name}={self._defaults.get(name)!r}."
                )
        x = self._drive.step(model_output, sample, clip_epsilon)
        if not return_dict:
            return (x,)
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=x)


class _WaveByWave(Tensor):
    """Timesteps that a pipeline's loop goes through once per wave. Slices and copies are plain timesteps."""

    drive: Drive

    def __iter__(self) -> Iterator[Tensor]:
        plain = self.as_subclass(Tensor)
        if not hasattr(self, "drive"):
            return iter(plain)
        return self._turns(plain[0], self.drive)

    @staticmethod
    def _turns(first: Tensor, drive: Drive) -> Iterator[Tensor]:
        steps = 0
        while not drive.finished:
            yield first
            if drive.steps == steps:
                raise UnsupportedPipeline(
                    "The pipeline's loop went round without a scheduler step. Such a loop cannot be driven from its "
                    "scheduler. Run this call on the original pipeline."
                )
            steps = drive.steps


class DrivenDenoiser(nn.Module):
    """Stands in for the pipe's denoiser in one call. Calls go through the drive; all else is the network's own."""

    def __init__(self, network: nn.Module, family: Network, drive: Drive) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self._drive = drive
        self._family = family
        self._names = list(inspect.signature(getattr(network, "_orig_mod", network).forward).parameters)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._drive.call(self.network, self._family, self._names, args, kwargs)


def driven_copy(pipe: Any, cls: Any, denoiser: str, drive: Drive) -> Any:
    """A shallow copy of the pipe, of class `cls`, with stand-ins for its scheduler and its denoiser.

    Args:
        pipe: the user's pipeline; not changed.
        cls: the pipeline's own class.
        denoiser: name of the denoiser component.
        drive: of this call.
    """
    twin = object.__new__(cls)
    network = getattr(pipe, denoiser)
    family = network_family(network)
    assert family is not None, "compile() checks the denoiser's family"
    twin.__dict__.update(
        {
            **pipe.__dict__,
            "scheduler": drive.scheduler,
            denoiser: DrivenDenoiser(network, family, drive),
            "progress_bar": functools.partial(_progress, functools.partial(cls.progress_bar, twin), drive),
        }
    )
    return twin


def _progress(progress_bar: Callable[..., Any], drive: Drive, iterable: Any = None, total: int | None = None) -> Any:
    """The pipe's own progress bar, counting the steps that are final instead of the turns of the loop."""
    if iterable is not None:
        return _bar_over(progress_bar, drive, iterable)
    return _bar_to_update(progress_bar, drive, total)


def _bar_over(progress_bar: Callable[..., Any], drive: Drive, timesteps: Any) -> Iterator[Any]:
    with _bar_to_update(progress_bar, drive, len(timesteps)) as bar:
        for timestep in timesteps:
            yield timestep
            bar.update()


@contextmanager
def _bar_to_update(progress_bar: Callable[..., Any], drive: Drive, total: int | None) -> Iterator[Any]:
    with progress_bar(total=total) as bar:
        yield _StepBar(bar, drive)


class _StepBar:
    """A progress bar whose `update()` shows the steps of the exact prefix, and all of them at the end."""

    def __init__(self, bar: Any, drive: Drive) -> None:
        self._bar = bar
        self._drive = drive

    def update(self, _count: int = 1) -> None:
        run = self._drive.run
        if run is not None:
            self._bar.update(run.final_steps - self._bar.n)

"""Proxies for parts of a pipe during one call: scheduler, timesteps, networks, progress bar.

They pass what the pipeline's loop does to the call's `LockstepLoop`. Everything else goes to the real part.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...caches import signature_of
from ...engine.merging.rule import Call
from ...errors import InvalidArgument, SrdsFastError
from ...kernels.common.clamping import Threshold
from ...schedulers.own_loop import OTHER_TIMESTEPS, RETURNED, StepCall, is_known
from ...schedulers.table import NoiseTable
from ...schedulers.verify import noise_table
from ..replaced import shallow_copy
from .snapshots import snapshots
from .turns import refused


class UsesWithheld(SrdsFastError):
    """A loop has used a value that is known in the stock loop alone.

    This is no UnsupportedPipeline, which is a TypeError: a tensor's operators turn a TypeError into another error.
    """


class Withheld(Tensor):
    """Stands for a value, such as x0, that a step returns in the stock loop alone. Its use is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UsesWithheld(str(refused("it uses what its scheduler's step returns beside the sample")))


class SchedulerProxy:
    """Replaces the pipe's scheduler in one call.

    inner: the scheduler that answers everything but `step`; in a turn, one that is about to make the turn's step.
    companions: proxies for the copies that the pipeline has made of it, for other states, by number from 1.
    """

    def __init__(self, inner: Any, lockstep: Any) -> None:
        vars(self).update(inner=inner, companions=[], number=0, _lockstep=lockstep, _snapshots=None)
        parameters = signature_of(inner.step).parameters
        vars(self)["_defaults"] = {name: each.default for name, each in parameters.items()}
        # pipelines inspect its signature to see which options the scheduler takes
        vars(self)["step"] = functools.update_wrapper(functools.partial(self._step), inner.step)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet while this object is being copied
            raise AttributeError(name)
        if name == "scale_model_input" and not hasattr(self.inner, name):
            return lambda sample, *_: sample  # a loop that asks for `type(scheduler)` does not know this class
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __len__(self) -> int:
        return len(self.inner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A scheduler for another state that the loop steps beside this one."""
        twin = SchedulerProxy(copy.deepcopy(self.inner, memo), self._lockstep)
        self.companions.append(twin)
        vars(twin)["number"] = self._lockstep.joint.count
        self._lockstep.joint.count += 1
        return twin

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The scheduler's own class: pipelines use isinstance to tell schedulers apart."""
        return type(self.inner)

    @property
    def timesteps(self) -> Tensor:
        """The real timesteps, but a loop over them, or over a slice, makes the turns that are asked for."""
        return TimestepsProxy.of(self.inner.timesteps, self._lockstep, 0)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        options = dict(zip(self._defaults, args, strict=False)) | kwargs
        return_dict = options.pop("return_dict", True)
        try:
            m, x = options.pop("model_output"), options.pop("sample")
            options["timestep"]
        except KeyError as missing:
            raise refused(f"it calls its scheduler's step without {missing}") from None
        output = self._lockstep.joint.step(
            self.number, m, x, lambda outputs, states: self._lockstep.step(outputs, states, options)
        )
        if not return_dict:
            return output
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=output[0])

    def keep_snapshots(self, start: int, steps: int, call: StepCall, x: Tensor, m: Tensor) -> None:
        """See `snapshots`; from now on the scheduler can be looked at before any step."""
        vars(self)["_snapshots"] = snapshots(self.inner, start, steps, call, x, m)
        for each in self.companions:
            each.keep_snapshots(start, steps, call, x, m)

    def look_before(self, step: int) -> None:
        """Answer as a scheduler that is about to make this step."""
        if self._snapshots is not None:
            vars(self)["inner"] = self._snapshots.before(step)
        for each in self.companions:
            each.look_before(step)

    def state_after(self, step: int) -> dict[str, Any]:
        """What the scheduler holds when it has made this step. Only where there are snapshots."""
        found: dict[str, Any] = self._snapshots.states[step + 1]
        return found

    def beside(self, sample: Tensor, *, last: bool) -> tuple[Tensor, ...]:
        """What a step returns beside the sample. Known is only an x0 that is the sample, as after the last step."""
        if self._snapshots is None:
            return ()
        known = last and self._snapshots.ends_alike
        value = sample if known else torch.empty(0, device="cpu").as_subclass(Withheld)
        return tuple(value for _ in range(1, self._snapshots.returns))

    @property
    def keeps_sample(self) -> bool:
        """It keeps the very tensor that its step is given, for a later step."""
        return self._snapshots is not None and self._snapshots.keeps_sample

    @property
    def dtype(self) -> torch.dtype:
        """In which the last step returns the sample."""
        found: torch.dtype = self._snapshots.dtype
        return found

    def table(self, options: dict[str, Any]) -> NoiseTable:
        """The noise table for steps with these options.

        Raises:
            UnsupportedScheduler: there is no table for this scheduler.
            InvalidArgument: eta is None.
            UnsupportedPipeline: an option changes the step in a way that a table does not know.
        """
        options = {
            name: value
            for name, value in options.items()
            if value is not (default := self._defaults.get(name))
            and not (isinstance(value, bool | int | float) and bool(value == default))
        }
        if options.get("eta", 0.0) is None:
            raise InvalidArgument(
                f"eta is None. The step of {type(self.inner).__name__} multiplies with it. Leave it out, or pass a "
                "number from 0 to 1."
            )
        clip_epsilon = bool(options.pop("use_clipped_model_output", False))
        eta, timestep, _ = options.pop("eta", None), options.pop("timestep"), options.pop("generator", None)
        for name in options:
            if not is_known(name):
                raise refused(
                    f"it passes {name} to the step of its {type(self.inner).__name__}, and the effect of that argument "
                    "is not known: if an argument of the call causes this, leave that out"
                )
        # rounded timesteps may give other steps
        rounded = isinstance(timestep, Tensor) and timestep.dtype != self.inner.timesteps.dtype
        dtype = timestep.dtype if rounded else None

        def table_of(scheduler: Any) -> NoiseTable:
            return noise_table(scheduler, clip_epsilon=clip_epsilon, eta=eta, asked=frozenset(options), dtype=dtype)

        found = table_of(self.inner)
        if any(table_of(each.inner) is not found for each in self.companions):
            raise refused("it steps several states on different grids")
        if self.companions and found.draws is not None:
            raise refused("its scheduler draws noise for several states")
        if self.companions and isinstance(found.clip, Threshold):
            raise refused("its scheduler thresholds several states, each by its own elements")
        return found

    def check_given(self, options: dict[str, Any], timesteps: Tensor, step: int) -> None:
        """Refuse a loop that gives the step of a turn other arguments than a table is made for.

        options: the arguments. timesteps: of all turns.
        """
        given = {name: options[name] for name in OTHER_TIMESTEPS if name in options}
        if not hasattr(self.inner, "set_begin_index"):  # others count their steps
            given["timestep"] = options["timestep"]
        for name, value in given.items():
            turn = step + OTHER_TIMESTEPS.get(name, 0)
            known = timesteps[turn : turn + 1] if turn >= 0 else timesteps[:0]
            if isinstance(value, Tensor):
                known, value = known.to(value.dtype), value.flatten()[:1].tolist()
            if known.tolist() != (value if isinstance(value, list) else [] if value is None else [value]):
                raise refused(f"at step {step} the {name} that it gives its scheduler is not one of its loop")
        for name, value in options.items():
            if name.startswith(RETURNED) and not (value is None or isinstance(value, Withheld)):
                raise refused(f"the {name} that it gives its scheduler is not what the step before has returned")


class TimestepsProxy(Tensor):
    """Timesteps whose iterator yields those of the turns that are asked for. Slices are proxies too.

    Other results are plain tensors.
    """

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
        return (timestep for _, timestep in self.pairs())

    def pairs(self, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """As `enumerate`: the number of each turn's step, counted from `first`, and its timestep."""
        timesteps, turns = self.as_subclass(Tensor), self.lockstep.turns
        self.lockstep.enter(self.start, timesteps)
        done = turns.done
        turns.begin(0)
        yield first, timesteps[0]
        if turns.done == done:
            # no denoising loop: SDXL reads the timesteps to find denoising_end; or every turn is skipped
            turns.leave()
            for index, timestep in enumerate(timesteps[1:], start=1):
                yield first + index, timestep
                if turns.done != done:
                    raise refused("its loop turned without a scheduler step")
            return
        while (step := turns.next_step) is not None:
            done = turns.done
            turns.begin(step)
            yield first + step, timesteps[step]
            if turns.done == done:
                raise refused("its loop turned without a scheduler step")


class NetworkProxy(nn.Module):
    """Replaces one of the pipe's networks in one call. Calls go to the lockstep loop, all else to the network."""

    def __init__(self, network: nn.Module, lockstep: Any) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self._lockstep = lockstep
        if hasattr(network, "cache_context"):
            self.cache_context = network.cache_context  # loops look it up in every turn

    def __getattr__(self, name: str) -> Any:
        network = self.__dict__["_modules"]["network"]
        return network if name == "network" else getattr(network, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # not nn.Module.__call__: the network runs its own hooks, and global hooks must run once
        return self._lockstep.call(Call(self.__dict__["_modules"]["network"], args, kwargs))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The network's own class: pipelines use isinstance to tell one ControlNet from several."""
        return type(self.__dict__["_modules"]["network"])

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """With the network's own signature: loops look which arguments it takes."""
        network: Any = self.__dict__["_modules"]["network"]
        return functools.update_wrapper(functools.partial(NetworkProxy.__call__, self), network.forward)


class ProgressProxy:
    """The pipe's own progress bar, but it counts final steps instead of turns of the loop."""

    def __init__(self, progress_bar: Callable[..., Any], lockstep: Any) -> None:
        self._progress_bar, self._lockstep = progress_bar, lockstep

    def __call__(self, iterable: Any = None, total: int | None = None, **options: Any) -> Any:
        if iterable is None:
            return self._bar(total, options)
        return _Shown(iterable, self._bar(len(iterable) if hasattr(iterable, "__len__") else total, options))

    @contextmanager
    def _bar(self, total: int | None, options: dict[str, Any]) -> Iterator[Any]:
        shown = 0

        def update(_count: int = 1) -> None:
            nonlocal shown
            while shown < self._lockstep.samples.final_steps:  # one by one, as a bar of the user's may count
                bar.update()
                shown += 1

        with self._progress_bar(total=total, **options) as bar:
            self._lockstep.samples.progress = update
            yield SimpleNamespace(update=update)
            update()


class _Shown:
    """An iterable whose progress is shown."""

    def __init__(self, iterable: Iterable[Any], bar: Any) -> None:
        self._iterable, self._bar = iterable, bar
        if hasattr(iterable, "pairs"):
            self.pairs = lambda first=0: self._with_bar(iterable.pairs(first))

    def __iter__(self) -> Iterator[Any]:
        return self._with_bar(self._iterable)

    def _with_bar(self, entries: Iterable[Any]) -> Iterator[Any]:
        with self._bar as bar:
            for entry in entries:
                yield entry
                bar.update()


def copy_with_proxies(pipe: Any, cls: Any, lockstep: Any, parts: dict[str, Any]) -> Any:
    """The shallow copy of a pipe, of its own class, that one call runs on: with these parts, and with proxies."""
    networks = {name: NetworkProxy(part, lockstep) for name, part in vars(pipe).items() if isinstance(part, nn.Module)}
    twin = shallow_copy(pipe, cls, **{**parts, **networks}, scheduler=lockstep.scheduler)
    if hasattr(cls, "progress_bar"):  # the blocks of a modular pipeline have it instead
        vars(twin)["progress_bar"] = ProgressProxy(twin.progress_bar, lockstep)
    if hasattr(cls, "maybe_free_model_hooks"):
        # offloading hooks belong to the networks, not to their proxies
        vars(twin)["maybe_free_model_hooks"] = pipe.maybe_free_model_hooks
    return twin

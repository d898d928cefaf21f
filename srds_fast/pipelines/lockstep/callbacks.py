"""`callback_on_step_end` of a call whose steps become final wave by wave.

The user's function is called once for every final step, in order, with the state after that step. Only the timing
differs: several steps may become final in one wave. If the function changes anything, also what the networks hold, all
results beyond that step are dropped, and the rest of the call runs step by step, as the stock loop would.

The loop calls it at the end of its turns. Where the waves repeat recorded network calls, there are no turns between
them: `tell` then calls it with what the loop gave it in an earlier turn. If the function returns a change, raises an
error or interrupts the call, the loop makes one more turn, and gets that at its end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ... import clock
from ...engine.merging.rule import same
from ...errors import UnsupportedPipeline
from .call_session import LeaveWaves
from .loop import LockstepLoop
from .proxies import NetworkProxy
from .snapshots import PlainScheduler

# makes what the loop gets from its callback at the end of a turn
Reply = Callable[[], Any]


class StepCallback:
    """Replaces the user's `callback_on_step_end` in one call.

    shared: the attributes of the user's own pipeline, of which the call has a copy. interrupted: whether the call is
    to end early.
    """

    def __init__(
        self, user: Callable[..., Any], lockstep: LockstepLoop, shared: dict[str, Any], interrupted: Callable[[], bool]
    ) -> None:
        self._user, self._lockstep, self._shared, self._asked = user, lockstep, shared, interrupted
        self._pipe: Any = None
        self._tensors: dict[str, Any] | None = None  # of the last turn
        self._before: _Before | None = None  # what they and the pipe hold since that turn
        self._scheduler: PlainScheduler | None = None  # that the function is shown
        self._varies: dict[str, None] = {}  # names of those that were other objects in another turn
        self._reply: Reply | None = None  # for the loop, at the end of its next turn

    def __call__(self, pipe: Any, turn: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        """At the end of each turn, of any step; returns the tensors that the loop must continue with."""
        if (before := self._tensors) is not None:
            again = (name for name, value in tensors.items() if not _is(value, before.get(name)))
            self._varies |= dict.fromkeys(name for name in again if name != "latents")
        self._pipe, self._tensors, self._before = pipe, tensors, None
        reply, self._reply = self._reply or self._tell(pipe, tensors), None
        return {} if reply is None else reply()

    def why_turns(self) -> str | None:
        """Why only turns of the loop can show what the function is given, as a clause; after turns of two steps."""
        if self._tensors is None:
            return "its turns do not call callback_on_step_end"
        if not self._varies:
            return None
        return f"callback_on_step_end is given {', '.join(sorted(self._varies))}, which each step makes anew"

    def tell(self) -> None:
        """Between waves: call the function for the steps that have become final. Raises LeaveWaves."""
        assert self._tensors is not None
        try:
            self._reply = self._tell(self._pipe, self._tensors)
        # raised by the loop, as in a stock call: here it might be taken for a fault of the waves
        except Exception as why:
            self._reply = partial(_raised, why)
        if self._reply is not None:
            raise LeaveWaves

    def _tell(self, pipe: Any, tensors: dict[str, Any]) -> Reply | None:
        samples, latents = self._lockstep.samples, tensors.get("latents")
        while samples.told < samples.final_steps:
            step, samples.told = samples.told, samples.told + 1
            before = self._before = self._before or _Before(pipe, tensors)
            shared = self._shared.copy()
            state = samples.state_after(step)
            x = state.to(latents.dtype if isinstance(latents, Tensor) else pipe.dtype, copy=True)
            shown = {name: x if name == "latents" else value for name, value in tensors.items()}
            with self._standing_at(pipe, step), clock.stopped():
                outputs = self._user(pipe, step, samples.timesteps[step], dict(shown))
            if not isinstance(outputs, dict):
                return partial(_returned, outputs)  # the loop raises the stock pipe's own error
            if self._asked():
                newest = samples.run.newest
                return partial(self._interrupt, state if newest is None else newest, x.dtype)
            # the loop uses every tensor that is returned, even one that the callback was not given
            returned = {name: value for name, value in outputs.items() if value is not shown.get(name, ...)}
            kept = {name: state.to(x.dtype) if name == "latents" else before.tensors[name] for name in shown}
            given = [*shown.items(), *returned.items()]
            changed = sorted({name for name, value in given if name not in kept or not _same(value, kept[name])})
            after = self._shared.copy()
            if not (before.is_same() and _identical([*after, *after.values()], [*shared, *shared.values()])):
                self._take_over(pipe, shared, after)
                changed += before.changed()
            # where each step is evaluated after the one before was told, the loop goes on with what it finds
            held = None if samples.in_order else samples.held
            if held is not None and (part := held.changed_exactly()) is not None:
                samples.end_replays()
                changed.append(part)
            if changed:
                return partial(self._go_on_from, step, x, outputs, changed)
        return None

    def _interrupt(self, sample: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        return {"latents": self._lockstep.interrupt(sample, dtype)}

    def _go_on_from(self, step: int, x: Tensor, outputs: dict[str, Any], changed: list[str]) -> dict[str, Any]:
        reason = f"the callback changed {', '.join(changed)} at step {step}"
        return {**outputs, "latents": self._lockstep.go_on_from(step, outputs.get("latents", x), reason)}

    @contextmanager
    def _standing_at(self, pipe: Any, step: int) -> Iterator[None]:
        """The pipe as it is at the end of a step of the stock loop, with a plain scheduler that has made that step.

        UnsupportedPipeline: the user's function has changed the scheduler. The other steps were read from it before.
        """
        held, proxy = vars(pipe), self._lockstep.scheduler
        kept = {name: held[name] for name in ("scheduler", "_current_timestep") if name in held}
        shown = self._scheduler = self._scheduler or PlainScheduler(proxy.__class__)
        held["scheduler"] = shown.before(proxy.state_after(step))
        if kept.get("_current_timestep") is not None:
            held["_current_timestep"] = self._lockstep.samples.timesteps[step]
        try:
            yield
            changed = shown.changed_in(held["scheduler"])
        finally:
            held.update(kept)
        if changed is not None:
            raise UnsupportedPipeline(
                f"The callback changed {changed} of the scheduler at step {step}. The steps of a call are read from "
                "its scheduler before the first one. Call the pipeline itself, or give the call other timesteps."
            )

    def _take_over(self, pipe: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Give the pipe of the call what the function has set on the user's own pipeline, and the other way round."""
        for name, value in after.items():
            if value is not before.get(name, ...) and name not in _IGNORED:
                vars(pipe)[name] = value
        for name, value in vars(pipe).copy().items():
            if isinstance(value, nn.Module) and type(value) is not NetworkProxy:
                self._shared[name] = value
                vars(pipe)[name] = NetworkProxy(value, self._lockstep)


def _returned(value: Any) -> Any:
    return value


def _raised(why: Exception) -> Any:
    raise why


_IGNORED = ("_interrupt", "_progress_bar_config", "_current_timestep", "_num_timesteps", "scheduler")


class _Before:
    """What the function may change, as it is between two turns of the loop.

    tensors: copies of those that the function is shown.
    """

    def __init__(self, pipe: Any, tensors: dict[str, Any]) -> None:
        self.tensors = tree_map_only(Tensor, torch.clone, {**tensors, "latents": None})
        self._live = vars(pipe)
        steering = _steering(self._live)
        self._kept = {name: _kept(value) for name, value in steering.items()}
        self._views = [self._live, self._live.values(), *chain.from_iterable(map(_views, steering.values()))]
        self._flat = list(chain.from_iterable(self._views))

    def is_same(self) -> bool:
        """Whether the attributes are the same objects, and nothing was written into their dictionaries and lists."""
        return _identical(list(chain.from_iterable(self._views)), self._flat)

    def changed(self) -> list[str]:
        """The names of attributes that steer the loop, and do it in another way now."""
        after = _steering(self._live)
        names = sorted(self._kept.keys() | after.keys())
        return [name.lstrip("_") for name in names if not _is(after.get(name, ...), self._kept.get(name, ...))]


def _steering(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a pipe that steer its loop, and its networks."""
    return {
        name: value
        for name, value in attributes.items()
        if (name[:1] == "_" and name not in _IGNORED) or type(value) is NetworkProxy
    }


def _views(value: Any) -> Iterator[Iterable[Any]]:
    """What a dictionary or a list holds now, with its keys, and what those in it hold."""
    if isinstance(value, dict):
        yield value
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    yield value
    for each in value:
        yield from _views(each)


def _identical(values: Sequence[Any], kept: Sequence[Any]) -> bool:
    return len(values) == len(kept) and all(map(operator.is_, values, kept))


def _kept(value: Any) -> Any:
    """What a container holds now."""
    if isinstance(value, dict):
        return {name: _kept(each) for name, each in value.items()}
    return list(map(_kept, value)) if isinstance(value, list | tuple) else value


def _is(value: Any, other: Any) -> bool:
    """Whether two values, or what two containers hold, are the same objects."""
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_is(each, other[name]) for name, each in value.items())
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) == len(other) and all(map(_is, value, other))
    return value is other


def _same(value: Any, kept: Any) -> bool:
    """Whether tensors, also those in lists, hold the same; a state that is NaN was not changed."""
    now, before = tree_leaves(value), tree_leaves(kept)
    return len(now) == len(before) and all(map(same, now, before))

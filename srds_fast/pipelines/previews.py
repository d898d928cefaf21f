"""Previews: a pipeline's own call is made once more, in which the loop is one that ends in given latents.

So whatever a pipeline does after its loop is done for a preview too: blending, decoding, a safety checker. Modules that
were called before the loop, such as text encoders, are not called again. Of a call that runs on the stock loop because
it is the fastest, the x0 that its steps predict are shown.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Container
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..caches import signature_of
from ..engine.merging.rule import Call
from ..engine.run import Observer
from ..engine.x0_previews import Due, preview
from ..errors import UnsupportedPipeline
from ..sampling.rows import state_dtype
from ..schedulers.own_loop import copy_scheduler
from ..schedulers.table import NoiseTable
from ..schedulers.verify import noise_table
from ..solvers.contract import Checkpoint
from .lockstep.joint import JointSteps
from .lockstep.own_enumerate import with_own_enumerate
from .lockstep.placeholders import Placeholders
from .lockstep.proxies import SchedulerProxy, copy_with_proxies
from .lockstep.turns import LoopTurns, Ran, Script, Turn
from .modular.arguments import is_modular
from .modular.blocks import driven, without_progress_bar
from .networks import own_guiders, upcast_copies
from .own_draws import with_own_draws
from .state import PipelineCall, RandomState

SHOWN = ("images", "videos")  # the outputs of blocks that decode


class Previews:
    """Makes previews of a call.

    seen: the modules that the call has called before its loop, with what they returned. random: where its random
    numbers begin. The call sets both.
    """

    def __init__(self, call: PipelineCall) -> None:
        if is_modular(fast := call.fast):
            given = signature_of(type(fast.original).__call__).bind(fast, *call.args, **call.kwargs).arguments
            call = replace(call, args=(_own(given.get("state")),), kwargs=given.get("kwargs", {}))
        self._call = call
        self.seen: list[tuple[Any, Any]] = []
        self.random: RandomState | None = None

    def decode(self, latents: Tensor) -> Any:
        """PIL images, as the call makes them of the final latents of its loop, [batch, ...].

        UnsupportedPipeline: a modular pipeline of which no block decodes.
        """
        fast, cls = self._call.fast, type(self._call.fast.original)
        args, kwargs, draws = with_own_draws(self._call, self.random)
        with fast._srds.tokenizers.borrow(fast) as tokenizers, draws or nullcontext():
            parts = {**tokenizers, **own_guiders(fast), **without_progress_bar(fast), **upcast_copies(fast)}
            loop = _GivenEnd(fast.scheduler, latents, list(self.seen), fast._srds.loops.outputs)
            twin = copy_with_proxies(fast, cls, loop, parts)
            vars(twin).update(parts, maybe_free_model_hooks=lambda: None)  # the call itself still runs
            call = signature_of(cls.__call__).bind(twin, *args, **kwargs)
            if is_modular(fast):
                twin._blocks = driven(twin._blocks, loop, whole=True)
                return self._of_blocks(twin, call.arguments)
            call.arguments.update(_as_images(signature_of(cls.__call__).parameters))
            return with_own_enumerate(cls.__call__)(*call.args, **call.kwargs)[0]

    def _of_blocks(self, pipe: Any, arguments: dict[str, Any]) -> Any:
        given = {**arguments.get("kwargs", {}), **_as_images({each.name for each in pipe._blocks.inputs})}
        state = type(pipe).__call__(pipe, _own(arguments.get("state")), **given)
        found = next((value for name in SHOWN if (value := state.get(name)) is not None), None)
        if found is None:
            raise UnsupportedPipeline(
                f"No block of {type(pipe).__name__} decodes the latents of its loop. Use Refinement.latents."
            )
        return found


def _as_images(known: Container[str]) -> dict[str, Any]:
    """Arguments with which a call that knows these makes PIL images, and tells nobody."""
    shown = {"output_type": "pil", "return_dict": True, "callback_on_step_end": None}
    return {name: value for name, value in shown.items() if name in known}


def _own(state: Any) -> Any:
    """A copy of a modular pipeline's state, into which a call writes."""
    twin = copy.copy(state)
    if twin is not None:
        twin.values = dict(state.values)
    return twin


class _GivenEnd:
    """In the place of a `LockstepLoop`: turns of the first and the last step without networks, then the latents."""

    def __init__(self, scheduler: Any, latents: Tensor, seen: list[tuple[Any, Any]], outputs: Any) -> None:
        self.scheduler = SchedulerProxy(copy_scheduler(scheduler), self)
        self.joint, self.samples = JointSteps(), SimpleNamespace(final_steps=0, progress=None)
        self._latents, self._seen = latents, seen
        self._start, self._timesteps = 0, torch.empty(0, device="cpu")
        self.turns = LoopTurns(Placeholders(outputs, Call.__call__), Call.__call__, self.scheduler.look_before)
        self.turns.begins_live = False

    def enter(self, start: int, timesteps: Tensor) -> None:
        self._start, self._timesteps = start, timesteps

    def call(self, call: Call) -> Any:
        if not self.turns.under_way and self._seen and self._seen[0][0] is call.network:
            return self._seen.pop(0)[1]
        return self.turns.call(call)

    def step(self, m: Tensor, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        if self.turns.done == 0:
            call = self.scheduler.table(options).call
            self.scheduler.keep_snapshots(self._start, len(self._timesteps), call, x, m)
        step = self.turns.next_step or 0
        sample = self.turns.step(m, x, self._script)
        self.scheduler.look_before(step + 1)
        return sample, *self.scheduler.beside(sample, last=self.turns.next_step is None)

    def _script(self, first: Ran) -> Script:
        x, last = first.x, len(self._timesteps) - 1
        if last > 0:
            yield Turn(last, x)
        return torch.cat([self._latents.to(self.scheduler.dtype)] * (len(x) // len(self._latents)))


class StockPreviews:
    """Looks at the steps of one loop. observer: is shown them."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._table: NoiseTable | None = None
        self._last: Tensor | None = None  # state that the last step has returned, [batch, ...]
        self._due: Due
        self._step = self._start = 0

    def look_at(self, scheduler: Any) -> None:
        """Look at each step of a scheduler, whose loop has not begun."""
        step = scheduler.step

        @functools.wraps(step)  # pipelines look at its signature
        def step_and_show(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(step).bind(*args, **kwargs).arguments
            self._show(scheduler, given)
            found = step(*args, **kwargs)
            self._last = found[0]
            return found

        scheduler.step = step_and_show

    def _show(self, scheduler: Any, given: dict[str, Any]) -> None:
        x = given["sample"]
        if self._table is None:
            own = copy_scheduler(scheduler)
            del own.step  # the scheduler's own step is read, which is not looked at
            self._table = noise_table(own, eta=given.get("eta"))
            found = (scheduler.timesteps == given["timestep"]).nonzero()
            self._start = int(found[0]) if len(found) else 0
            self._due = Due(self._table.num_steps - self._start)
        self._step += 1
        m = self._table.prediction_of(given["model_output"], x)
        if self._due.is_now(self._step) and m.shape == x.shape:
            dtype = state_dtype(x.dtype)
            x0 = self._table.predict_x0(self._start + self._step - 1, x.to(dtype), m.to(dtype))
            self._observer(preview(self._step, x0, tuple(range(len(x)))))

    def end(self) -> None:
        """Show the last state: the result of the call."""
        if (last := self._last) is not None:
            found = Checkpoint(0, last, tuple(range(len(last))), None, exact=True)
            self._observer(found.copied(final=True))

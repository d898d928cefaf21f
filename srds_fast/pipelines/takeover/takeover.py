"""Takeover: the pipeline's loop turns once, recorded, and its calls are then made by a loop of ours.

In that turn the network is not called: it answers with random numbers, and what the loop makes of them by the time it
steps its scheduler tells its guidance. If that is one weighted sum of the branches, the weights go to the solver, which
combines the branches itself, and the recorded calls are repeated for the rows of every wave, as `drive` would make
them; the loop is handed the finished samples. If it is not, the loop is driven from there on, one turn a wave.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.costs import Costs, price
from ...engine.evaluator import Evaluator
from ...engine.graphs.capturable import Capturable, Through
from ...engine.graphs.runner import GraphRunner
from ...engine.run import Run, core_of, no_room
from ...engine.streams import TwoLanes, has_two_lanes
from ...errors import DivergenceError
from ...kernels.common.dispatch import implementation
from ...kernels.wave_update import NetworkInput
from ...planner.plan import SLIDES, STATES_KEPT, Plan
from ...planner.search import Pricing
from ...sampling.rows import state_dtype
from ...schedulers.table import NoiseTable
from ...solvers.contract import Checkpoint, Core, Evaluate, Extras
from ...solvers.program import Program
from ...telemetry.report import Report
from ..lockstep.loop import Drive
from ..loop import Loop
from ..lora import AdapterScales, scale_numbers
from ..network_rows import RowInputs
from ..networks import Network, is_compiled
from .guidance import LINEAR, KnownGuidance, _probe
from .recorded import RecordedCall, Repeated, Residuals, signature_of, tensors_of, with_tensors


def why_not(loop: Loop) -> str | None:
    """Why a loop cannot be taken over, or None."""
    if not loop.checked:
        return "its loop was not read by hand: what it does may differ from step to step"
    if loop.blends:
        return "its loop puts the known part of the image back after every step"
    if loop.joins:
        return "its loop joins conditioning to the states"
    return None


class Takeover(Drive):
    """State of one call that is taken over; see `Drive`.

    Args:
        graph_use: how it may use graphs; None: it runs eagerly.
        guidance: weights that calls of the same kind were found to have.
        overlap: how coarse rows are run, see `engine.overlap`; "auto" is decided where a recording is made.
        costs: that calls of the same kind were found to have.
        max_rows: widest call that may be measured.

    Attributes:
        drive_reason: why the loop is driven after all; None while it is not.
    """

    def __init__(
        self,
        *args: Any,
        graph_use: GraphRunner | None = None,
        guidance: KnownGuidance | None = None,
        overlap: str = "batch",
        costs: Costs | None = None,
        max_rows: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._known = guidance or KnownGuidance({}, None)
        self._remembered: Tensor | None = None
        self._overlap = overlap
        self._costs = costs or Costs()
        self._max_rows = max_rows
        self._priced: Pricing | None = None
        self.drive_reason: str | None = None
        self._recorded: list[RecordedCall] = []
        self._driven_anyway: str | None = None
        self._scaled = False
        self._weights: Tensor | None = None
        self._graph_use = graph_use

    def scale(self, x: Tensor, timestep: Any) -> Tensor:
        """The states as the loop's network is given them in the recorded turn, and where the loop is driven."""
        self._scaled = True
        return super().scale(x, timestep)

    def call(
        self, network: nn.Module, family: Network, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call of the first turn and answer with a probe; calls of later turns are driven."""
        if kwargs.get("guess_mode"):
            self._driven_anyway = "its loop puts zeros beside what the ControlNet returns (guess_mode)"
        if self.run is not None or self._driven_anyway is not None:
            return super().call(network, family, names, args, kwargs)
        self._calls += 1
        if self._started is None:
            self._started = time.perf_counter()
        states: Tensor = kwargs[family.state] if family.state in kwargs else args[names.index(family.state)]
        number = len(self._recorded)
        # loops put other options into the same dictionary for their next call
        args = tuple(dict(arg) if isinstance(arg, dict) else arg for arg in args)
        kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        if family.gives_residuals:
            if "conditioning_scale" in kwargs:
                kwargs["conditioning_scale"] = _on_device(kwargs["conditioning_scale"], states)
            self._recorded.append(RecordedCall(network, family, names, args, kwargs, states, None))
            return Residuals(number, "down"), Residuals(number, "mid")
        if not any(recorded.probe is not None for recorded in self._recorded):
            self._remembered = self._known.of(states)
        probe = _probe(network, family, states, number, known=self._remembered is not None)
        self._recorded.append(RecordedCall(network, family, names, args, kwargs, states, probe))
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("return_dict", True) is False:
            return (probe,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=probe)

    def step(self, m: Tensor, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        """In the recorded turn: make all waves, return the samples."""
        if self.run is not None or not self._recorded or self.timesteps is None:
            self.drive_reason = self.drive_reason or self._driven_anyway
            begins = self.run is None
            found = super().step(m, x, options)
            assert self.run is not None
            self.run.report.drive_reason = self.drive_reason
            if begins:
                self._refuse_graphs()
            return found
        self.steps += 1
        self._calls = 0
        samples = len(x) // self._loop.copies
        self.drive_reason = self._read_guidance(m[:samples], x[:samples])
        # noise is drawn in the dtype of what the network returns
        self._begin(m.to(self._recorded[0].states.dtype), x, options)
        assert self.run is not None
        if self.drive_reason is not None:
            self.run.report.drive_reason = self.drive_reason
            self._refuse_graphs()
            self._wave = self.run.next(None)
            return (self._hand_out(x.dtype),)
        return self._make_all_waves(x.dtype)

    def _refuse_graphs(self) -> None:
        if self._graph_use is not None and self.drive_reason is not None:
            assert self.run is not None
            self.run.report.engine_reason = f"the loop is driven: {self.drive_reason}"
            self._graph_use.refused(self.run.report.engine_reason)

    def newest(self) -> Tensor | None:
        """The newest whole sample, [batch, ...]; of a sequential run, where it stands."""
        assert self.run is not None
        if self.run.report.engine == "loop graph":  # what is handed out between checkpoints is no state
            return self.run.newest
        if self._weights is None or self.run.newest is not None or self._wave is None:
            return super().newest()
        return self._state_of(self._wave) if self.run.plan.method == "sequential" else None

    def _make_all_waves(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        assert self.run is not None
        assert self._rows is not None
        plan = self.run.plan
        try:
            done = self._wave_by_wave(dtype)
            self._learn(plan, self.run.report)
            return done
        except DivergenceError as error:
            self._learn(plan, None)
            self._step_by_step(error)
        except torch.OutOfMemoryError:
            rows = self.run.report.peak_rows
            if rows <= 1 or self.run.sample is not None:
                raise
            self.run.close()
            if self._priced is not None:
                self._priced.known.experience.had_no_room(rows)
            self._take_steps(no_room(rows))
        # outside the handlers: their errors keep alive what the waves had in memory
        return self._run_waves(self.run, Repeated(self._recorded, self._rows, self._num_samples), dtype)

    def _learn(self, plan: Plan, report: Report | None) -> None:
        """What is not recorded while serving is not planned anew, either."""
        if self._priced is not None and (self._graph_use is None or self._graph_use.lazy):
            self._priced.saw(plan, report)

    @property
    def _turns_with_waves(self) -> bool:
        reason = self.drive_reason or self._driven_anyway
        return reason is not None or not self._recorded or self.timesteps is None

    def _wave_by_wave(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        assert self.run is not None
        assert self._rows is not None
        evaluate = self._eager_evaluator(self.run, self._rows)
        use, first = self._graph_use, self.run
        if use is None:
            return self._run_waves(first, evaluate, dtype)
        try:
            call = self._capturable()
        except ValueError as why:
            reason = str(why)
            use.refused(reason)
            first.report.engine_reason = reason
            return self._run_waves(first, evaluate, dtype)
        runs = iter([first])
        return use.run(
            call,
            lambda: next(runs, None) or self._begin_again(),
            evaluate,
            lambda run, evaluate: self._run_waves(run, evaluate, dtype),
        )

    def _eager_evaluator(self, run: Run, rows: RowInputs) -> Evaluator:
        if self._overlap != "streams" or not has_two_lanes(run.program):
            return Repeated(self._recorded, rows, self._num_samples)
        assert self._parts is not None
        _, state, noise, _ = self._parts
        # of the parts of waves; the whole waves' is not used then
        self._rows = RowInputs(run.program.in_lanes(), noise, state, instead=self._instead)
        lanes = TwoLanes(Repeated(self._recorded, self._rows, self._num_samples), run.program, state.device)
        lanes.prepare()
        run.report.overlap = "streams"
        return lanes

    def _run_waves(self, run: Run, evaluate: Callable[[Evaluate], Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        self.run = run
        run.report.path = "takeover"
        self._wave = run.next(None)
        x0: tuple[Tensor, ...] = ()
        while self._wave is not None:
            m = evaluate(self._wave)
            if self.num_steps == 1:
                x0 = (self._x0(self._wave, m).to(dtype),)
            run.received()
            if self._interrupted() and (newest := self.newest()) is not None:
                return (self.interrupt(newest, dtype), *x0)
            self._wave = run.next(m)
            self.progress()
        return (self._hand_out(dtype), *x0)

    def _begin_again(self) -> Run:
        """A run from the start, that shows nothing twice."""
        assert self.run is not None
        assert self._make_run is not None
        shown, observer = self.run.shown, self._observer

        def once(checkpoint: Checkpoint) -> None:
            if observer is not None and checkpoint.iteration > shown:
                observer(checkpoint)

        return self._make_run(observer=once)

    def _pricing(self, noise: NoiseTable, state: Tensor, extras: Extras) -> Callable[[], Pricing] | None:
        if self.drive_reason is not None or noise.num_steps == 1:
            return None
        return functools.partial(self._price, noise, state, extras)

    def _price(self, noise: NoiseTable, state: Tensor, extras: Extras) -> Pricing:
        def evaluator(program: Program) -> Repeated:
            return Repeated(self._recorded, RowInputs(program, noise, state, instead=self._instead), len(state))

        kind = tuple(recorded.kind for recorded in self._recorded)
        replayed = self._graph_use is not None and state.is_cuda
        dtype = self._recorded[0].states.dtype
        networks = self._networks()
        self._priced = price(
            self._costs,
            kind,
            evaluator,
            state,
            noise,
            extras,
            dtype,
            networks=networks,
            max_rows=self._max_rows,
            replayed=replayed,
        )
        return self._priced

    def _networks(self) -> list[nn.Module]:
        return list({id(recorded.network): recorded.network for recorded in self._recorded}.values())

    def _capturable(self) -> Capturable:
        """What a recording of this call would be.

        Raises:
            ValueError: there can be none; the message says why.
        """
        if self.num_steps == 1:
            raise ValueError("a run of a single step has nothing between its waves")
        assert self.run is not None
        assert self._parts is not None
        run, (plan, state, noise, extras) = self.run, self._parts
        factors: dict[nn.Module, float] = {}
        for recorded in self._recorded:
            if factors.setdefault(recorded.network, recorded.scale) != recorded.scale:
                raise ValueError("its loop scales the LoRA layers of a network in two ways")
        scales = AdapterScales(factors)
        calls = [recorded.unscaled() for recorded in self._recorded] if scales else self._recorded
        given = tensors_of(calls)
        optional = {"draws": extras.draws, "guidance": extras.guidance, "guess": extras.guess}
        if scales:
            optional["adapter scales"] = scales.values(state.new_empty(0))
        own = {"x": state} | {name: tensor for name, tensor in optional.items() if tensor is not None}
        program, instead = run.program, self._instead

        def with_own(static: Mapping[str, Tensor]) -> Extras:
            draws, guidance, guess = (static.get(name) for name in ("draws", "guidance", "guess"))
            return replace(extras, draws=draws, guidance=guidance, guess=guess)

        def repeated(static: Mapping[str, Tensor], program: Program) -> Repeated:
            rows = RowInputs(program, noise, static["x"], instead=instead)
            around = functools.partial(scales.read_from, static["adapter scales"]) if scales else nullcontext
            return Repeated(with_tensors(calls, given, static), rows, len(static["x"]), around)

        def begin(static: Mapping[str, Tensor], beside: bool) -> tuple[Core, Evaluator]:
            core = core_of(plan, static["x"], noise, program, with_own(static))
            if not beside:
                return core, repeated(static, program)
            return core, TwoLanes(repeated(static, program.in_lanes()), program, static["x"].device)

        def through(graphed: Through) -> Repeated:
            called = {network: graphed(instead.get(network, network), id(network)) for network in factors}
            return Repeated(self._recorded, RowInputs(program, noise, state, instead=called), len(state))

        return Capturable(
            (
                plan.signature,
                noise,
                extras.scaled,
                extras.network,
                implementation(state.device),
                signature_of(calls),
            ),
            own | given,
            tuple(factors),
            begin,
            through,
            plan.num_checkpoints,
            program,
            extras.network,
            calls[0].states.dtype,
            scale_numbers(factors),
            network_signature=(tuple(map(id, instead.values())), _attention_of_the_process()),
            why_no_loop=SLIDES if plan.slides else STATES_KEPT if self._keep_states else None,
            overlap=self._overlap if has_two_lanes(program) else "batch",
            compiled=any(network in instead or is_compiled(network) for network in factors),
        )

    def _state_of(self, wave: Evaluate) -> Tensor:
        """The state of the first row, [samples, ...], back from what the network is given of it."""
        assert self._noise is not None
        assert self._weights is not None
        state = wave.x[0].to(self._weights.dtype)
        scale = self._noise.numbers["input_scale"][self._start + self._offset + wave.positions[0]]
        return state / scale if self._scaled else state

    def _x0(self, wave: Evaluate, m: Tensor) -> Tensor:
        """What the one step of a loop predicts, [samples, ...]: a loop of a single step may ask for it."""
        assert self._noise is not None
        assert self._weights is not None
        guided = torch.tensordot(self._weights, m.to(self._weights.dtype), dims=1)
        _, x0 = self._noise.step(self._start, self._state_of(wave), guided)
        return x0

    def _read_guidance(self, m: Tensor, x: Tensor) -> str | None:
        """Find the weights of the branches in m, [samples, ...]; returns why that cannot be done, or None."""
        probes: list[Tensor] = []
        for each in self._recorded:
            if each.probe is None:
                continue
            branches, odd = divmod(len(each.states), len(x))
            if odd or each.states.shape[1:] != x.shape[1:]:
                return "its network is given something else than the states"
            probes += each.probe.narrow(each.family.channels, 0, x.shape[each.family.channels]).chunk(branches)
        if m.shape != x.shape:
            return None  # refused with a sentence where the run begins
        dtype = state_dtype(x.dtype)
        if self._remembered is not None:
            if len(self._remembered) != len(probes):
                return "its network is called for other branches than in calls of its kind before"
            self._weights = self._remembered.to(dtype)
            return None
        columns = torch.stack([each.flatten() for each in probes] + [m.flatten().double()])
        # one transfer: all inner products
        products = (columns @ columns.T).cpu()
        branches = len(probes)
        weights = torch.linalg.solve(products[:branches, :branches], products[:branches, branches])
        residual = columns[branches] - weights.to(columns) @ columns[:branches]
        # guidance mixes predictions of one thing; weights that do not add up to 1 are a rescaling of what the probes
        # happened to be
        off = abs(float(weights.sum()) - 1.0)
        if off > LINEAR or float(residual.norm()) > LINEAR * float(columns[branches].norm()):
            return "its guidance is not one weighted sum of the network's outputs"
        self._weights = weights.to(x.device, dtype)
        states = next(recorded.states for recorded in self._recorded if recorded.probe is not None)
        self._known.keep(states, self._weights)
        return None

    def _extras(
        self, draws: Tensor | None, dtype: torch.dtype, num_steps: int, x0_prev: Tensor | None = None
    ) -> Extras:
        extras = super()._extras(draws, dtype, num_steps, x0_prev)
        if self.drive_reason is not None or self._weights is None:
            return extras
        copies = max(len(each.states) // self._num_samples for each in self._recorded)
        network = NetworkInput(dtype, copies, all(_is_channels_last(each.network) for each in self._recorded))
        alone = len(self._weights) == 1 and abs(float(self._weights) - 1.0) < LINEAR
        guidance = None if alone else self._weights
        return replace(extras, network=network, scaled=self._scaled, guidance=guidance)


def _attention_of_the_process() -> Hashable:
    """What attention goes through where a processor does not say: diffusers keeps one backend for the process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return str(_AttentionBackendRegistry.get_active_backend()[0])


def _is_channels_last(network: nn.Module) -> bool:
    """Whether a convolution network would lay its input out so before anything else."""
    weight = getattr(getattr(network, "conv_in", None), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 4 or weight.is_contiguous():
        return False
    return weight.is_contiguous(memory_format=torch.channels_last)


def _on_device(scale: Any, like: Tensor) -> Any:
    """A scale as a tensor: a recording reads it, and does not have the number of its call built in."""
    if isinstance(scale, list | tuple):
        return [_on_device(each, like) for each in scale]
    return torch.tensor(scale, dtype=state_dtype(like.dtype), device=like.device)

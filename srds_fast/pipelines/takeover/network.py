"""The recorded calls of a turn as the network of a session; they are repeated for the rows of every wave."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.eager import Evaluator
from ...engine.graphs.capturable import Capturable, NetworkCalls, Through
from ...engine.run import core_of
from ...engine.streams import TwoLanes, has_two_lanes
from ...kernels.common.dispatch import implementation
from ...planner.plan import SLIDES, STATES_KEPT, Plan
from ...schedulers.table import NoiseTable
from ...solvers.contract import Core, Evaluate, SolverInputs
from ...solvers.program import Program
from ..lora import AdapterScales
from ..network_checks import rows_at
from ..network_rows import RowInputs
from ..networks import NetworkCall, is_compiled
from .recorded import Around, Repeated, kind_of, signature_of, tensors_of, unscaled, with_tensors
from .turn import RecordedTurn


@dataclass(frozen=True)
class RecordedNetwork:
    """See `srds_fast.sampling.session.Network`."""

    turn: RecordedTurn
    state: Tensor  # starting noise, [batch, ...], in the dtype of the state
    noise: NoiseTable
    inputs: SolverInputs
    replacements: Mapping[nn.Module, Callable[..., Any]]  # maps a network to the callable to use instead
    overlap: str  # how coarse rows run: "batch", "streams", or "auto" (decided when a graph is recorded)

    @property
    def kind(self) -> Hashable:
        return tuple(map(kind_of, self.turn.calls))

    @property
    def modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(recorded.network for recorded in self.turn.calls))

    @property
    def modules_found(self) -> list[nn.Module]:
        return self.modules

    @property
    def dtype(self) -> torch.dtype:
        return self.turn.calls[0].states.dtype

    def evaluator(self, program: Program) -> Evaluator:
        two_lanes = self.overlap == "streams" and has_two_lanes(program)
        return self._evaluator(self.turn.calls, program, self.state, two_lanes)

    def capturable(self, plan: Plan, program: Program) -> Capturable:
        if self.noise.num_steps == 1:
            raise ValueError("a run of a single step has nothing between its waves")
        state, noise, inputs, replacements = self.state, self.noise, self.inputs, self.replacements
        calls: list[NetworkCall] = []
        factors: dict[nn.Module, float] = {}
        for call, factor in map(unscaled, self.turn.calls):
            calls.append(call)
            if factors.setdefault(call.network, factor) != factor:
                raise ValueError("its loop scales the LoRA layers of a network in two ways")
        scales = AdapterScales(factors)
        calls = calls if scales else self.turn.calls
        given = tensors_of(calls)
        own = {"x": state, **inputs.tensors()}
        if scales:
            own["adapter scales"] = scales.values(state.new_empty(0))

        def begin(static: Mapping[str, Tensor], two_lanes: bool) -> tuple[Core, Evaluator]:
            x = static["x"]
            around = functools.partial(scales.read_from, static["adapter scales"]) if scales else nullcontext
            own_calls = with_tensors(calls, given, static)
            core = core_of(plan, x, noise, program, inputs.with_tensors(static))
            return core, self._evaluator(own_calls, program, x, two_lanes, around)

        def through(graphed: Through) -> Repeated:
            called = {network: graphed(replacements.get(network, network), id(network)) for network in factors}
            return Repeated(self.turn.calls, RowInputs(program, noise, state, called))

        signature = plan.signature, noise, inputs.scaled, inputs.network, implementation(state.device)
        return Capturable(
            (*signature, signature_of(calls)),
            own | given,
            network_calls(tuple(factors), state.device, replacements),
            begin,
            through,
            plan.options.num_checkpoints(plan.max_iterations),
            program,
            inputs.network,
            calls[0].states.dtype,
            scales.dictionaries,
            why_no_loop=SLIDES if plan.slides else STATES_KEPT if inputs.trajectory is not None else None,
            overlap=self.overlap if has_two_lanes(program) else "batch",
        )

    def _evaluator(
        self, calls: Sequence[NetworkCall], program: Program, x: Tensor, two_lanes: bool, around: Around = nullcontext
    ) -> Evaluator:
        rows = RowInputs(program.in_lanes() if two_lanes else program, self.noise, x, self.replacements)
        repeated = Repeated(calls, rows, around)
        return TwoLanes(repeated, program, x.device) if two_lanes else repeated

    @torch.no_grad()
    def guided(self, steps: Sequence[int], states: Sequence[Tensor]) -> Tensor:
        """The guided outputs of rows at these steps, made in one wave, [rows, samples, ...]."""
        weights, given = self.turn.weights, self.inputs.network
        assert weights is not None
        scale = self.noise.numbers["input_scale"] if self.inputs.scaled else [1.0] * self.noise.num_steps
        x = given.empty(len(steps), self.state)
        rows = torch.stack([scale[step] * each.to(self.state.dtype) for step, each in zip(steps, states, strict=True)])
        x.unflatten(0, (given.branches, -1)).copy_(rows)
        evaluate = self.evaluator(rows_at(self.noise.num_steps, [tuple(steps)]))
        m = evaluate(Evaluate(x, tuple(steps), tuple(range(len(self.state))), 0))
        guided: Tensor = torch.tensordot(weights, m.unflatten(0, (len(weights), -1)).to(weights.dtype), dims=1)
        return guided

    def state_of(self, wave: Evaluate) -> Tensor:
        """The state of the first row, [samples, ...], computed from the network's input."""
        state = wave.x[0].to(self.state.dtype)
        return state / self.noise.numbers["input_scale"][wave.positions[0]] if self.inputs.scaled else state

    def x0_of(self, wave: Evaluate, m: Tensor) -> Tensor:
        """The predicted x0 of a single step, [samples, ...]: a loop with one step may read it."""
        weights = self.turn.weights
        assert weights is not None
        return self.noise.predict_x0(0, self.state_of(wave), torch.tensordot(weights, m.to(weights.dtype), dims=1))


def network_calls(
    networks: Sequence[nn.Module], device: torch.device, replacements: Mapping[nn.Module, Callable[..., Any]]
) -> NetworkCalls:
    """What graphs of these networks depend on. replacements: maps a network to the callable to use instead."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backend = str(_AttentionBackendRegistry.get_active_backend()[0])  # of processors that name none
    return NetworkCalls(
        tuple(networks),
        device,
        (tuple(map(id, replacements.values())), backend),
        any(network in replacements or is_compiled(network) for network in networks),
    )

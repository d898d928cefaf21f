"""The network calls of a loop's turns as the network of a session; they are repeated for the rows of every wave."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.eager import Evaluator
from ...engine.graphs.adapter_scales import AdapterScales
from ...engine.graphs.capturable import Capturable, NetworkCalls, Through
from ...engine.run import core_of
from ...engine.streams import TwoLanes, has_two_lanes
from ...kernels.common.dispatch import implementation
from ...kernels.common.network_input import guided
from ...kernels.wave_update import NetworkInput
from ...planner.plan import SLIDES, STATES_KEPT, Plan
from ...schedulers.table import NoiseTable
from ...solvers.contract import Core, Evaluate, SolverInputs
from ...solvers.program import Boundary, Program, Row, Wave
from .calls import (
    Calls,
    NetworkCall,
    conditions_of,
    kind_of,
    signature_of,
    tensors_of,
    unscaled,
    with_tensors,
)
from .roles import Inferred
from .rows import Around, Repeated

# a weight of one branch that is 1, but for rounding
LINEAR = 1e-9


@dataclass(frozen=True)
class RecordedNetwork:
    """See `srds_fast.sampling.network.Network`. inferred: of the loop, whose calls are the variants.

    to_record: says what graphs of some of its networks depend on.
    """

    inferred: Inferred
    variants: Sequence[Calls]
    state: Tensor  # starting noise, [batch, ...], in the dtype of the state
    noise: NoiseTable
    inputs: SolverInputs
    replacements: Mapping[nn.Module, Callable[..., Any]]  # maps a network to the callable to use instead
    to_record: Callable[[tuple[nn.Module, ...]], NetworkCalls]
    overlap: str  # how coarse rows run: "batch", "streams", or "auto" (decided when a graph is recorded)

    @property
    def calls(self) -> list[NetworkCall]:
        """All calls, of all variants."""
        return [call for variant in self.variants for call in variant.calls]

    @property
    def kind(self) -> Hashable:
        return tuple(map(kind_of, self.calls))

    @property
    def conditions(self) -> Hashable:
        weights = tuple(tuple(each.weights.flatten().tolist()) for each in self.variants)
        return weights, tuple(map(conditions_of, self.calls))

    @property
    def modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(call.network for call in self.calls))

    @property
    def modules_found(self) -> list[nn.Module]:
        return self.modules

    @property
    def dtype(self) -> torch.dtype:
        return self.calls[0].dtype if self._guide is None else self._guide

    @property
    def _guide(self) -> torch.dtype | None:
        """The dtype of the guided sums, where the solver cannot make them: their weights differ between steps."""
        return None if self.inferred.guidance is not None else self.state.dtype

    def evaluator(self, program: Program) -> Evaluator:
        two_lanes = self.overlap == "streams" and has_two_lanes(program)
        return self._evaluator(self.variants, program, self.state, two_lanes)

    def capturable(self, plan: Plan, program: Program) -> Capturable:
        state, noise, inputs, replacements = self.state, self.noise, self.inputs, self.replacements
        variants: list[Calls] = []
        factors: dict[nn.Module, float] = {}
        for variant in self.variants:
            calls = []
            for call, factor in map(unscaled, variant.calls):
                calls.append(call)
                if factors.setdefault(call.network, factor) != factor:
                    raise ValueError("its loop scales the LoRA layers of a network in two ways")
            variants.append(replace(variant, calls=calls))
        scales = AdapterScales(factors)
        variants = variants if scales else list(self.variants)
        calls = [call for variant in variants for call in variant.calls]
        given = tensors_of(calls)
        own = {"x": state, **inputs.tensors()}
        if scales:
            own["adapter scales"] = scales.values(state.new_empty(0))

        def begin(static: Mapping[str, Tensor], two_lanes: bool) -> tuple[Core, Evaluator]:
            x = static["x"]
            around = functools.partial(scales.read_from, static["adapter scales"]) if scales else nullcontext
            own_calls = with_tensors(variants, given, static)
            core = core_of(plan, x, noise, program, inputs.with_tensors(static))
            return core, self._evaluator(own_calls, program, x, two_lanes, around)

        def through(graphed: Through) -> Repeated:
            called = {network: graphed(replacements.get(network, network), id(network)) for network in factors}
            return Repeated(self.variants, program.positions, state, called, self._guide)

        by_step = [(each.variant.steps, tuple(each.variant.weights.flatten().tolist())) for each in self.variants]
        signature = plan.signature, noise, inputs.scaled, inputs.network, implementation(state.device)
        return Capturable(
            (*signature, signature_of(calls), None if self._guide is None else tuple(by_step)),
            own | given,
            self.to_record(tuple(factors)),
            begin,
            through,
            plan.options.num_checkpoints(plan.max_iterations),
            program,
            inputs.network,
            self.dtype,
            scales.dictionaries,
            why_no_loop=SLIDES if plan.slides else STATES_KEPT if inputs.trajectory is not None else None,
            overlap=self.overlap if has_two_lanes(program) else "batch",
        )

    def _evaluator(
        self, variants: Sequence[Calls], program: Program, x: Tensor, two_lanes: bool, around: Around = nullcontext
    ) -> Evaluator:
        positions = (program.in_lanes() if two_lanes else program).positions
        repeated = Repeated(variants, positions, x, self.replacements, self._guide, around)
        return TwoLanes(repeated, program, x.device) if two_lanes else repeated

    @torch.no_grad()
    def guided(self, steps: Sequence[int], states: Sequence[Tensor]) -> Tensor:
        """The guided outputs of rows at these steps, made in one wave, [rows, samples, ...]."""
        given = self.inputs.network
        scale = self.noise.numbers["input_scale"] if self.inputs.scaled else [1.0] * self.noise.num_steps
        x = given.empty(len(steps), self.state)
        rows = torch.stack([scale[step] * each.to(self.state.dtype) for step, each in zip(steps, states, strict=True)])
        x.unflatten(0, (given.branches, -1)).copy_(rows)
        evaluate = self.evaluator(_program_at(self.noise.num_steps, tuple(steps)))
        m = evaluate(Evaluate(x, tuple(steps), tuple(range(len(self.state))), 0))
        return m if self.inferred.guidance is None else guided(m, self.variants[0].weights[0], self.state.dtype)

    def state_of(self, wave: Evaluate, row: int) -> Tensor:
        """The state of a row, [samples, ...], computed from the network's input."""
        state = wave.x[row].to(self.state.dtype)
        if not self.inputs.scaled:
            return state
        steps = wave.steps(self.noise.num_steps)[row]
        return state / self.noise.input_scale[steps].to(state).view(-1, *[1] * (state.ndim - 1))


def solver_inputs(inferred: Inferred, variants: Sequence[Calls], inputs: SolverInputs, batch: int) -> SolverInputs:
    """The inputs of a run in which the solver applies the input scale, and guidance where it is always the same."""
    calls = [call for variant in variants for call in variant.calls]
    copies = max(call.length // batch for call in calls)
    dtypes = {call.dtype for call in calls}
    dtype = dtypes.pop() if len(dtypes) == 1 else inputs.network.dtype
    network = NetworkInput(dtype, copies, all(_is_channels_last(call.network) for call in calls))
    guidance = inferred.guidance
    if guidance is not None:
        unguided = len(guidance) == 1 and abs(float(guidance) - 1.0) < LINEAR
        guidance = None if unguided else variants[0].weights[0]
    return replace(inputs, network=network, scaled=inferred.scaled, guidance=guidance)


def _is_channels_last(network: nn.Module) -> bool:
    """Whether the network's first convolution works in channels-last layout."""
    weight = getattr(getattr(network, "conv_in", None), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 4 or weight.is_contiguous():
        return False
    return weight.is_contiguous(memory_format=torch.channels_last)


def _program_at(num_steps: int, steps: tuple[int, ...]) -> Program:
    """A program of one wave, of rows at these steps."""
    rows = tuple(Row(number, 0, step, step, coarse=False, fine=True) for number, step in enumerate(steps))
    return Program(num_steps, (0, num_steps), 1, (Wave(rows, (Boundary(0, 1),)),))

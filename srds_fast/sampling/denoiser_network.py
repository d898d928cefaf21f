"""Any callable denoiser as the network of a session."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..engine.graphs.cache_key import function_key, modules_of
from ..engine.graphs.capturable import Capturable, NetworkCalls, Through
from ..engine.run import core_of
from ..kernels.common.dispatch import implementation
from ..planner.plan import SLIDES, STATES_KEPT, Plan
from ..schedulers.table import NoiseTable
from ..solvers.contract import Core, SolverInputs
from ..solvers.program import Program
from .rows import Denoiser, RowDenoiser


@dataclass(frozen=True)
class DenoiserNetwork:
    """See `srds_fast.sampling.network.Network`.

    known: what its costs are remembered by, where the denoiser is made anew for each call; None: itself. called: the
    modules that such a denoiser calls.
    """

    denoiser: Denoiser
    x: Tensor
    state: Tensor
    noise: NoiseTable
    inputs: SolverInputs
    cond: Mapping[str, Tensor]
    dtype: torch.dtype
    known: Hashable = None
    called: tuple[nn.Module, ...] = ()
    modules: tuple[nn.Module, ...] = ()  # a denoiser may use modules that cannot be found

    @property
    def kind(self) -> Hashable:
        shapes = tuple((name, value.shape, value.dtype) for name, value in self.cond.items())
        return self.known or _cost_key(self.denoiser), shapes

    @property
    def conditions(self) -> Hashable:
        return tuple((name, value.shape, value.dtype) for name, value in self.cond.items())

    @property
    def modules_found(self) -> tuple[nn.Module, ...]:
        return self.called or modules_of(self.denoiser)

    def evaluator(self, program: Program) -> RowDenoiser:
        return RowDenoiser(self.denoiser, self.x, self.noise, program, self.cond)

    def capturable(self, plan: Plan, program: Program) -> Capturable:
        inputs, noise, cond = self.inputs, self.noise, self.cond

        def begin(static: Mapping[str, Tensor], two_lanes: bool) -> tuple[Core, RowDenoiser]:
            assert not two_lanes
            given = {name: static[f"cond.{name}"] for name in cond}
            evaluator = RowDenoiser(self.denoiser, static["x"], noise, program, given)
            return core_of(plan, static["x"], noise, program, inputs.with_tensors(static)), evaluator

        keeps = inputs.trajectory is not None or inputs.evaluated is not None

        def through(graphed: Through) -> RowDenoiser:
            return RowDenoiser(graphed(self.denoiser, None), self.x, noise, program, cond)

        return Capturable(
            (plan.signature, noise, inputs.network, implementation(self.state.device)),
            {"x": self.state, **inputs.tensors(), **{f"cond.{name}": value for name, value in cond.items()}},
            NetworkCalls(modules_of(self.denoiser), self.x.device, function_key(self.denoiser)),
            begin,
            through,
            plan.options.num_checkpoints(plan.max_iterations),
            program,
            inputs.network,
            self.dtype,
            why_no_loop=SLIDES if plan.slides else STATES_KEPT if keeps else None,
        )


def _cost_key(denoiser: Denoiser) -> Hashable:
    """Identifies a denoiser for cost measurements: its code and networks. Other closure values may change per call."""
    networks = tuple(weakref.ref(network) for network in modules_of(denoiser))
    code = getattr(denoiser, "__code__", None)
    owner = getattr(denoiser, "__self__", None if networks or code else denoiser)
    try:
        return code or type(denoiser), networks, None if owner is None else weakref.ref(owner)
    except TypeError:  # no weak reference: its cost cannot be remembered
        return object()

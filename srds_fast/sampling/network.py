"""What a session asks of the network of a call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..engine.costs import price
from ..engine.eager import Evaluator
from ..engine.graphs.capturable import Capturable
from ..planner.plan import Plan
from ..planner.search import Pricing
from ..schedulers.table import NoiseTable
from ..solvers.contract import SolverInputs
from ..solvers.program import Program
from .planner import Planner


class Network(Protocol):
    """The network of a call, able to evaluate rows."""

    @property
    def kind(self) -> Hashable:
        """Everything the cost of a call depends on, except the shape of the state."""

    @property
    def conditions(self) -> Hashable:
        """What decides how many iterations a calibrated plan needs: guidance, and the shapes of the conditioning."""

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The networks that are called; a measured plan is valid for their shapes only. Empty if not known."""

    @property
    def modules_found(self) -> Sequence[nn.Module]:
        """The same, but perhaps not all: enough to find measured costs again."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""

    def evaluator(self, program: Program) -> Evaluator:
        """The evaluator that runs the waves of a program from Python."""

    def capturable(self, plan: Plan, program: Program) -> Capturable:
        """Everything needed to record this call. A ValueError says why it cannot be recorded."""


def price_of(
    network: Network, planner: Planner, state: Tensor, noise: NoiseTable, inputs: SolverInputs, *, replayed: bool
) -> Pricing:
    """The costs of a call of this network, measured if they are not known. replayed: from graphs."""
    return price(
        planner.costs,
        network.kind,
        network.evaluator,
        state,
        noise,
        inputs,
        network.dtype,
        networks=network.modules,
        max_rows=planner.settings.max_rows,
        replayed=replayed,
        cache=planner.cache,
        modules_found=network.modules_found,
        replicated=True,
    )

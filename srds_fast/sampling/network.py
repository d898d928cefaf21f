"""What a session asks of the network of a call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import nn

from ..engine.eager import Evaluator
from ..engine.graphs.capturable import Capturable
from ..planner.plan import Plan
from ..solvers.program import Program


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

"""The waves of a call that is taken over: the network calls of one turn, repeated for rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ... import telemetry
from ...engine.run import Run
from ...errors import UnsupportedPipeline
from ...schedulers.reader import remember
from ...schedulers.table import NoiseTable
from ...solvers.contract import Evaluate, SolverInputs
from ...solvers.registry import SEQUENTIAL
from ..network_checks import NO_CHECK, Checked, check_rows, parts_that_decide
from ..takeover.network import RecordedNetwork
from ..takeover.turn import RecordedTurn
from .call_session import CallSession

MOST_CHECKED = 64


class TakenOver:
    """Runs the waves. replacements: maps a network to the callable to use instead.

    checked: what is known of networks, by kind of call; it is extended. progress: called after each wave.
    """

    def __init__(
        self,
        samples: CallSession,
        replacements: Mapping[nn.Module, Callable[..., Any]],
        checked: dict[Hashable, Checked],
        progress: Callable[[], None],
    ) -> None:
        self._samples, self._replacements, self._checked, self._progress = samples, replacements, checked, progress
        self.check = NO_CHECK  # of the networks, in this call

    def network(self, turn: RecordedTurn, noise: NoiseTable, inputs: SolverInputs, batch: int) -> RecordedNetwork:
        """The network of a session. inputs: of a call that makes turns. batch: samples, without copies of them."""
        overlap = self._samples.settings.overlap
        return RecordedNetwork(
            turn, self._samples.state, noise, turn.inputs(inputs, batch), self._replacements, overlap
        )

    def run(self, network: RecordedNetwork, dtype: torch.dtype) -> Tensor:
        """Run all waves; returns the x0 predicted in the last one, in this dtype, where there is a single step.

        Raises UnsupportedPipeline if the networks of the call are no functions of their rows.
        """
        samples, single = self._samples, network.noise.num_steps == 1
        self._check(network)
        session = samples.make(network.noise, network.inputs, network)
        x0 = samples.state
        if samples.settings.plan_only:
            if not single:
                session.price()
            samples.stop(samples.state)
            return x0

        def advance(run: Run, evaluate: Callable[[Evaluate], Tensor]) -> None:
            nonlocal x0
            samples.wave = run.next(None)
            while samples.wave is not None:
                m = evaluate(samples.wave)
                if single:
                    x0 = network.x0_of(samples.wave, m).to(dtype)
                run.received()
                if samples.was_interrupted():
                    return
                samples.wave = run.next(m)
                self._progress()

        session.complete(advance)
        telemetry.phase("decode")
        return x0

    def _check(self, network: RecordedNetwork) -> None:
        planner, num_steps, state = self._samples.settings.planner, network.noise.num_steps, network.state
        options = planner.options
        if num_steps == 1 or (options is not None and options.name == SEQUENTIAL):  # rows in the loop's own order
            return
        merged = planner.max_rows != 1
        kind = network.kind, state.shape, num_steps, merged, parts_that_decide(network.modules)
        if kind not in self._checked:
            given = num_steps, state, network.inputs.network, network.modules
            found = check_rows(network.evaluator, *given, merged=merged)
            if found is None:
                return
            self.check = found
            remember(self._checked, kind, found, MOST_CHECKED)
            if self._samples.started is not None:
                self._samples.started += found.seconds
        if (reason := self._checked[kind].reason) is not None:
            raise UnsupportedPipeline(f"{reason[:1].upper()}{reason[1:]}. Run this call on the original pipeline.")

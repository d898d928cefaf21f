"""The waves of a call that is taken over: the network calls of the loop's turns, repeated for rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor, nn

from ... import telemetry
from ...engine.graphs.network_graphs import CHANGED
from ...engine.run import Run
from ...sampling.rows import state_dtype
from ...sampling.trials import StartAgain
from ...schedulers.table import NoiseTable
from ...solvers.contract import Evaluate, SolverInputs
from ..module_state import ModuleState, NetworkChanged
from ..network_checks import parts_that_decide
from ..takeover.calls import bound
from ..takeover.network import RecordedNetwork, solver_inputs
from ..takeover.roles import Inferred
from .call_session import CallSession
from .turns import Ran


class TakenOver:
    """Runs the waves. replacements: maps a network to the callable to use instead. progress: called after each wave."""

    def __init__(
        self,
        samples: CallSession,
        replacements: Mapping[nn.Module, Callable[..., Any]],
        progress: Callable[[], None],
    ) -> None:
        self._samples, self._replacements, self._progress = samples, replacements, progress

    def network(
        self, inferred: Inferred, turns: Mapping[int, Ran], noise: NoiseTable, inputs: SolverInputs
    ) -> RecordedNetwork:
        """The network of a session. turns: by step, that show the calls. inputs: of a call that makes turns."""
        state, overlap = self._samples.state, self._samples.settings.overlap
        variants = bound(inferred, turns, state_dtype(state.dtype))
        inputs = solver_inputs(inferred, variants, inputs, len(state))
        return RecordedNetwork(inferred, variants, state, noise, inputs, self._replacements, overlap)

    def kind_of_check(self, network: RecordedNetwork) -> Hashable:
        """What a comparison of rows with turns of the loop is valid for."""
        patterns = tuple(call.pattern.signature for call in network.calls)
        steps = tuple(each.steps for each in network.inferred.variants)
        decide = parts_that_decide(network.modules)
        return network.kind, patterns, steps, network.state.shape, network.noise.num_steps, decide

    def run(self, network: RecordedNetwork, held: ModuleState) -> None:
        """Run all waves. held: by the networks, as the run begins.

        NetworkChanged: a hook hangs on a network, and perhaps has changed it: its calls must be made in order.
        """
        samples = self._samples
        session = samples.make(network.noise, network.inputs, network)
        if samples.settings.plan_only:
            session.price()
            samples.stop(samples.state)
            return

        def look_for_change() -> None:
            if held.foreign_hook is None and samples.in_order:
                return
            if (part := held.changed(in_order=samples.in_order)) is not None:
                why = NetworkChanged(part)
                if samples.settings.graphs is not None:  # nothing is recorded of such a run
                    samples.run.engine.reason = CHANGED
                raise StartAgain(str(why)) if held.foreign_hook is None else why

        def advance(run: Run, evaluate: Callable[[Evaluate], Tensor]) -> None:
            samples.wave = run.next(None)
            while samples.wave is not None:
                samples.wave = run.next(evaluate(samples.wave))
                self._progress()
                if samples.wave is None or held.foreign_hook is not None:
                    look_for_change()

        session.complete(advance)
        telemetry.phase("decode")

"""The waves of a call that is taken over: the network calls of the loop's turns, repeated for rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from functools import partial

from torch import Tensor

from ... import telemetry
from ...engine.distributed import call as distributed
from ...engine.graphs.network_graphs import CHANGED
from ...engine.run import Run
from ...sampling.recorded.calls import tensors_of, with_tensors
from ...sampling.recorded.network import RecordedNetwork, solver_inputs
from ...sampling.recorded.roles import Inferred
from ...sampling.rows import state_dtype
from ...sampling.trials import StartAgain
from ...schedulers.private_draws import paused
from ...schedulers.table import NoiseTable
from ...solvers.contract import Evaluate, SolverInputs
from ..network_checks import parts_that_decide
from ..networks import network_calls, training
from ..takeover.calls import bound
from .call_session import CallSession
from .turns import Ran


def recorded(
    samples: CallSession, inferred: Inferred, turns: Mapping[int, Ran], noise: NoiseTable, inputs: SolverInputs
) -> RecordedNetwork:
    """The network of a session. turns: by step, that show the calls. inputs: of a call that makes turns."""
    settings, state = samples.settings, samples.state
    variants = bound(inferred, turns, state_dtype(state.dtype))
    if distributed.current() is not None:  # what other ranks have encoded may differ by rounding
        given = tensors_of(call for variant in variants for call in variant.calls)
        variants = with_tensors(variants, given, {name: distributed.of_first(each) for name, each in given.items()})
    inputs = solver_inputs(inferred, variants, inputs, len(state))
    replacements = settings.replacements
    to_record = partial(network_calls, device=state.device, replacements=replacements)
    return RecordedNetwork(inferred, variants, state, noise, inputs, replacements, to_record, settings.overlap)


def kind_of_check(network: RecordedNetwork) -> Hashable:
    """What a comparison of rows with turns of the loop is valid for."""
    patterns = tuple(call.pattern.signature for call in network.calls)
    steps = tuple(each.steps for each in network.inferred.variants)
    decide = parts_that_decide(network.modules)
    sizes = network.state.shape, network.noise.num_steps, distributed.size()
    return network.kind, patterns, steps, sizes, decide


def run_waves(samples: CallSession, network: RecordedNetwork) -> None:
    """Run all waves.

    NetworkChanged: a hook hangs on a network, and perhaps has changed it: its calls must be made in order. Or another
    part of it was changed, after a callback was told of steps.
    LeaveWaves: a callback asks something of the loop.
    """
    session = samples.make(network.noise, network.inputs, network)
    # a function that a mode is asked about takes microseconds more, and all ranks wait for the slowest
    left_out = None if training(samples.settings.networks) else samples.settings.draws_of_first
    if samples.settings.plan_only:
        session.price()
        samples.stop(samples.state)
        return

    def advance(run: Run, evaluate: Callable[[Evaluate], Tensor]) -> None:
        samples.wave = run.next(None)
        while samples.wave is not None:
            samples.wave = run.next(evaluate(samples.wave))
            samples.progress()
            if (why := samples.change()) is not None:
                if samples.settings.graphs is not None:  # nothing is recorded of such a run
                    run.engine.reason = CHANGED
                raise why if why.by_hook or samples.told else StartAgain(str(why))
            if samples.callback is not None and samples.wave is not None:  # of the last steps a turn of the loop tells
                with nullcontext() if left_out is None else left_out.resumed():
                    samples.callback.tell()

    with paused(left_out):
        session.complete(advance)
    telemetry.phase("decode")

"""Turns: the body of a pipeline's own loop, made for any step and any state.

A turn is one pass of the loop's body. In go the step's number and timestep, the state x, and answers to network calls
that are known already. Out come the network calls that the body made, the guided output m that it gave to the
scheduler's `step`, and x as the step received it.

The control is inverted. The loop runs in the caller's thread, and asks for its next timestep and for what the scheduler
makes of an output. Both questions are answered by a script: a generator that yields the turn that comes next, and is
sent what that turn did. So a script reads as if it called the loop's body.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...engine.merging.rule import Call
from ...errors import UnsupportedPipeline
from .placeholders import Placeholders

Kinds = tuple[Hashable, ...]  # of the network calls of a turn


@dataclass(frozen=True)
class Turn:
    """The turn that comes next."""

    step: int
    x: Tensor  # the state that it departs from, [batch, ...]; for the loop's first turn its own, which is not known
    answers: Mapping[int, Any] = field(default_factory=dict)  # outputs of its network calls, by number of the call
    live: bool = False  # make the calls that have no answer here at once; otherwise they get placeholders
    changed: int | None = None  # the call that gets another placeholder than usual


@dataclass(frozen=True)
class Ran:
    """What a turn did."""

    turn: Turn
    calls: Sequence[Call]
    m: Tensor  # the guided output that the scheduler was given
    x: Tensor  # the state that the scheduler was given

    @property
    def kinds(self) -> Kinds:
        """The kinds of the network calls, in order."""
        return tuple(call.kind for call in self.calls)


Script = Generator[Turn, Ran, Tensor]
"""Yields the turns, is sent what they did, and returns the final state."""


class LoopTurns:
    """Between the loop, which asks, and the script, which answers.

    under_way: the body of the loop runs.
    make: makes a network call now. begin: called with the number of each step before its turn begins.
    """

    def __init__(
        self,
        placeholders: Placeholders,
        make: Callable[[Call], Any],
        begin: Callable[[int], None] = lambda step: None,
        scheduler_keeps_sample: Callable[[], bool] = lambda: False,
    ) -> None:
        self.watch: Callable[[Call], None] = lambda call: None  # called at each recorded call
        self.turn: Turn | None = None  # the one under way, or the one that comes next
        self.begins_live = True  # whether the first turn, for which there is no script yet, calls its networks
        self.done = 0  # turns that have reached the scheduler's step
        self.copies = False  # keep copies of all arguments: the loop writes into them later
        self._placeholders, self._make, self._begin = placeholders, make, begin
        self._script: Script | None = None
        self._calls: list[Call] = []
        self._handed: Tensor | None = None
        self._scheduler_keeps_sample = scheduler_keeps_sample
        # the state that the scheduler was given last; held, so that no other tensor gets its memory
        self._given: Tensor | None = None
        self._before: list[tuple[Tensor, int]] = []  # arguments of the turn before, with their versions then
        self.under_way = self._ended = False

    @property
    def next_step(self) -> int | None:
        """The step of the turn under way, or of the one that comes next; None: the loop ends."""
        return None if self.turn is None else self.turn.step

    def begin(self, step: int) -> None:
        """The body of the loop begins."""
        if self.turn is None:
            self.turn = Turn(step, torch.empty(0, device="cpu"), live=self.begins_live)
        self._calls, self.under_way = [], True
        self._begin(step)

    def leave(self) -> None:
        """The loop has only read its timesteps, or has ended."""
        self.under_way = False
        if self.done == 0:
            self.turn = None

    def call(self, call: Call) -> Any:
        """A network call of the pipeline, in a turn or outside of the loop."""
        if not self.under_way or self.turn is None:
            return call()
        number, turn = len(self._calls), self.turn
        self._calls.append(_mapped(call, torch.clone) if self.copies else call)
        self.watch(call)
        if number in turn.answers:
            # the loop may write into what it gets, and the answer may be needed once more
            return tree_map_only(Tensor, torch.clone, turn.answers[number])
        if turn.live:
            output = self._make(call)
            self._placeholders.learn(call, output)
            return output
        return self._placeholders.of(call, number, changed=turn.changed == number)

    def step(self, m: Tensor, x: Tensor, script: Callable[[Ran], Script]) -> Tensor:
        """The loop has reached the scheduler's step; returns the state for what comes next.

        script: makes the script from the first turn, at the first step.
        """
        if not self.under_way or self.turn is None or self._ended:
            raise refused("it steps its scheduler outside of one loop over the timesteps, or twice in one turn")
        self.under_way = False
        self.done += 1
        self._see_overwriting(x)
        self._keep_arguments(x)
        ran = Ran(self.turn, self._calls, m, x)
        if self._script is None:
            self._script = script(ran)
            return self._next(None)
        return self._next(ran)

    def follow(self, script: Script) -> Tensor:
        """Leave the script for another one; returns the state for what comes next."""
        if self._script is not None:
            self._script.close()
        self._script, self._ended = script, False
        return self._next(None)

    def _next(self, ran: Ran | None) -> Tensor:
        assert self._script is not None
        try:
            self.turn = self._script.send(ran)  # type: ignore[arg-type]
        except StopIteration as stop:
            self.turn, self._ended = None, True
            sample: Tensor = stop.value
            return sample
        # a loop may write the state into a tensor of its own, or write into the state
        self._handed = self.turn.x.clone()
        return self._handed

    def end(self) -> None:
        """The loop ends: there is no turn after the one under way."""
        self.under_way, self._ended = False, True
        self.done += 1
        self.close()

    def close(self) -> None:
        """End the script, which may hold the tensors of a wave."""
        if self._script is not None:
            self._script.close()
        self._calls, self._before, self.turn, self._given = [], [], None, None

    def _see_overwriting(self, x: Tensor) -> None:
        """Refuse a loop that writes each state into one tensor, if its scheduler keeps that one for a later step."""
        last, self._given = self._given, x
        if last is None or not self._scheduler_keeps_sample():
            return
        own = x.untyped_storage().data_ptr()
        handed = None if self._handed is None else self._handed.untyped_storage().data_ptr()
        if own == last.untyped_storage().data_ptr() and own != handed:
            raise refused("it writes each state into a tensor that its scheduler has kept for a later step")

    def _keep_arguments(self, x: Tensor) -> None:
        """See that the arguments of recorded calls stay as they are until the calls are made."""
        if torch.is_inference_mode_enabled():
            self.copies, self._handed = True, None  # it is not known which of these tensors are written into
        elif any(tensor._version != version for tensor, version in self._before):
            self.copies = True
        storage = x.untyped_storage().data_ptr()
        if self._handed is not None and self._handed._version == 0:
            # the state is still what it was handed, and no tensor of the loop's own
            storage = -1 if self._handed.untyped_storage().data_ptr() == storage else storage

        def is_state(tensor: Tensor) -> bool:
            return tensor.untyped_storage().data_ptr() == storage

        def separate(tensor: Tensor) -> Tensor:
            return tensor.clone() if is_state(tensor) else tensor

        self._calls = [_mapped(call, separate) if any(map(is_state, call.tensors())) else call for call in self._calls]
        if not self.copies:
            self._before = [(each, each._version) for call in self._calls for each in call.tensors()]


def _mapped(call: Call, function: Callable[[Tensor], Tensor]) -> Call:
    """The call with a function of each tensor among its arguments."""
    args, kwargs = tree_map_only(Tensor, function, (call.args, call.kwargs))
    return Call(call.network, args, kwargs)


def refused(why: str) -> UnsupportedPipeline:
    """Why the loop cannot run in turns; `why` is a sentence without its first capital and its full stop."""
    return UnsupportedPipeline(
        f"The loop of this pipeline cannot run in parallel: {why}. Its steps then depend on more than their timestep "
        "and their state. Call the pipeline itself."
    )

"""The rows of a wave, each by turns of the pipeline's own loop; only their network calls are merged.

For each row a first turn shows its network calls. Those whose arguments depend on no answer are made, merged with those
of the other rows. If other calls depend on their answers, another turn shows these, and so on. A last turn, with all
answers, gives the row's guided output. A wave of a single row needs one turn, in which its calls are made at once.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...engine import cancellation
from ...engine.distributed import call as distributed
from ...engine.merging.calls import MergedCalls
from ...engine.merging.rule import Call, same_call
from ...errors import UnsupportedPipeline
from ..network_checks import check_answers, foreign_code, parts_that_decide
from .digests import Digests
from .memory import LoopMemory
from .rehearsal import Facts, Passes, Place, Rehearsal
from .turns import LoopTurns, Ran, Turn, refused

_UNKNOWN = "?"


class RowTurns:
    """Evaluates waves."""

    def __init__(
        self,
        turns: LoopTurns,
        passes: Passes,
        rehearsal: Rehearsal,
        facts: Facts,
        merged: MergedCalls,
        memory: LoopMemory,
    ) -> None:
        self._turns, self._passes, self._rehearsal, self._facts, self._merged = turns, passes, rehearsal, facts, merged
        self._memory = memory
        self._first: tuple[Tensor, Tensor] | None = None

    def remember(self, x: Tensor, m: Tensor) -> None:
        """The guided output of the first step, which no turn needs to find again."""
        self._first = x, m

    def look_at_networks(self, x: Tensor, merge: bool) -> Generator[Turn, Ran, None]:
        """Before the first wave: see that the networks are functions of their arguments, and how calls are merged.

        Found at the first wave instead, the same seed would not give the same bits as in later calls.
        x: the first state; calls from it and from states near it are compared. merge: whether waves have several rows.
        """
        draw = torch.Generator().manual_seed(0)
        for kind, places in self._facts.places.items():
            first = yield from self._call_at(places[0], x, kind)
            if first is None:  # a turn calls its network otherwise than in the rehearsal
                continue
            network: Any = first.network
            decides = kind, merge, parts_that_decide([network])
            reason = self._memory.checked.get(decides, _UNKNOWN)
            if reason is _UNKNOWN:
                calls = [first]
                foreign = foreign_code([network]) is not None
                # the same call in other steps: those of other guidance branches differ in their conditioning
                alike = [place for place in places if place.number == places[0].number]
                for place in places[1:] if foreign else (alike[-1], alike[len(alike) // 2]):
                    state = x + x.std() * torch.randn(x.shape, generator=draw, dtype=torch.float32, device="cpu").to(x)
                    call = yield from self._call_at(place, state, kind)
                    calls += [] if call is None else [call]
                if merge or distributed.current() is not None:
                    self._merged.learn([(first, other) for other in (calls[-1], calls[len(calls) // 2])])
                reason = check_answers([partial(self._alone, call) for call in calls], network)
                self._memory.checked[decides] = reason
            if reason is not None:
                raise UnsupportedPipeline(f"{reason[:1].upper()}{reason[1:]}. Run this call on the original pipeline.")

    def _call_at(self, place: Place, state: Tensor, kind: Hashable) -> Generator[Turn, Ran, Call | None]:
        """The network call at a place, in a turn from this state."""
        ran = yield from self._passes.turn(Turn(place.step, state))
        found = ran.calls[place.number] if place.number < len(ran.calls) else None
        return found if found is not None and found.kind == kind else None

    def _alone(self, call: Call) -> Any:
        cancellation.wave(1)
        self._merged.search_calls += 1
        return self._merged.alone(call)

    def why_alone(self) -> list[str]:
        """Why network calls of the loop are made row by row, as clauses; nothing if all are merged."""
        return self._merged.reasons(self._facts.places)

    def evaluate(self, states: Tensor, steps: Sequence[int]) -> Generator[Turn, Ran, Tensor]:
        """The guided outputs of rows, [rows, batch, ...], at these steps from these states."""
        outputs: list[Tensor | None] = [self._known(x, step) for x, step in zip(states, steps, strict=True)]
        # SRDS may ask for a state twice in a wave, for the jump and for the fine step
        same = [self._first_of(number, states, steps) for number in range(len(steps))]
        numbers = [number for number, output in enumerate(outputs) if output is None and same[number] == number]
        if len(numbers) == 1 and not self._ranks_share_a_row():
            (number,) = numbers
            ran = yield from self._passes.checked(Turn(steps[number], states[number], live=True))
            outputs[number] = distributed.of_first(ran.m)
        elif numbers:
            found = yield from self._together([Turn(steps[number], states[number]) for number in numbers])
            for number, m in zip(numbers, found, strict=True):
                outputs[number] = m
        outputs = [outputs[number] if output is None else output for number, output in zip(same, outputs, strict=True)]
        return torch.stack([output for output in outputs if output is not None])

    def _ranks_share_a_row(self) -> bool:
        """Whether the network calls of a single row are work for several ranks, such as its guidance branches."""
        if distributed.size() == 1:
            return False
        at_once = any(sum(not each for each in needs) > 1 for needs in self._facts.needs.values())
        return at_once or any(map(self._merged.divides, self._facts.places))

    @staticmethod
    def _first_of(number: int, states: Tensor, steps: Sequence[int]) -> int:
        """The first row that is at the same point as a row."""
        earlier = (each for each in range(number) if steps[each] == steps[number])
        return next((each for each in earlier if torch.equal(states[each], states[number])), number)

    def _known(self, x: Tensor, step: int) -> Tensor | None:
        if step != 0 or self._first is None:
            return None
        start, m = self._first
        if torch.equal(x, start):
            return m
        if self._facts.replaces:
            raise refused("it replaces a part of every state but the first, and another first state was asked for")
        return None

    def _together(self, turns: Sequence[Turn]) -> Generator[Turn, Ran, list[Tensor]]:
        copies = self._turns.copies
        calls: list[Sequence[Call]] = []
        answers: list[dict[int, Any]] = [{} for _ in turns]
        needs = []
        for turn in turns:
            ran = yield from self._passes.checked(turn)
            if (kinds := ran.kinds) not in self._facts.needs:
                digests = Digests().of(ran)
                self._facts.needs[kinds] = yield from self._rehearsal.needs(turn, digests)
            calls.append(ran.calls)
            needs.append(self._facts.needs[kinds])
        while True:
            ready = [
                [number for number in range(len(calls[row])) if self._is_ready(number, needs[row], answers[row])]
                for row in range(len(turns))
            ]
            numbers = sorted({each for of_row in ready for each in of_row})
            rows = {number: [row for row in range(len(turns)) if number in ready[row]] for number in numbers}
            found = self._merged.together([[calls[row][number] for row in of] for number, of in rows.items()])
            for (number, of), outputs in zip(rows.items(), found, strict=True):
                for row, output in zip(of, outputs, strict=True):
                    answers[row][number] = output
            if all(len(answers[row]) == len(calls[row]) for row in range(len(turns))):
                break
            for row, turn in enumerate(turns):
                if len(answers[row]) < len(calls[row]):
                    ran = yield from self._passes.checked(Turn(turn.step, turn.x, answers[row]))
                    calls[row] = self._unchanged(turn.step, calls[row], ran, answers[row])
        guided = []
        for row, turn in enumerate(turns):
            ran = yield from self._passes.checked(Turn(turn.step, turn.x, answers[row]))
            self._unchanged(turn.step, calls[row], ran, answers[row])
            guided.append(ran.m.clone())
            answers[row].clear()
        if self._turns.copies != copies:
            raise refused("it writes into the arguments of network calls of earlier turns")
        return guided

    @staticmethod
    def _is_ready(number: int, needs: Sequence[frozenset[int]], answers: dict[int, Any]) -> bool:
        return number not in answers and needs[number] <= answers.keys()

    @staticmethod
    def _unchanged(step: int, before: Sequence[Call], ran: Ran, answers: dict[int, Any]) -> Sequence[Call]:
        """The calls of a turn. Those that are answered must be what they were when they were made."""
        same = len(before) == len(ran.calls) and all(
            before[number].network is ran.calls[number].network and same_call(before[number], ran.calls[number])
            for number in answers
        )
        if not same:
            raise refused(f"the network calls of step {step} depend on what they return, in a way not seen before")
        return ran.calls

"""The rehearsal of a loop: whether its turns depend on nothing but their step, their state and the network's answers.

All turns are made in the loop's own order, on states of random numbers and with random numbers in the place of the
network's answers. Then they are made again, in another order. Each must ask the network the same, and make the
same of its answers, bit for bit. So momentum between steps, counters and random numbers drawn in the loop are found.

In the first pass the state that a turn departs from is compared with the one that it was handed: a difference is what
the loop itself does between two steps, see `constraint`.

No network is called, except for one call of each kind, to learn what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ... import clock
from ...engine.merging.rule import Call, same
from ...errors import UnsupportedPipeline
from ...sampling.recorded.roles import Inferred
from ...schedulers.private_draws import PrivateDraws
from ..module_state import ModuleState
from ..takeover.inferred import Inference
from .constraint import Arrival, Probes, arrival
from .digests import Digests
from .turns import Kinds, LoopTurns, Ran, Turn, refused

ORDER = "when the steps are made in another order"
# turns that are made so; a loop of few steps makes them several times
FEWEST_TURNS, FEW_TURNS = 16, 4

Needs = tuple[frozenset[int], ...]  # by call of a turn: the calls whose answers its arguments depend on


class Place(NamedTuple):
    """Where a network is called: in the turns of a step, and the number of the call there."""

    step: int
    number: int


Digest = tuple[Hashable, ...]  # of a turn, see `Digests`


@dataclass
class Facts:
    """What a rehearsal found out. It is valid for all calls of a kind, but for the arrivals.

    needs: by the kinds of a turn's calls. places: where network calls of a kind are made.
    replaces: the loop replaces a part of its state between two steps. copies: see `LoopTurns`.
    """

    needs: dict[Hashable, Needs] = field(default_factory=dict)
    places: dict[Hashable, list[Place]] = field(default_factory=dict)
    replaces: bool = False
    copies: bool = False
    turn_seconds: float = 0.0  # of the loop's own code
    takeover: Inferred | str = "its loop was not looked at"  # or why it is not taken over, a clause

    @property
    def why_turns(self) -> str | None:
        """Why the loop makes its own turns, a clause; None: it is taken over."""
        if isinstance(self.takeover, str):
            return self.takeover
        return "it writes into its own tensors" if self.copies else None


@dataclass
class _Pass:
    """What the turns of all steps did.

    digests: by step. turns: steps by the kinds of their turns' calls. arrived: by step, the states that turns departed
    from, where these are not what they were handed.
    """

    digests: dict[int, Digest] = field(default_factory=dict)
    turns: dict[Kinds, list[int]] = field(default_factory=dict)
    arrived: dict[int, Tensor] = field(default_factory=dict)


class StateChanged(UnsupportedPipeline):
    """What is known of the loop is not true of this call."""


class Passes:
    """Makes turns one after another.

    If the loop changes its state after a step, by the number of that step, then each turn must follow the one of the
    step before it; where it does not, that turn is made for the sake of the order alone.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.ordered = False
        self.arrivals: list[Arrival] = []  # by position, from 1; empty: the loop leaves its states as they are
        self.last = 0  # the step of the turn made last: the first one is made before there is a script

    def turn(self, turn: Turn) -> Generator[Turn, Ran, Ran]:
        before = (turn.step - 1) % self.steps
        if self.ordered and self.last != before:
            yield Turn(before, turn.x)
        self.last = turn.step
        return (yield turn)

    def checked(self, turn: Turn) -> Generator[Turn, Ran, Ran]:
        """Make a turn that must depart from the state that it was handed, but for what the loop is known to replace.

        Whether it replaces anything is remembered from an earlier call of the kind, but may depend on more, such as
        the contents of a mask.
        """
        ran = yield from self.turn(turn)
        arrived = turn.x if turn.step == 0 or not self.arrivals else self.arrivals[turn.step - 1].apply(turn.x)
        if not same(ran.x, arrived):
            raise StateChanged(str(refused("it changes its latents in another way than in earlier calls")))
        return ran


class Rehearsal:
    """Rehearses the loop of one call.

    x: the state of the first step. output: the shape of its output. generators: those of the caller that the loop may
    draw from.
    """

    def __init__(
        self,
        turns: LoopTurns,
        passes: Passes,
        x: Tensor,
        output: torch.Size,
        generators: Sequence[torch.Generator],
    ) -> None:
        self._turns, self._passes, self._probes, self._generators = turns, passes, Probes(x), generators
        self._output = output
        self._digests = Digests()
        self._look: Callable[[Ran], None] = lambda ran: None
        self.made = 0  # turns
        self.changes_networks = False  # the loop does, between network calls
        self._seconds = 0.0  # that they took

    def run(
        self, networks: ModuleState, inference: Inference, draws: PrivateDraws, *, again: bool
    ) -> Generator[Turn, Ran, tuple[Facts, list[Arrival]]]:
        """All passes; returns what they found.

        networks: what they held before the loop. draws: of the loop's code meanwhile. again: the loop was rehearsed
            with other arguments, or is one of `known_classes`.
        """

        changed = dict[str, None]()

        def look(call: Call) -> None:
            # not refused here: the loop may put the network back after the call
            if (part := networks.changed()) is not None:
                changed[part.partition(".")[0]] = None

        states, drawn = [each.get_state() for each in self._generators], draws.drawn
        self._turns.watch = look
        self._look = inference.look
        found = yield from self._in_order(0)
        for step, number in inference.to_repeat():
            inference.look((yield from self._turn(Turn(step, self.probe(step, 1), changed=number))))
        self._look = lambda ran: None
        self._turns.watch = lambda call: None
        self.changes_networks = bool(changed)
        if changed:
            raise refused(f"it changes the {' and the '.join(changed)} around single calls, by hooks or attributes")
        facts = Facts(replaces=bool(found.arrived), copies=self._turns.copies, takeover=inference.found())
        arrivals = []
        if facts.replaces:
            self._passes.ordered = True
            arrivals = yield from self._arrivals(found)
        for step in self._other_order(again):
            ran = yield from self._turn(Turn(step, self.probe(step)))
            self._compare(step, found.digests[step], self._digests.of(ran))
        for kinds, steps in found.turns.items():
            for number, kind in enumerate(kinds):
                facts.places.setdefault(kind, []).extend(Place(step, number) for step in sorted(steps))
            step = steps[0]
            facts.needs[kinds] = yield from self.needs(Turn(step, self.probe(step)), found.digests[step])
        same = (torch.equal(each.get_state(), state) for each, state in zip(self._generators, states, strict=True))
        if draws.drawn > drawn or not all(same):
            raise refused("it draws random numbers in its loop")
        facts.turn_seconds = self._seconds / self.made
        return facts, arrivals

    def arrivals(self) -> Generator[Turn, Ran, list[Arrival]]:
        """What the loop makes of its states in this call, of a kind that is known to replace a part of them."""
        self._passes.ordered = True
        return (yield from self._arrivals((yield from self._in_order(0))))

    def needs(self, turn: Turn, digests: Digest) -> Generator[Turn, Ran, Needs]:
        """The calls that each call of a turn depends on. digests: of the turn itself."""
        needs: list[set[int]] = [set() for _ in digests[:-1]]
        for changed in range(len(needs) - 1):
            ran = yield from self._turn(Turn(turn.step, turn.x, turn.answers, changed=changed))
            found = self._digests.of(ran)
            if len(found) != len(digests):
                raise refused(f"the number of its network calls at step {turn.step} depends on what they return")
            for number in range(changed + 1, len(needs)):
                if found[number] != digests[number]:
                    needs[number].add(changed)
        return tuple(map(frozenset, needs))

    @property
    def _order(self) -> list[int]:
        """In the loop's own order, from the second step; a state arrives at the end before the first step's turn."""
        return [*range(1, self._passes.steps), 0]

    def _other_order(self, again: bool) -> Iterator[int]:
        """All steps, each at least once and most of them in another order: no counter has so irregular a period.

        again: a few of them, as the loop had no counter before; momentum shows in each.
        """
        draw = torch.Generator().manual_seed(0)
        if again:
            yield from torch.randperm(self._passes.steps, generator=draw, device="cpu")[:FEW_TURNS].tolist()
            return
        for _ in range(-(-FEWEST_TURNS // self._passes.steps)):
            yield from torch.randperm(self._passes.steps, generator=draw, device="cpu").tolist()

    def probe(self, step: int, number: int = 0) -> Tensor:
        """The state of random numbers from which the turn of a step is made. number: of the pass."""
        return self._probes(2 * step + number)

    def _turn(self, turn: Turn) -> Generator[Turn, Ran, Ran]:
        started = clock.now()
        ran = yield from self._passes.turn(turn)
        self.made, self._seconds = self.made + 1, self._seconds + clock.now() - started
        return ran

    def _in_order(self, number: int) -> Generator[Turn, Ran, _Pass]:
        found = _Pass()
        for step in self._order:
            given = self.probe(step, number)
            ran = yield from self._turn(Turn(step, given))
            if ran.x.shape != given.shape or ran.m.shape != self._output:
                raise refused(f"at step {step} its latents have another shape than at the first step")
            found.digests[step] = self._digests.of(ran)
            self._look(ran)
            found.turns.setdefault(ran.kinds, []).append(step)
            if not same(ran.x, given):
                found.arrived[step] = ran.x.clone()
        return found

    def _arrivals(self, first: _Pass) -> Generator[Turn, Ran, list[Arrival]]:
        """By position of the grid, from 1 to the number of steps."""
        second = yield from self._in_order(1)

        def both(step: int, number: int, found: _Pass) -> tuple[Tensor, Tensor]:
            given = self.probe(step, number)
            return given, found.arrived.get(step, given)

        return [arrival(both(step, 0, first), both(step, 1, second)) for step in self._order]

    def _compare(self, step: int, first: Digest, again: Digest) -> None:
        if first == again:
            return
        what = "gives another result for the same network outputs"
        if first[:-1] != again[:-1]:
            what = "calls its network with other input"
        raise refused(
            f"step {step} {what} {ORDER}: the loop keeps something from step to step, such as momentum or a counter, "
            "or draws random numbers: if a setting causes this, switch it off"
        )

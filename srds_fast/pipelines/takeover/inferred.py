"""How a loop calls its networks, inferred from its turns: so a loop is taken over that nobody has read.

A rehearsal makes the turns of all steps, with random numbers in the place of states and answers. Where each network
call is given the state (times the scheduler's input scale) and otherwise what is the same in every step, or what the
step or an earlier answer decides, and where the guided output is a weighted sum of the networks' outputs, the loop's
Python adds nothing: the calls of its turns, repeated for rows, are the loop.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_structure, tree_unflatten

from ...engine.merging.rule import same
from ...sampling.recorded.roles import (
    Answer,
    ByStep,
    Column,
    Inferred,
    Joined,
    Pattern,
    PerSample,
    Role,
    Shared,
    State,
    Variant,
)
from ..lockstep.placeholders import Placeholders
from ..lockstep.turns import Kinds, Ran
from .calls import arguments_of, parts, parts_of

# by the dtype of the networks' outputs: bound on the relative residual of a weighted sum, and the digits of its weights
EXACT = {torch.float64: (1e-12, 12), torch.float32: (1e-5, 6), torch.float16: (4e-3, 3), torch.bfloat16: (3e-2, 2)}
# values of a Python number that make variants of a loop; where there are more, the rows of a wave are given a tensor
MOST_VALUES = 3
# of the tensors that the steps decide
MOST_BYTES = 1 << 28

Way = tuple[State, bool]  # how an argument may hold the state, and whether it is times the scheduler's input scale


class _NotTakenOver(Exception):
    """Why a loop cannot be taken over, a clause."""


@dataclass
class _Leaf:
    """What is known of one argument of a network call, or of a part of it."""

    first: Any
    ways: set[Way] | None = None  # in which it has been the state so far; None: it was not looked at
    rests: dict[Joined, Tensor | None] = field(default_factory=dict)  # what is joined to the state
    answers: set[Answer] | None = None  # parts of what earlier calls returned that it has been so far
    constant: bool = True
    numbers: dict[int, tuple[Any, float]] = field(default_factory=dict)  # by step, with their dtype
    tensors: dict[int, Any] = field(default_factory=dict)  # by step, if it is nothing of these

    def switches(self) -> dict[int, float]:
        """The values of a Python number, by step, if they make variants."""
        if self.constant or isinstance(self.first, Tensor) or not self.numbers:
            return {}
        values = {step: value for step, (_, value) in self.numbers.items()}
        few = len(set(values.values())) <= min(MOST_VALUES, len(values) - 1)
        return values if few else {}


@dataclass
class _Turns:
    """What is known of the steps whose turns make calls of the same kinds."""

    calls: list[list[_Leaf]]
    specs: list[Any]  # the structure of each call's arguments
    columns: list[tuple[int, int, int]]  # for each candidate of the guided sum: call, leaf of its output, branches
    weights: dict[int, Tensor] = field(default_factory=dict)  # by step, [all branches of all candidates]


class Inference:
    """Looks at the turns of a rehearsal, one after another, and says how the loop calls its networks.

    scale: the scheduler's input scale of each step. placeholders: the answers in the turns.
    """

    def __init__(self, scale: Sequence[float], placeholders: Placeholders) -> None:
        self._scale, self._placeholders = scale, placeholders
        self._turns: dict[Kinds, _Turns] = {}
        self._copies = self._batch = 0
        self._failed: str | None = None

    def look(self, ran: Ran) -> None:
        """Take a turn into account, in which answers were the usual placeholders, or one was a changed one."""
        if self._failed is None:
            try:
                self._look(ran)
            except _NotTakenOver as why:
                self._failed = str(why)

    def to_repeat(self) -> list[tuple[int, int]]:
        """Turns, by step and number of the call whose answer is to be another one, that must be looked at once more.

        Guidance may look like a weighted sum for one answer, and what the step decides may depend on the state.
        """
        if self._failed is not None:
            return []
        found: list[tuple[int, int]] = []
        for turns in self._turns.values():
            looked_at = {step for calls in turns.calls for leaf in calls if not leaf.constant for step in leaf.tensors}
            by_weights = {tuple(weights.tolist()): step for step, weights in reversed(turns.weights.items())}
            for step in sorted({*by_weights.values(), *looked_at}):
                found += [(step, number) for number in range(len(turns.calls) if step in by_weights.values() else 1)]
        return found

    def found(self) -> Inferred | str:
        """What is needed to take the loop over, or the reason why it makes its own turns, a clause."""
        if self._failed is not None:
            return self._failed
        try:
            ways = [
                leaf.ways for turns in self._turns.values() for leaves in turns.calls for leaf in leaves if leaf.ways
            ]
            scaled = set.intersection(*({scaled for _, scaled in each} for each in ways)) if ways else set()
            if not scaled:
                raise _NotTakenOver("its networks are not given the state, or are given it with different scales")
            times_scale = min(scaled)  # as it is, where both are the same
            variants = [
                each for kinds, turns in self._turns.items() for each in self._variants(kinds, turns, times_scale)
            ]
        except _NotTakenOver as why:
            return str(why)
        return Inferred(tuple(variants), times_scale, self._copies)

    def _look(self, ran: Ran) -> None:
        step, x = ran.turn.step, self._state_of(ran)
        if ran.m.shape != ran.x.shape:
            raise _NotTakenOver("its scheduler takes the size of its noise from the network")
        outputs = [
            self._placeholders.leaves_of(call, number, changed=ran.turn.changed == number)
            for number, call in enumerate(ran.calls)
        ]
        arguments = [parts_of(call) for call in ran.calls]
        kinds = ran.kinds
        turns = self._turns.get(kinds)
        if turns is None:
            columns = _columns(outputs, x)
            specs = [tree_structure(arguments_of(call)) for call in ran.calls]
            turns = self._turns[kinds] = _Turns([list(map(_Leaf, leaves)) for leaves in arguments], specs, columns)
        self._look_at_guidance(turns, outputs, ran, x)
        for number, (leaves, known) in enumerate(zip(arguments, turns.calls, strict=True)):
            for leaf, value in zip(known, leaves, strict=True):
                self._look_at(leaf, value, step, x, outputs[:number])

    def _state_of(self, ran: Ran) -> Tensor:
        """The state of a turn, without the copies that a loop keeps of it for its guidance branches (DiT)."""
        if not self._copies:
            self._copies = next(
                (count for count in range(len(ran.x), 1, -1) if is_copied(ran.x, count) and is_copied(ran.m, count)), 1
            )
        if not (is_copied(ran.x, self._copies) and is_copied(ran.m, self._copies)):
            raise _NotTakenOver("it keeps copies of its state in some steps only")
        self._batch = len(ran.x) // self._copies
        return ran.x[: self._batch]

    def _look_at(self, known: _Leaf, value: Any, step: int, x: Tensor, outputs: Sequence[Sequence[Any]]) -> None:
        constant = same(known.first, value)
        known.constant = known.constant and constant
        ways = set(self._ways(known, value, step, x))
        known.ways = ways if known.ways is None else known.ways & ways
        if known.ways:
            return
        answers = set(_answers(value, outputs))
        known.answers = answers if known.answers is None else known.answers & answers
        if known.answers:
            return
        if (number := _one_number(value)) is not None:
            if known.numbers.setdefault(step, number) != number:
                raise _NotTakenOver("a number among the arguments of its network depends on more than the step")
            return
        if isinstance(value, Tensor):
            kept = (
                known.first if constant else next((each for each in known.tensors.values() if same(each, value)), value)
            )
            if not same(known.tensors.setdefault(step, kept), kept):
                raise _NotTakenOver("an argument of its network depends on more than the step, and is not the state")
            if sum(each.nbytes for each in {id(each): each for each in known.tensors.values()}.values()) > MOST_BYTES:
                raise _NotTakenOver("an argument of its network is another large tensor in each step")
        elif not known.constant:
            raise _NotTakenOver("an argument of its network is neither the state, nor decided by the step")

    def _ways(self, known: _Leaf, value: Any, step: int, x: Tensor) -> Iterator[Way]:
        """The ways in which an argument is the state for each guidance branch."""
        if not isinstance(value, Tensor) or value.ndim != x.ndim or value.ndim < 2 or len(value) % len(x):
            return
        scale = self._scale[step]
        for joined, part, rest in parts(value, x):
            if joined is not None and not same(rest, known.rests.setdefault(joined, rest)):
                continue
            by_branch = part.reshape(-1, *x.shape)
            if all(torch.equal(each, x.to(each.dtype)) for each in by_branch):
                yield State(joined), False
            if bool(is_scaled(by_branch, x, scale)):
                yield State(joined), True

    def _look_at_guidance(self, turns: _Turns, outputs: Sequence[Sequence[Any]], ran: Ran, x: Tensor) -> None:
        step = ran.turn.step
        if not turns.columns:
            raise _NotTakenOver("the output of its network is not shaped as the state")
        branches = [each for call, leaf, count in turns.columns for each in cut(outputs[call][leaf], x).chunk(count)]
        weights = _weights(branches, ran.m[: len(x)])
        if not torch.equal(turns.weights.setdefault(step, weights), weights):
            raise _NotTakenOver("its guidance is not one weighted sum of its network's outputs")

    def _variants(self, kinds: Kinds, turns: _Turns, scaled: bool) -> Iterator[Variant]:
        switches = [values for leaves in turns.calls for leaf in leaves if (values := leaf.switches())]
        by_values: dict[Hashable, list[int]] = {}
        for step in sorted(turns.weights):
            by_values.setdefault(tuple(values[step] for values in switches), []).append(step)
        used, weights = self._guidance(turns)
        patterns = []
        for number, leaves in enumerate(turns.calls):
            lengths = {len(leaf.first) for leaf in leaves if leaf.ways}
            if len(lengths) != 1:
                raise _NotTakenOver("its network is not given the state, as it is or scaled, in one argument")
            length = lengths.pop()
            branches = length // self._batch
            if any(call == number and count != branches for call, _, count in turns.columns):
                raise _NotTakenOver("its network is given the state for other branches than it returns")
            roles = [self._role(leaf, length, sorted(turns.weights), scaled) for leaf in leaves]
            patterns.append(Pattern(tree_unflatten(roles, turns.specs[number]), branches, used.get(number)))
        for steps in by_values.values():
            yield Variant(kinds, tuple(steps), tuple(patterns), weights)

    def _guidance(self, turns: _Turns) -> tuple[dict[int, int], Tensor]:
        """The leaf of each call's output that guidance uses, and its weights, [N, branches]."""
        table = torch.stack([turns.weights[step] for step in sorted(turns.weights)])
        used: dict[int, int] = {}
        kept = []
        for (call, leaf, _), part in zip(
            turns.columns, table.split([each[2] for each in turns.columns], 1), strict=True
        ):
            if bool(part.any()):
                if call in used:
                    raise _NotTakenOver("its guidance is a sum of two tensors that one network call returns")
                used[call] = leaf
                kept.append(part)
        if not kept:
            raise _NotTakenOver("its guidance does not come from the outputs of its network")
        weights = table.new_zeros(len(self._scale), sum(part.shape[1] for part in kept))
        weights[sorted(turns.weights)] = torch.cat(kept, 1)
        return used, weights

    def _role(self, leaf: _Leaf, length: int, steps: Sequence[int], scaled: bool) -> Role:
        if leaf.ways:
            return min((state for state, times in leaf.ways if times == scaled), key=str)
        if leaf.answers:
            return min(leaf.answers, key=str)
        if leaf.constant or leaf.switches():
            own = isinstance(leaf.first, Tensor) and leaf.first.ndim > 0 and len(leaf.first) == length
            return PerSample() if own else Shared()
        if leaf.numbers:
            dtypes = {dtype for dtype, _ in leaf.numbers.values()}
            if set(leaf.numbers) != set(steps) or len(dtypes) != 1:
                raise _NotTakenOver("an argument of its network is a number in some steps only")
            other, (dtype,) = leaf.numbers[steps[0]][1], dtypes
            numbers = [leaf.numbers[step][1] if step in leaf.numbers else other for step in range(len(self._scale))]
            return Column(tuple(numbers), dtype if isinstance(dtype, torch.dtype) else None)
        if set(leaf.tensors) != set(steps) or any(
            each.ndim == 0 or len(each) != length for each in leaf.tensors.values()
        ):
            raise _NotTakenOver("an argument of its network is another tensor in each step, not one for each sample")
        first = {id(leaf.tensors[step]): step for step in reversed(steps)}
        return ByStep(tuple(first[id(leaf.tensors[s])] if s in leaf.tensors else s for s in range(len(self._scale))))


def is_scaled(by_branch: Tensor, x: Tensor, scale: float) -> Tensor:
    """Whether each of some tensors is the state times a scale, but for rounding."""
    close = 4 * torch.finfo(by_branch.dtype).eps if by_branch.is_floating_point() else 0.0
    return torch.isclose(by_branch.double(), scale * x.double(), rtol=close, atol=0).all()


def residual(branches: Sequence[Tensor], weights: Tensor, m: Tensor) -> Tensor:
    """How far a guided output is from a weighted sum, relative to its size."""
    off = whole = m.double()
    for weight, each in zip(weights.tolist(), branches, strict=True):
        off = off - weight * each.double()
    found: Tensor = off.norm() / whole.norm().clamp(min=1e-30)
    return found


def cut(output: Tensor, x: Tensor) -> Tensor:
    """An output without the predicted variance, or what a network returns for what was joined to the state."""
    return output.narrow(1, 0, x.shape[1]) if output.shape[1] > x.shape[1] else output


def _columns(outputs: Sequence[Sequence[Any]], x: Tensor) -> list[tuple[int, int, int]]:
    """The candidates of the guided sum: call, leaf of its output, branches."""

    def fits(leaf: Any) -> bool:
        if not isinstance(leaf, Tensor) or leaf.ndim != x.ndim or leaf.ndim < 2 or len(leaf) % len(x):
            return False
        return leaf.shape[1] >= x.shape[1] and leaf.shape[2:] == x.shape[2:]

    return [
        (call, number, len(leaf) // len(x))
        for call, leaves in enumerate(outputs)
        for number, leaf in enumerate(leaves)
        if fits(leaf)
    ]


def _answers(value: Any, outputs: Sequence[Sequence[Any]]) -> Iterator[Answer]:
    """The parts of earlier answers that an argument is."""
    for call, leaves in enumerate(outputs if isinstance(value, Tensor) else ()):
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.dtype == value.dtype and same(leaf, value):
                yield Answer(call, number)


def is_copied(x: Tensor, count: int) -> bool:
    """Whether a batch is so many copies of its first entries."""
    if count == 1 or len(x) % count:
        return count == 1
    first, *others = x.chunk(count)
    return all(torch.equal(first, each) for each in others)


def _one_number(value: Any) -> tuple[Any, float] | None:
    """A number, or a tensor of equal numbers, with its dtype; None: it is something else."""
    if isinstance(value, Tensor) and value.ndim < 2 and value.numel():
        first = value.reshape(-1)[0]
        return (value.dtype, first.item()) if bool((value == first).all()) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return type(value), value
    return None


def _weights(outputs: Sequence[Tensor], m: Tensor) -> Tensor:
    """The weights of a sum, [outputs], float64 on the CPU."""
    bound, digits = EXACT.get(outputs[0].dtype, EXACT[torch.float32])
    columns = torch.stack([each.flatten().double() for each in (*outputs, m)])
    products = (columns @ columns.T).cpu()  # one transfer to the host
    count = len(outputs)
    solution, singular = torch.linalg.solve_ex(products[:count, :count], products[:count, count])
    weights: Tensor = solution.round(decimals=digits)
    if int(singular) or not bool(residual(outputs, weights, m) <= bound):
        raise _NotTakenOver("its guidance is not one weighted sum of its network's outputs")
    return weights

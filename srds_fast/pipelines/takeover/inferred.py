"""How a loop calls its networks, inferred from its turns: so a loop is taken over that nobody has read.

A rehearsal makes the turns of all steps, with random numbers in the place of states and answers. Where each network
call is given the state (times the scheduler's input scale) and otherwise arguments that are the same in every step or
one number a step, and where the guided output is one weighted sum of the networks' outputs, the loop's Python adds
nothing: the calls of one turn, repeated for rows, are the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...sampling.rows import state_dtype
from ..lockstep.placeholders import Placeholders
from ..lockstep.turns import Ran
from ..merging.rule import Call, same
from ..networks import Joined, Network, NetworkCall, named_arguments
from .turn import RecordedTurn

# by the dtype of the networks' outputs: bound on the relative residual of a weighted sum, and the digits of its weights
EXACT = {torch.float64: (1e-12, 12), torch.float32: (1e-5, 6), torch.float16: (4e-3, 3), torch.bfloat16: (3e-2, 2)}


@dataclass(frozen=True)
class Inferred:
    """A loop that can be taken over. It is valid for all calls of a kind."""

    families: tuple[Network, ...]  # by call of a turn
    weights: Tensor  # [branches], of the guided sum
    scaled: bool  # whether the networks are given the state times the scheduler's input scale

    def turn(self, ran: Ran) -> RecordedTurn:
        """A turn of the loop as a session repeats it for rows."""
        recorded = RecordedTurn({}, None)
        recorded.calls = [_repeatable(*each, ran.x) for each in zip(ran.calls, self.families, strict=True)]
        recorded.weights = self.weights.to(ran.x.device, state_dtype(ran.x.dtype))
        recorded.scaled = self.scaled
        return recorded


class _NotTakenOver(Exception):
    """Why a loop cannot be taken over, a clause."""


class _State(NamedTuple):
    """A way in which an argument may hold the state."""

    joined: Joined | None  # where it has a part that is always the same; None: it is the state alone
    scaled: bool  # it is times the scheduler's input scale


@dataclass
class _Argument:
    """What is known of one argument of a network call."""

    first: Any
    states: set[_State] | None = None  # ways in which it has been the state so far; None: it was not looked at
    rests: dict[Joined, Tensor | None] = field(default_factory=dict)  # what is joined to the state
    constant: bool = True
    numbers: dict[int, Any] = field(default_factory=dict)  # by step


class Inference:
    """Looks at the turns of a rehearsal, one after another, and says how the loop calls its networks.

    scale: the scheduler's input scale of each step. placeholders: the answers in the turns.
    """

    def __init__(self, scale: Sequence[float], placeholders: Placeholders) -> None:
        self._scale, self._placeholders = scale, placeholders
        self._arguments: list[dict[str, _Argument]] = []
        self._networks: list[Any] = []
        self._weights: Tensor | None = None
        self._batch = 0
        self._branches: list[int] = []
        self._failed: str | None = None

    def look(self, ran: Ran) -> None:
        """Take a turn into account, in which answers were the usual placeholders, or one was a changed one."""
        if self._failed is None:
            try:
                self._look(ran)
            except _NotTakenOver as why:
                self._failed = str(why)

    def found(self) -> Inferred | str:
        """What is needed to take the loop over, or the reason why it makes its own turns, a clause."""
        if self._failed is not None:
            return self._failed
        assert self._weights is not None
        try:
            states = [self._state_of(arguments) for arguments in self._arguments]
            scaled = set.intersection(*({way.scaled for way in ways} for _, ways in states))
            if not scaled:
                raise _NotTakenOver("some of its networks are given the state as it is, and some times a scale")
            times_scale = min(scaled)  # as it is, where both are the same
            families = tuple(
                self._family(arguments, name, {way.joined for way in ways if way.scaled == times_scale}, branches)
                for arguments, (name, ways), branches in zip(self._arguments, states, self._branches, strict=True)
            )
        except _NotTakenOver as why:
            return str(why)
        return Inferred(families, self._weights, times_scale)

    def agrees_with(self, known: Inferred) -> bool:
        """Whether some turns of another call of the kind do what is known of it."""
        if self._failed is not None or self._weights is None or not torch.equal(self._weights, known.weights):
            return False
        calls = zip(self._arguments, known.families, strict=True)
        return all(_agree(arguments, family, known.scaled) for arguments, family in calls)

    def _look(self, ran: Ran) -> None:
        step, x = ran.turn.step, ran.x
        if not self._networks:
            self._networks, self._batch = [call.network for call in ran.calls], len(x)
        if [call.network for call in ran.calls] != self._networks:
            raise _NotTakenOver("its steps call different networks")
        self._look_at_guidance(ran)
        for number, call in enumerate(ran.calls):
            arguments, _ = _named(call)
            if number == len(self._arguments):
                self._arguments.append({name: _Argument(value) for name, value in arguments.items()})
            known = self._arguments[number]
            if known.keys() != arguments.keys():
                raise _NotTakenOver("its steps give their network different arguments")
            for name, value in arguments.items():
                self._look_at(known[name], value, step, x)

    def _look_at(self, known: _Argument, value: Any, step: int, x: Tensor) -> None:
        known.constant = known.constant and _same_tree(known.first, value)
        found = set(self._ways(known, value, step, x))
        known.states = found if known.states is None else known.states & found
        if known.states:
            return
        if (number := _one_number(value)) is not None:
            known.numbers[step] = number
        elif not known.constant:
            raise _NotTakenOver("an argument of its network is neither the state, nor a number, nor always the same")

    def _ways(self, known: _Argument, value: Any, step: int, x: Tensor) -> Iterator[_State]:
        """The ways in which an argument is the state for each guidance branch."""
        if not isinstance(value, Tensor) or value.ndim != x.ndim or value.ndim < 2 or len(value) % len(x):
            return
        scale = self._scale[step]
        for joined, part, rest in _parts(value, x):
            if joined is not None and not same(rest, known.rests.setdefault(joined, rest)):
                continue
            parts = part.reshape(-1, *x.shape)
            if all(torch.equal(each, x.to(each.dtype)) for each in parts):
                yield _State(joined, scaled=False)
            close = 4 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
            if bool(torch.isclose(parts.double(), scale * x.double(), rtol=close, atol=0).all()):
                yield _State(joined, scaled=True)

    def _look_at_guidance(self, ran: Ran) -> None:
        outputs: list[Tensor] = []
        branches: list[int] = []
        for number, call in enumerate(ran.calls):
            output = self._output(call, number, ran)
            branches.append(len(output) // self._batch)
            outputs += output.chunk(branches[-1])
        if branches != (self._branches or branches):
            raise _NotTakenOver("its steps call their network for different branches")
        self._branches = branches
        weights = _weights(outputs, ran.m)
        if self._weights is None:
            self._weights = weights
        elif not torch.equal(self._weights, weights):
            raise _NotTakenOver("its guidance is not the same in every step, or not one weighted sum of its outputs")

    def _output(self, call: Call, number: int, ran: Ran) -> Tensor:
        leaves = tree_leaves(self._placeholders.of(call, number, changed=ran.turn.changed == number))
        if len(leaves) != 1 or not isinstance(leaves[0], Tensor):
            raise _NotTakenOver("a network of it returns more than one tensor")
        output, shape = leaves[0], list(ran.x.shape[1:])
        if output.ndim != ran.x.ndim or len(output) % self._batch:
            raise _NotTakenOver("the output of its network is not shaped as the state")
        other = [dim for dim, size in enumerate(output.shape[1:], start=1) if size != shape[dim - 1]]
        if other == [1] and output.shape[1] > shape[0]:  # also the predicted variance, or what was joined to the state
            return output.narrow(1, 0, shape[0])
        if other:
            raise _NotTakenOver("the output of its network is not shaped as the state")
        return output

    @staticmethod
    def _state_of(arguments: Mapping[str, _Argument]) -> tuple[str, set[_State]]:
        """The argument that holds the state, and in which ways."""
        found = [(name, each.states) for name, each in arguments.items() if each.states]
        if len(found) != 1:
            raise _NotTakenOver("its network is not given the state, as it is or scaled, in one argument")
        return found[0]

    def _family(
        self, arguments: Mapping[str, _Argument], state_name: str, joined: set[Joined | None], branches: int
    ) -> Network:
        state, length = arguments[state_name].first, branches * self._batch
        if len(state) != length:
            raise _NotTakenOver("its network is given the state for other branches than it returns")
        others = {name: each for name, each in arguments.items() if name != state_name}
        columns = {name: _column(each, len(self._scale)) for name, each in others.items() if not each.constant}
        constant = {name: tree_leaves(each.first) for name, each in others.items() if each.constant}
        tensors = {name: [leaf for leaf in leaves if isinstance(leaf, Tensor)] for name, leaves in constant.items()}
        per_sample = {
            name for name, each in tensors.items() if each and all(leaf.ndim and len(leaf) == length for leaf in each)
        }
        for name in tensors.keys() - per_sample:
            if any(leaf.ndim and len(leaf) == length for leaf in tensors[name]):
                raise _NotTakenOver(f"its argument {name} holds tensors for the samples and others")
        return Network(
            state_name,
            frozenset(per_sample),
            shared=frozenset(constant.keys() - per_sample),
            columns=columns,
            joined=min(joined, key=str),
        )


def _agree(arguments: Mapping[str, _Argument], family: Network, scaled: bool) -> bool:
    for name, argument in arguments.items():
        if name == family.state:
            if _State(family.joined, scaled) not in (argument.states or ()):
                return False
        elif name in family.columns:
            column = family.columns[name]
            if any(number != column[step].item() for step, (_, number) in argument.numbers.items()):
                return False
        elif not argument.constant:
            return False
    return True


def _repeatable(call: Call, family: Network, x: Tensor) -> NetworkCall:
    """The call with what is joined to the state apart."""
    arguments, positional = _named(call)
    found = NetworkCall(call.network, family, arguments, positional)  # type: ignore[arg-type]
    if family.joined is not None:
        parts = {joined: (part, rest) for joined, part, rest in _parts(found.states, x)}
        arguments[family.state], found.rest = parts[family.joined]
    return found


def _parts(value: Tensor, x: Tensor) -> Iterator[tuple[Joined | None, Tensor, Tensor | None]]:
    """Parts of an argument that may be the state, and what is joined to each."""
    other = [dim for dim in range(1, x.ndim) if value.shape[dim] != x.shape[dim]]
    if not other:
        yield None, value, None
    if len(other) == 1 and value.shape[other[0]] > x.shape[other[0]]:
        (dim,) = other
        size, more = x.shape[dim], value.shape[dim] - x.shape[dim]
        yield Joined(dim, state_first=True), value.narrow(dim, 0, size), value.narrow(dim, size, more)
        yield Joined(dim, state_first=False), value.narrow(dim, more, size), value.narrow(dim, 0, more)


def _named(call: Call) -> tuple[dict[str, Any], int]:
    """The arguments of a call by name, and how many were given by position."""
    arguments = named_arguments(call.network, call.args, call.kwargs)
    # loops may reuse a dictionary with other options for their next call
    copied = {name: dict(value) if type(value) is dict else value for name, value in arguments.items()}
    return copied, len(call.args)


def _same_tree(one: Any, other: Any) -> bool:
    first, second = tree_leaves(one), tree_leaves(other)
    return len(first) == len(second) and all(map(same, first, second))


def _one_number(value: Any) -> tuple[Any, float] | None:
    """A number, or a tensor of equal numbers, with its dtype; None: it is something else."""
    if isinstance(value, Tensor) and value.ndim < 2 and value.numel():
        first = value.reshape(-1)[0]
        return (value.dtype, first.item()) if bool((value == first).all()) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return type(value), value
    return None


def _column(argument: _Argument, num_steps: int) -> Tensor:
    """The numbers of all steps, [N]."""
    dtypes = {dtype for dtype, _ in argument.numbers.values()}
    if len(argument.numbers) != num_steps or len(dtypes) != 1:
        raise _NotTakenOver("an argument of its network is a number in some steps only")
    (dtype,) = dtypes
    numbers = [argument.numbers[step][1] for step in range(num_steps)]
    return torch.tensor(numbers, dtype=dtype if isinstance(dtype, torch.dtype) else None)


def _weights(outputs: Sequence[Tensor], m: Tensor) -> Tensor:
    """The weights of a sum, [outputs], float64 on the CPU."""
    residual_bound, digits = EXACT.get(outputs[0].dtype, EXACT[torch.float32])
    columns = torch.stack([each.flatten().double() for each in (*outputs, m)])
    products = (columns @ columns.T).cpu()  # one transfer to the host
    count = len(outputs)
    weights: Tensor = torch.linalg.solve(products[:count, :count], products[:count, count]).round(decimals=digits)
    residual = columns[count] - weights.to(columns) @ columns[:count]
    if float(residual.norm()) > residual_bound * float(columns[count].norm()):
        raise _NotTakenOver("its guidance is not one weighted sum of its network's outputs")
    return weights

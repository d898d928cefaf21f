"""The calls of turns, repeated for the rows of every wave: each row with the timestep and conditioning of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ... import telemetry
from ...engine import cancellation
from ...engine.distributed import call as distributed
from ...errors import InvalidArgument
from ...solvers.contract import Evaluate
from ...words import counted
from ..rows import PerState, TiledConditioning
from .calls import Calls, NetworkCall
from .roles import Answer, ByStep, Column, PerSample, State

Around = Callable[[], AbstractContextManager[None]]  # makes the context in which the calls of a wave are made
Replacements = Mapping[nn.Module, Callable[..., Any]]  # maps a network to the callable to use instead


class VariantRows:
    """Makes the calls of a variant. positions: of the rows of each wave. state: starting noise, [batch, ...]."""

    def __init__(
        self, of: Calls, positions: Sequence[tuple[int, ...]], state: Tensor, replacements: Replacements
    ) -> None:
        self.of, self._num_samples = of, len(state)
        self._replacements, self._device = replacements, state.device
        self._per_state = PerState(positions, state.device)
        self._peak_rows = max(map(len, positions), default=1)
        self._columns: dict[Column, Tensor] = {}
        self._tiled: dict[tuple[int, int], TiledConditioning] = {}
        self._numbers = {call: number for number, call in enumerate(of.calls)}
        self._chains = chains_of(of.calls)

    def outputs(self, wave: Evaluate) -> list[Tensor]:
        """What guidance makes a sum of, for each call that it uses: [branches * rows, samples, ...]."""
        shared = distributed.dividing()
        if shared is None or self._chains is None:
            found = self._outputs(self.of.calls, wave, None)
        else:
            chains, inner = self._chains, wave.x.shape[2:]
            entries = len(wave.positions) * len(wave.samples)

            def run(number: int, part: slice) -> Tensor:
                (m,) = self._outputs(chains[number], wave, part)
                return m

            lengths = [entries * chain[0].pattern.branches for chain in chains]
            found = shared.outputs(lengths, inner, wave.x.device, run)
        return [m.unflatten(0, (-1, len(wave.samples))) for m in found]

    def _outputs(self, calls: Sequence[NetworkCall], wave: Evaluate, part: slice | None) -> list[Tensor]:
        """The same for some calls, which use no answers of others. part: of their entries; None: all.

        [part of branches * rows * samples, ...] each.
        """
        answers: dict[int, list[Any]] = {}
        found = []
        for call in calls:
            if answers:  # further calls of a wave
                cancellation.look_within()
            output = self._made(call, wave, answers, part)
            leaves = [output] if isinstance(output, Tensor) else tree_leaves(output)
            answers[self._numbers[call]] = leaves
            if call.pattern.output is not None:
                m = _checked(leaves, call, wave, part)
                # the other channels are the predicted variance
                found.append(m.narrow(1, 0, wave.x.shape[2]) if m.shape[1] > wave.x.shape[2] else m)
        return found

    def guided(self, wave: Evaluate, dtype: torch.dtype) -> Tensor:
        """The guided sums, by the weights of each row's step, [rows, samples, ...]."""
        found = self.outputs(wave)
        m = (found[0] if len(found) == 1 else torch.cat(found)).to(dtype)
        branches = m.unflatten(0, (-1, len(wave.positions)))
        weights = self._per_state.of(self.of.weights, wave).T  # [branches, rows * samples]
        by_branch = weights.reshape(*branches.shape[:3], *[1] * (branches.ndim - 3))
        # see `network_input.guided`
        first = branches[0]
        guided: Tensor = by_branch.sum(0) * first
        return guided.add_((by_branch[1:] * (branches[1:] - first)).sum(0)) if len(branches) > 1 else guided

    def prepare(self, *, guided: bool) -> None:
        """Look up now what waves of the whole batch would look up later. guided: with `guided`."""
        for call in self.of.calls:
            for column in call.pattern.columns():
                self._per_state.prepare(self._on_device(column), self._num_samples, call.pattern.branches)
        if guided:
            self._per_state.prepare(self.of.weights, self._num_samples)

    def constants(self) -> Iterator[Tensor]:
        return self._per_state.looked_up()

    def repeat(self, wave: Evaluate) -> None:
        for call in self.of.calls:
            for name, roles in call.pattern.roles.items():
                if name in call.moving:
                    self._repeat(roles, call.moving[name], wave, call.pattern.branches)

    def forget(self) -> None:
        self._tiled.clear()

    def _made(self, call: NetworkCall, wave: Evaluate, answers: Mapping[int, Sequence[Any]], part: slice | None) -> Any:
        roles, arguments = call.pattern.roles, dict[Any, Any](call.fixed)
        for name, value in call.moving.items():
            arguments[name] = self._of_rows(roles[name], value, call, wave, answers, part)
        args = [arguments.pop(number) for number in range(len(arguments)) if number in roles]
        return self._replacements.get(call.network, call.network)(*args, **arguments)

    def _of_rows(
        self,
        role: Any,
        value: Any,
        call: NetworkCall,
        wave: Evaluate,
        answers: Mapping[int, Sequence[Any]],
        part: slice | None,
    ) -> Any:
        """An argument, or a part of it, for the rows of a wave. part: of the entries; None: all."""
        if isinstance(role, dict):
            return {key: self._of_rows(each, value[key], call, wave, answers, part) for key, each in role.items()}
        if isinstance(role, list | tuple):
            found = [self._of_rows(each, value[key], call, wave, answers, part) for key, each in enumerate(role)]
            return type(role)(found)
        if isinstance(role, Answer):
            return answers[role.call][role.leaf]
        branches = call.pattern.branches
        if isinstance(role, State):
            entries = self._state(role, value, call, wave)
        elif isinstance(role, Column):
            entries = self._per_state.of(self._on_device(role), wave, branches)
        elif isinstance(role, PerSample):
            entries = self._tile(value, branches).of(len(wave.positions), wave.samples)
        elif isinstance(role, ByStep):
            entries = self._by_step(value, wave, branches)
        else:
            return value
        return entries if part is None else entries[part]

    def _state(self, role: State, rest: Tensor | None, call: NetworkCall, wave: Evaluate) -> Tensor:
        # a call may have fewer branches than the others of the loop
        size = call.pattern.branches * len(wave.positions)
        states = (wave.x if size == len(wave.x) else wave.x[:size]).flatten(0, 1)
        if states.dtype != call.dtype:
            states = states.to(call.dtype)
        if role.joined is None or rest is None:
            return states
        rest = self._tile(rest, call.pattern.branches).of(len(wave.positions), wave.samples)
        return torch.cat((states, rest) if role.joined.state_first else (rest, states), role.joined.dim)

    def _by_step(self, tensors: Sequence[Tensor], wave: Evaluate, branches: int) -> Tensor:
        if wave.shifts is not None:
            split = [each.unflatten(0, (branches, self._num_samples)) for each in tensors]
            entries = [
                torch.stack([split[step][:, sample] for step, sample in zip(row, wave.samples, strict=True)], 1)
                for row in wave.steps(len(tensors)).tolist()
            ]
            return torch.stack(entries, 1).flatten(0, 2)
        rows = torch.stack([tensors[step].unflatten(0, (branches, self._num_samples)) for step in wave.positions], 1)
        if len(wave.samples) < self._num_samples:
            rows = torch.stack([rows[:, :, sample] for sample in wave.samples], 2)
        return rows.flatten(0, 2)

    def _tile(self, tensor: Tensor, branches: int) -> TiledConditioning:
        key = id(tensor), branches  # what is tiled is kept, and its id with it
        if key not in self._tiled:
            self._tiled[key] = TiledConditioning(tensor, self._num_samples, branches, self._peak_rows)
        return self._tiled[key]

    def _repeat(self, role: Any, value: Any, wave: Evaluate, branches: int) -> None:
        if isinstance(role, PerSample) or (isinstance(role, State) and value is not None):
            self._tile(value, branches).of(len(wave.positions), wave.samples)
        elif isinstance(role, dict | list | tuple):
            for key in role if isinstance(role, dict) else range(len(role)):
                self._repeat(role[key], value[key], wave, branches)

    def _on_device(self, column: Column) -> Tensor:
        """A column, always as the same tensor."""
        found = self._columns.get(column)
        if found is None:
            found = self._columns[column] = column.tensor.to(self._device)
        return found


class Repeated:
    """Repeats the calls of turns for the rows of a wave, inside `around()`. See `engine.eager.Evaluator`.

    guide: the dtype of the guided sums, where the evaluator makes them; None: the solver does.
    """

    def __init__(
        self,
        variants: Sequence[Calls],
        positions: Sequence[tuple[int, ...]],
        state: Tensor,
        replacements: Replacements,
        guide: torch.dtype | None,
        around: Around = nullcontext,
    ) -> None:
        self._guide, self._around = guide, around
        # by variant, its rows in each wave
        self._rows = [[_rows_of(each, wave) for wave in positions] for each in variants] if len(variants) > 1 else []
        of_variants: list[Sequence[tuple[int, ...]]] = [
            [tuple(wave[row] for row in rows) for wave, rows in zip(positions, of, strict=True)] for of in self._rows
        ]
        self._variants = [
            VariantRows(each, own, state, replacements)
            for each, own in zip(variants, of_variants or [positions], strict=True)
        ]

    def __call__(self, wave: Evaluate) -> Tensor:
        """The output at a wave: [rows, samples, ...], guided, or branch by branch, [branches * rows, samples, ...]."""
        with telemetry.span("network", "network", len(wave.positions)), self._around():
            if self._guide is None:
                found = self._variants[0].outputs(wave)
                return found[0] if len(found) == 1 else torch.cat(found)
            if len(self._variants) == 1:
                return self._variants[0].guided(wave, self._guide)
            by_row: dict[int, Tensor] = {}
            for variant, of in zip(self._variants, self._rows, strict=True):
                if rows := _first(of[wave.number], wave):
                    if by_row:
                        cancellation.look_within()
                    by_row |= dict(zip(rows, variant.guided(_part(wave, rows), self._guide), strict=True))
            return torch.stack([by_row[row] for row in range(len(wave.positions))])

    def prepare(self) -> None:
        for each in self._variants:
            each.prepare(guided=self._guide is not None)

    def constants(self) -> Iterable[Tensor]:
        return (tensor for each in self._variants for tensor in each.constants())

    def repeat(self, wave: Evaluate) -> None:
        if len(self._variants) == 1:
            self._variants[0].repeat(wave)
        for variant, of in zip(self._variants, self._rows, strict=False):
            if rows := _first(of[wave.number], wave):
                variant.repeat(_part(wave, rows))

    def forget(self) -> None:
        for each in self._variants:
            each.forget()


def chains_of(calls: Sequence[NetworkCall]) -> list[list[NetworkCall]] | None:
    """Calls that use no answers of others, with those that use theirs, so that several ranks can share their entries.

    None: they cannot, as a chain has calls with different numbers of branches, or not one output for guidance.
    """
    chain_of: dict[int, list[int]] = {}
    for number, call in enumerate(calls):
        needs = {role.call for role in call.pattern.leaves if isinstance(role, Answer)}
        joined = sorted({number, *(each for need in needs for each in chain_of[need])})
        chain_of |= dict.fromkeys(joined, joined)
    chains = [[calls[number] for number in chain] for chain in dict.fromkeys(map(tuple, chain_of.values()))]
    for chain in chains:
        outputs = [call for call in chain if call.pattern.output is not None]
        if len(outputs) != 1 or len({call.pattern.branches for call in chain}) > 1:
            return None
    # in the order of their outputs, as the weights of guidance are
    return sorted(chains, key=lambda chain: max(calls.index(call) for call in chain if call.pattern.output is not None))


def _checked(leaves: Sequence[Any], call: NetworkCall, wave: Evaluate, part: slice | None) -> Tensor:
    """The output that guidance uses; InvalidArgument if it is none for the rows of the wave, as it was before."""
    number = call.pattern.output
    assert number is not None
    m = leaves[number] if number < len(leaves) else None
    inner, rows = wave.x.shape[2:], call.pattern.branches * len(wave.positions) * len(wave.samples)
    if part is not None:
        rows = part.stop - part.start
    # it may have more channels: those of a predicted variance
    if (
        isinstance(m, Tensor)
        and m.is_floating_point()
        and m.ndim == len(inner) + 1
        and len(m) == rows
        and m.shape[1] >= inner[0]
        and m.shape[2:] == inner[1:]
    ):
        return m
    found = f"{m.dtype}, shape {tuple(m.shape)}" if isinstance(m, Tensor) else type(m).__name__
    raise InvalidArgument(
        f"The network {type(call.network).__name__} returned {found} for {counted(rows, 'row')}, each of a state of "
        f"shape {tuple(inner)}. It must return floating-point predictions of that shape, as it did in the first call "
        "of its kind. Look at hooks on it."
    )


def _rows_of(calls: Calls, positions: tuple[int, ...]) -> list[int]:
    """The rows at steps of a variant."""
    return [row for row, step in enumerate(positions) if step in calls.variant.steps]


def _first(rows: Sequence[int], wave: Evaluate) -> Sequence[int]:
    """Those of these rows of the program that a wave has."""
    return [row for row in rows if row < len(wave.positions)]


def _part(wave: Evaluate, rows: Sequence[int]) -> Evaluate:
    """These rows of a wave."""
    if len(rows) == len(wave.positions):
        return wave
    by_branch = wave.x.unflatten(0, (-1, len(wave.positions)))
    x = torch.stack([by_branch[:, row] for row in rows], 1).flatten(0, 1)
    return Evaluate(x, tuple(wave.positions[row] for row in rows), wave.samples, wave.number)

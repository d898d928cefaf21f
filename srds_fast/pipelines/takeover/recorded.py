"""The recorded network calls of one turn of a pipeline's loop, repeated for the rows of every wave."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ... import telemetry
from ...solvers.contract import Evaluate
from ..network_rows import RowInputs
from ..networks import NetworkCall


@dataclass(frozen=True)
class Residuals:
    """A placeholder, in the recorded turn, for the "down" or the "mid" part of a ControlNet's output."""

    call: int
    part: str


Around = Callable[[], AbstractContextManager[None]]  # makes the context in which the calls of a wave are made
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, Residuals)


class Repeated:
    """Repeats the recorded calls of a turn for the rows of a wave, inside `around()`. See `engine.eager.Evaluator`."""

    def __init__(self, calls: Sequence[NetworkCall], rows: RowInputs, around: Around = nullcontext) -> None:
        self._calls, self._rows, self._around = calls, rows, around

    def __call__(self, wave: Evaluate) -> Tensor:
        """The network's output at a wave, branch by branch, [branches * rows, samples, ...]."""
        outputs = []
        residuals: dict[Residuals, Any] = {}
        with telemetry.span("network", "network", len(wave.positions)), self._around():
            for number, recorded in enumerate(self._calls):
                call = self._at(recorded, wave)
                for name, value in call.arguments.items():
                    if isinstance(value, Residuals):
                        call.arguments[name] = residuals[value]
                output = self._rows.call(wave, call)
                if call.family.gives_residuals:
                    residuals[Residuals(number, "down")], residuals[Residuals(number, "mid")] = output
                    continue
                m = _tensor_of(output)
                channels, size = call.family.channels, call.states.shape[call.family.channels]
                if m.shape[channels] > size:  # the extra channels are the predicted variance: drop them
                    m = m.narrow(channels, 0, size)
                outputs.append(m.unflatten(0, (-1, len(wave.samples))))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def prepare(self) -> None:
        for call in self._calls:
            self._rows.prepare(call.family, call.states.dtype, len(call.states) // self._rows.num_samples)

    def constants(self) -> Iterator[Tensor]:
        return self._rows.constants()

    def repeat(self, wave: Evaluate) -> None:
        for recorded in self._calls:
            self._rows.arguments(wave, self._at(recorded, wave))

    def forget(self) -> None:
        self._rows.forget()

    def _at(self, recorded: NetworkCall, wave: Evaluate) -> NetworkCall:
        """The call with the states of a wave; a call may have fewer branches than the others of the loop."""
        size = len(recorded.states) // self._rows.num_samples * len(wave.positions)
        states = (wave.x if size == len(wave.x) else wave.x[:size]).flatten(0, 1)
        arguments = {**recorded.arguments, recorded.family.state: states}
        return NetworkCall(recorded.network, recorded.family, arguments, recorded.positional, recorded.rest)


def _tensor_of(output: Any) -> Tensor:
    """The first tensor of a network's output."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = output.sample if hasattr(output, "sample") else tree_leaves(output)[0]
    return found


def kind_of(call: NetworkCall) -> Hashable:
    """Everything the cost of a call depends on: the network, and the shapes and dtypes of its arguments."""
    states = call.states
    shapes = tuple((path, value.shape, value.dtype) for path, value in _leaves_of([call]) if isinstance(value, Tensor))
    return weakref.ref(call.network), states.shape, states.dtype, states.device, shapes


def unscaled(call: NetworkCall) -> tuple[NetworkCall, float]:
    """The call without the factor that it applies to the scales of LoRA layers, and the factor."""
    arguments, factor = dict(call.arguments), 1.0
    for name in call.family.options:
        if "scale" in (arguments.get(name) or {}):
            factor = arguments[name]["scale"]
            arguments[name] = {**arguments[name], "scale": 1.0}
    return replace(call, arguments=arguments), factor


def tensors_of(calls: Iterable[NetworkCall]) -> dict[str, Tensor]:
    """The tensors among the arguments of calls, by the path where each first occurs."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, value in _leaves_of(calls):
        if isinstance(value, Tensor):
            found.setdefault(id(value), (path, value))
    return dict(found.values())


def with_tensors(
    calls: Iterable[NetworkCall], tensors: Mapping[str, Tensor], substitutes: Mapping[str, Tensor]
) -> list[NetworkCall]:
    """The calls with these tensors replaced by the substitutes of the same names."""
    by_id = {id(tensor): substitutes[name] for name, tensor in tensors.items()}

    def substitute(tensor: Tensor) -> Tensor:
        return by_id.get(id(tensor), tensor)

    def substituted(call: NetworkCall) -> NetworkCall:
        arguments, rest = tree_map_only(Tensor, substitute, (call.arguments, call.rest))
        return replace(call, arguments=arguments, rest=rest)

    return list(map(substituted, calls))


def signature_of(calls: Iterable[NetworkCall]) -> Hashable:
    """Everything in calls that a recording depends on, except for the contents of their tensors.

    A ValueError names an argument that is an object of unknown contents.
    """
    first: dict[int, str] = {}
    found: list[Hashable] = []
    for call in calls:
        columns = tuple((name, tuple(column.tolist())) for name, column in call.family.columns.items())
        found += (id(call.network), call.states.shape, call.states.dtype, columns)
    for path, value in _leaves_of(calls):
        if isinstance(value, Tensor):
            found.append((path, first.setdefault(id(value), path)))  # two arguments may be one tensor
        elif isinstance(value, _PLAIN):
            found.append((path, type(value), value))
        else:
            raise ValueError(f"{path.partition('.')[2]} is a {type(value).__name__}, an object of unknown contents")
    return tuple(found)


def _leaves_of(calls: Iterable[NetworkCall]) -> Iterator[tuple[str, Any]]:
    """The values in arguments by path, without the states and the timestep, which differ between rows."""
    for number, call in enumerate(calls):
        for name, value in call.arguments.items():
            if name not in (call.family.state, "timestep") and name not in call.family.columns:
                yield from _leaves(f"{number}.{name}", value)
        if call.rest is not None:
            yield f"{number}.joined to {call.family.state}", call.rest


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(f"{path}.{key}", each)
    elif isinstance(value, list | tuple):
        yield path, len(value)
        for index, each in enumerate(value):
            yield from _leaves(f"{path}.{index}", each)
    else:
        yield path, value

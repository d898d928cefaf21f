"""The network calls of one turn of a pipeline's loop, and their repetition for the rows of every wave."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import telemetry
from ...solvers.contract import Evaluate
from ..network_rows import RowInputs
from ..networks import Network


@dataclass(frozen=True)
class Residuals:
    """A placeholder, in the recorded turn, for one part of a ControlNet's output.

    Attributes:
        call: number of the ControlNet's call in the turn.
        part: "down" or "mid".
    """

    call: int
    part: str


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, Residuals)


@dataclass(frozen=True)
class RecordedCall:
    """One call of a network in the recorded turn.

    Attributes:
        names: of the network's parameters, in order.
        args, kwargs: from the pipeline.
        states: the argument that holds the states, [branches * samples, ...].
        probe: the output that the call returned; None for a ControlNet.
    """

    network: nn.Module
    family: Network
    names: list[str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: Tensor
    probe: Tensor | None

    def arguments(self) -> Iterator[tuple[str, Any]]:
        """The arguments by name, without the states and the timestep, which differ between rows."""
        for name, value in (*zip(self.names, self.args, strict=False), *self.kwargs.items()):
            if name != "timestep" and value is not self.states:
                yield name, value

    def changed(self, change: Callable[[Any], Any]) -> RecordedCall:
        """The same call, with `change` applied to all its tensors but the states."""
        args = tuple(arg if arg is self.states else _changed(arg, change) for arg in self.args)
        kwargs = {
            name: value if value is self.states else _changed(value, change) for name, value in self.kwargs.items()
        }
        return replace(self, args=args, kwargs=kwargs)

    @property
    def kind(self) -> Hashable:
        """Everything its cost depends on: the network, and the shapes and dtypes of its arguments."""
        given = [(path, value) for path, value in _leaves_of([self]) if isinstance(value, Tensor)]
        shapes = tuple((path, value.shape, value.dtype) for path, value in given)
        return weakref.ref(self.network), self.states.shape, self.states.dtype, self.states.device, shapes

    @property
    def scale(self) -> float:
        """The factor that the call applies to the scales of LoRA layers."""
        return next((value["scale"] for value in self._options() if "scale" in value), 1.0)

    def unscaled(self) -> RecordedCall:
        """The same call with a LoRA factor of 1."""
        options = [id(value) for value in self._options() if "scale" in value]

        def unscale(value: Any) -> Any:
            return {**value, "scale": 1.0} if id(value) in options else value

        return replace(
            self,
            args=tuple(map(unscale, self.args)),
            kwargs={name: unscale(value) for name, value in self.kwargs.items()},
        )

    def _options(self) -> Iterator[dict[str, Any]]:
        return (value for name, value in self.arguments() if name in self.family.options and value is not None)

    def at(self, states: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call, with other states."""
        args = tuple(states if arg is self.states else arg for arg in self.args)
        return args, {name: states if value is self.states else value for name, value in self.kwargs.items()}


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_changed(each, change) for each in value)
    return value


class Repeated:
    """Repeats the recorded calls for the rows of a wave.

    Args:
        calls: of the turn, in order.
        rows: makes their arguments.
        num_samples: samples in the whole batch.
        around: makes a context manager for the calls of a wave.
    """

    def __init__(
        self,
        calls: Sequence[RecordedCall],
        rows: RowInputs,
        num_samples: int,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._around = around
        self._calls = calls
        self._rows = rows
        self._num_samples = num_samples

    def __call__(self, wave: Evaluate) -> Tensor:
        """The network's output at a wave, branch by branch, [branches * rows, samples, ...]."""
        with telemetry.span("network", "network", len(wave.positions)), self._around():
            outputs = self._outputs(wave)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _outputs(self, wave: Evaluate) -> list[Tensor]:
        outputs = []
        residuals: dict[Residuals, Any] = {}
        rows, samples = len(wave.positions), len(wave.samples)
        for number, each in enumerate(self._calls):
            branches = len(each.states) // self._num_samples
            states = self._states(each, wave)
            args, kwargs = each.at(states)
            for name, value in kwargs.items():
                if isinstance(value, Residuals):
                    kwargs[name] = residuals[value]
            output = self._rows.call(wave, each.network, each.family, each.names, args, kwargs)
            if each.probe is None:
                residuals[Residuals(number, "down")], residuals[Residuals(number, "mid")] = output
                continue
            m: Tensor = output[0] if isinstance(output, tuple) else output.sample
            channels = each.family.channels
            if m.shape[channels] > states.shape[channels]:  # extra channels are the predicted variance: drop them
                m = m.narrow(channels, 0, states.shape[channels])
            outputs.append(m.unflatten(0, (branches * rows, samples)))
        return outputs

    def prepare(self) -> None:
        """See `engine.evaluator.Evaluator`."""
        for each in self._calls:
            self._rows.prepare(each.family, each.states.dtype, len(each.states) // self._num_samples)

    def constants(self) -> Iterator[Tensor]:
        """See `engine.evaluator.Evaluator`."""
        return self._rows.constants()

    def repeat(self, wave: Evaluate) -> None:
        """See `engine.evaluator.Evaluator`."""
        for each in self._calls:
            args, kwargs = each.at(self._states(each, wave))
            self._rows.arguments(wave, each.network, each.family, each.names, args, kwargs)

    def forget(self) -> None:
        """See `engine.evaluator.Evaluator`."""
        self._rows.forget()

    def _states(self, call: RecordedCall, wave: Evaluate) -> Tensor:
        """The states of a wave for one call: a call may have fewer branches than the others of the loop."""
        size = len(call.states) // self._num_samples * len(wave.positions)
        return (wave.x if size == len(wave.x) else wave.x[:size]).flatten(0, 1)


def tensors_of(calls: Iterable[RecordedCall]) -> dict[str, Tensor]:
    """The tensors among the arguments of calls, by the path where each first occurs."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, value in _leaves_of(calls):
        if isinstance(value, Tensor):
            found.setdefault(id(value), (path, value))
    return dict(found.values())


def with_tensors(
    calls: Iterable[RecordedCall], tensors: Mapping[str, Tensor], substitutes: Mapping[str, Tensor]
) -> list[RecordedCall]:
    """The calls with these tensors replaced by the substitutes of the same names."""
    by_id = {id(tensor): substitutes[name] for name, tensor in tensors.items()}
    return [call.changed(lambda tensor: by_id.get(id(tensor), tensor)) for call in calls]


def signature_of(calls: Iterable[RecordedCall]) -> Hashable:
    """A key that identifies the calls by value, except for the contents of their tensors.

    Raises:
        ValueError: an argument is an object whose value is not known; the message names it.
    """
    first: dict[int, str] = {}
    found: list[Hashable] = []
    for call in calls:
        found += (id(call.network), call.states.shape, call.states.dtype)
    for path, value in _leaves_of(calls):
        if isinstance(value, Tensor):
            found.append((path, first.setdefault(id(value), path)))  # two arguments may be one tensor
        elif isinstance(value, _PLAIN):
            found.append((path, type(value), value))
        else:
            raise ValueError(f"{path.partition('.')[2]} is a {type(value).__name__}, an object of unknown contents")
    return tuple(found)


def _leaves_of(calls: Iterable[RecordedCall]) -> Iterator[tuple[str, Any]]:
    for number, call in enumerate(calls):
        for name, value in call.arguments():
            yield from _leaves(f"{number}.{name}", value)


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

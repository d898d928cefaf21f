"""A network's arguments for the rows of a wave: one timestep per row, and conditioning repeated for the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedPipeline
from ..sampling.rows import PerState, TiledConditioning
from ..schedulers.table import NoiseTable
from ..solvers.contract import Evaluate
from ..solvers.program import Program
from .networks import PER_SAMPLE_OPTIONS, SHARED_OPTIONS, Network, NetworkCall


class RowInputs:
    """Makes the network calls of one run. state: starting noise. replacements: callables to use instead of networks."""

    def __init__(
        self, program: Program, noise: NoiseTable, state: Tensor, replacements: Mapping[nn.Module, Callable[..., Any]]
    ) -> None:
        self._replacements = replacements
        self._peak_rows = program.peak_rows
        self.num_samples = len(state)
        self._per_state = PerState(program, state.device)
        self._timesteps = noise.timesteps.to(state.device)
        self._times: dict[tuple[Any, torch.dtype], Tensor] = {}
        self._columns: dict[Tensor, Tensor] = {}
        self._tiled: dict[str, list[TiledConditioning]] = {}

    def call(self, wave: Evaluate, call: NetworkCall) -> Any:
        return call.through(self._replacements.get(call.network, call.network), self.arguments(wave, call))

    def arguments(self, wave: Evaluate, call: NetworkCall) -> dict[str, Any]:
        """The arguments of a call for the rows of a wave: its states are those of the rows already."""
        family, states = call.family, call.states
        rows = len(wave.positions) * len(wave.samples)
        branches, odd = divmod(states.shape[0], rows)
        if odd:
            raise UnsupportedPipeline(
                f"{type(call.network).__name__} was given {len(states)} states for {rows} rows. It is not known which "
                "row each state belongs to. Run this call on the original pipeline."
            )

        def for_rows(name: str, value: Any) -> Any:
            if name == family.state:
                return self._joined(wave, call, branches)
            if value is None or name in family.shared:
                return value
            if name in family.per_sample:
                return self._repeat(wave, name, value, branches)
            if name in family.columns:
                return self._per_state.of(self._on_device(family.columns[name]), wave, branches)
            if name == "timestep":
                return self._per_state.of(self._column(family, states.dtype), wave, branches)
            if name in family.options:
                return self._repeat_options(wave, name, value, branches)
            raise UnsupportedPipeline(
                f"The pipeline passes {name!r} to {type(call.network).__name__}. It is not known whether that argument "
                "has an entry per sample. Run this call on the original pipeline."
            )

        return {name: for_rows(name, value) for name, value in call.arguments.items()}

    def repeated(self, wave: Evaluate, name: str, value: Tensor, branches: int) -> Tensor:
        """A tensor with an entry per branch and sample, repeated for the rows. name: of the argument."""
        kept = self._tiled.setdefault(name, [])
        tiled = next((each for each in kept if each.tensor is value), None)
        if tiled is None:
            if len(value) != branches * self.num_samples:
                raise UnsupportedPipeline(
                    f"The pipeline's network was given conditioning of shape {tuple(value.shape)} ({name}) for "
                    f"{branches} x {self.num_samples} branches and samples. It is not known which sample each entry "
                    "belongs to. Run this call on the original pipeline."
                )
            tiled = TiledConditioning(value, self.num_samples, branches, self._peak_rows)
            # a loop may call its network twice per turn, with different conditioning
            self._tiled[name] = [tiled, *kept[:1]]
        return tiled.of(len(wave.positions), wave.samples)

    def prepare(self, family: Network, dtype: torch.dtype, branches: int) -> None:
        """Compute the time inputs of a network family now, for every wave of the whole batch."""
        columns = [self._on_device(column) for column in family.columns.values()]
        for column in columns or (self._column(family, dtype),):
            self._per_state.prepare(column, self.num_samples, branches)

    def constants(self) -> Iterator[Tensor]:
        return self._per_state.looked_up()

    def forget(self) -> None:
        self._tiled.clear()

    def _joined(self, wave: Evaluate, call: NetworkCall, branches: int) -> Tensor:
        """The states with what is joined to them."""
        joined = call.family.joined
        if joined is None or call.rest is None:
            return call.states
        rest = self.repeated(wave, "joined to the states", call.rest, branches)
        return torch.cat((call.states, rest) if joined.state_first else (rest, call.states), joined.dim)

    def _on_device(self, column: Tensor) -> Tensor:
        """A column of a family, always as the same tensor."""
        if column not in self._columns:
            self._columns[column] = column.to(self._timesteps.device)
        return self._columns[column]

    def _column(self, family: Network, dtype: torch.dtype) -> Tensor:
        """The time inputs of a network of this family, [N]."""
        if (family.time, dtype) not in self._times:
            self._times[family.time, dtype] = family.time(self._timesteps, dtype)
        return self._times[family.time, dtype]

    def _repeat(self, wave: Evaluate, name: str, value: Any, branches: int) -> Any:
        if isinstance(value, Tensor):
            return self.repeated(wave, name, value, branches)
        if isinstance(value, dict):
            return {key: self._repeat(wave, f"{name}.{key}", entry, branches) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._repeat(wave, f"{name}.{key}", each, branches) for key, each in enumerate(value))
        return value

    def _repeat_options(self, wave: Evaluate, name: str, options: dict[str, Any], branches: int) -> dict[str, Any]:
        repeated = dict(options)
        for key, value in options.items():
            if key in PER_SAMPLE_OPTIONS:
                repeated[key] = self._repeat(wave, f"{name}.{key}", value, branches)
            elif key not in SHARED_OPTIONS and not isinstance(value, bool | int | float | str | None):
                raise UnsupportedPipeline(
                    f"{name} holds {key!r}, a {type(value).__name__}. It is not known whether that has an entry per "
                    "sample. Run this call on the original pipeline."
                )
        return repeated

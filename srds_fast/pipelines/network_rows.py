"""A network's arguments for the rows of a wave: a timestep for each, and conditioning repeated for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedPipeline
from ..sampling.rows import PerState, Tiles, input_scale
from ..schedulers.table import NoiseTable
from ..solvers.contract import Evaluate
from ..solvers.program import Program
from .networks import PER_SAMPLE_OPTIONS, SHARED_OPTIONS, Network


class RowInputs:
    """Makes the arguments of the network calls of one run.

    Args:
        program: its waves.
        noise: table of its steps.
        state: starting noise, [batch, ...], in the dtype of the state.
        instead: what is called in the place of a network.
    """

    def __init__(
        self,
        program: Program,
        noise: NoiseTable,
        state: Tensor,
        *,
        instead: Mapping[nn.Module, Callable[..., Any]] = MappingProxyType({}),
    ) -> None:
        self._instead = instead
        self._peak_rows = program.peak_rows
        self._num_samples = len(state)
        self._per_state = PerState(program, state.device)
        self._input_scale = input_scale(noise, state)
        self._timesteps = noise.timesteps.to(state.device)
        self._times: dict[tuple[Any, torch.dtype], Tensor] = {}
        self._tiles: dict[str, list[Tiles]] = {}

    def scale(self, wave: Evaluate, x: Tensor) -> Tensor:
        """The states of a wave, [branches * rows * samples, ...], times their input scale."""
        if self._input_scale is None:
            return x
        branches = x.shape[0] // (len(wave.positions) * len(wave.samples))
        scaled = x * self._per_state.of(self._input_scale, wave, branches)
        return scaled if scaled.dtype == x.dtype else scaled.to(x.dtype)  # the scale is kept in the state's dtype

    def call(
        self,
        wave: Evaluate,
        network: nn.Module,
        family: Network,
        names: list[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a network. names: of its parameters, in order; the other arguments are those of its pipeline's call."""
        args, kwargs = self.arguments(wave, network, family, names, args, kwargs)
        return self._instead.get(network, network)(*args, **kwargs)

    def arguments(
        self,
        wave: Evaluate,
        network: nn.Module,
        family: Network,
        names: list[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `call` gives the network."""
        states: Tensor = kwargs[family.state] if family.state in kwargs else args[names.index(family.state)]
        rows = len(wave.positions) * len(wave.samples)
        branches, odd = divmod(states.shape[0], rows)
        if odd:
            raise UnsupportedPipeline(
                f"{type(network).__name__} was given {len(states)} states for {rows} rows. It is not known which state "
                "belongs to which row. Run this call on the original pipeline."
            )

        def for_rows(name: str, value: Any) -> Any:
            if value is None or name in family.as_it_is:
                return value
            if name in family.per_sample:
                return self._repeat(wave, name, value, branches)
            if name == "timestep":
                return self._times_for(wave, family, states.dtype, branches)
            if name in family.options:
                return self._repeat_options(wave, name, value, branches)
            raise UnsupportedPipeline(
                f"The pipeline passes {name!r} to {type(network).__name__}. It is not known how that argument belongs "
                "to samples. Run this call on the original pipeline."
            )

        # positional arguments stay positional: hooks on the network may look at either
        given = tuple(for_rows(name, value) for name, value in zip(names, args, strict=False)) if args else args
        return given, {name: for_rows(name, value) for name, value in kwargs.items()}

    def repeated(self, wave: Evaluate, name: str, value: Tensor, branches: int) -> Tensor:
        """A tensor with an entry per branch and sample, repeated for the rows; name: where it is used."""
        kept = self._tiles.setdefault(name, [])
        tiles = next((each for each in kept if each.tensor is value), None)
        if tiles is None:
            if len(value) != branches * self._num_samples:
                raise UnsupportedPipeline(
                    f"The pipeline's network was given conditioning of shape {tuple(value.shape)} ({name}) for "
                    f"{branches} x {self._num_samples} branches and samples. It is not known which entry belongs to "
                    "which sample. Run this call on the original pipeline."
                )
            tiles = Tiles(value, self._num_samples, branches, self._peak_rows)
            # a loop may call its network twice a turn, with two kinds of conditioning
            self._tiles[name] = [tiles, *kept[:1]]
        return tiles.of(len(wave.positions), wave.samples)

    def prepare(self, family: Network, dtype: torch.dtype, branches: int) -> None:
        """Look up now what a family of networks is told of the time in every wave of the whole batch."""
        self._per_state.prepare(self._column(family, dtype), self._num_samples, branches)

    def constants(self) -> Iterator[Tensor]:
        """What was looked up."""
        yield from self._per_state.looked_up()

    def forget(self) -> None:
        """Give the repeated conditioning back."""
        self._tiles.clear()

    def _times_for(self, wave: Evaluate, family: Network, dtype: torch.dtype, branches: int) -> Tensor:
        """What a network of the family is told of the time, for every state of the wave."""
        return self._per_state.of(self._column(family, dtype), wave, branches)

    def _column(self, family: Network, dtype: torch.dtype) -> Tensor:
        times = self._times.get((family.time, dtype))
        if times is None:
            times = self._times[family.time, dtype] = family.time(self._timesteps, dtype)
        return times

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
                    f"{name} holds {key!r}, a {type(value).__name__}. It is not known how that belongs to samples. "
                    "Run this call on the original pipeline."
                )
        return repeated

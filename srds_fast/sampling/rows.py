"""Evaluates rows with a denoiser: each row has its own timestep; conditioning is repeated for the rows of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from .. import telemetry
from ..engine.distributed import call as distributed
from ..errors import InvalidArgument
from ..schedulers.table import NoiseTable
from ..solvers.contract import Evaluate
from ..solvers.on_demand import OnDemand
from ..solvers.program import Program

Denoiser = Callable[..., Tensor]
# waves of a long program whose values are looked up together
WAVES_AT_ONCE = 32
Generators = torch.Generator | Sequence[torch.Generator] | None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the solver's state for a network of this dtype: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw_noise(
    noise: NoiseTable,
    like: Tensor,
    dtype: torch.dtype,
    generator: Generators = None,
    *,
    sample_dtype: torch.dtype | None = None,
    dummy: frozenset[int] = frozenset(),
) -> Tensor | None:
    """The fresh noise of all N steps, [N, batch, ...], drawn in the order of the sequential sampler.

    like: network output of one step, [batch, ...]: gives shape, device and, by the table, the dtype of the draw.
    dtype: of the state, which the result has (N times the memory of the batch). generator: one for the batch, one per
    sample, or None for torch's global one. sample_dtype: of the sample that the stock step is given; None: that of
    `like`. dummy: steps that also draw noise, and use none of it. Returns None if no step uses noise.
    """
    if noise.draws is None and not dummy:
        return None
    sample_dtype = like.dtype if sample_dtype is None else sample_dtype
    used = not (noise.spread is None and noise.memory is None and noise.step_noise is None)
    draws = torch.zeros(noise.num_steps if used else 0, *like.shape, dtype=dtype, device=like.device)
    if noise.step_noise is not None:
        for draw, added in zip(
            draws, noise.step_noise.of(noise.spreads, like, dtype, sample_dtype, generator), strict=True
        ):
            draw.copy_(added)
        return draws
    # as in diffusers: a list of one generator is for the whole batch, a longer list has one per sample
    many = generator if isinstance(generator, Sequence) else [generator]
    shape = like.shape if len(many) == 1 else like[:1].shape
    drawn_in = noise.draw_dtypes.get((like.dtype, sample_dtype), like.dtype)

    def drawn(each: torch.Generator | None) -> Tensor:
        # a CPU generator draws on the CPU, also for samples on another device: a seed gives the same noise everywhere
        device = like.device if each is None else each.device
        return torch.randn(shape, generator=each, device=device, dtype=drawn_in).to(like.device)

    in_steps = [False] * noise.num_steps if noise.draws is None else noise.draws.tolist()
    for index, draws_noise in enumerate(in_steps):
        if draws_noise or index in dummy:
            noises = [drawn(each) for each in many]
            if draws_noise and used:
                draws[index] = torch.cat(noises).to(dtype)
    return draws if used else None


class PerState:
    """The values that differ between rows (timestep, input scale), for the states of each wave of a program.

    All waves are looked up at once: one index per wave would cost a copy to the device in every wave. Those of a long
    program are looked up in groups, when a run comes to them. A wave without some rows of the program, or with samples
    at other steps, has an index of its own.
    positions: of the rows of each wave.
    """

    def __init__(self, positions: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self._positions = positions
        self._device = device
        self._num_samples = 0
        self._of_waves: dict[tuple[Tensor, int], Sequence[Tensor]] = {}

    def of(self, column: Tensor, wave: Evaluate, branches: int = 1) -> Tensor:
        """The entries of a column [N, ...] for the states of a wave, [branches * rows * samples, ...]."""
        if wave.shifts is None and len(wave.positions) == len(self._positions[wave.number]):
            return self._entries(column, len(wave.samples), branches)[wave.number]
        # rows that the values found before have decided on
        steps = wave.steps(len(column)).flatten().repeat(branches)
        found: Tensor = column[steps.to(column.device)]
        return found

    def prepare(self, column: Tensor, num_samples: int, branches: int = 1) -> None:
        """Look up a column for all waves with this number of samples."""
        _ = self._entries(column, num_samples, branches)[-1:]

    def looked_up(self) -> Iterator[Tensor]:
        return chain.from_iterable(self._of_waves.values())

    def _entries(self, column: Tensor, num_samples: int, branches: int) -> Sequence[Tensor]:
        """Those of each wave."""
        if self._num_samples != num_samples:
            self._num_samples = num_samples
            self._of_waves.clear()
        key = column, branches
        of_waves = self._of_waves.get(key)  # once for every wave, and a tensor is slow to hash
        if of_waves is None:
            positions = self._positions
            if isinstance(positions, OnDemand):
                of_waves = OnDemand(len(positions), partial(self._in_groups, *key, num_samples))
            else:
                of_waves = self._look_up(positions, *key, num_samples)
            self._of_waves[key] = of_waves
        return of_waves

    def _in_groups(self, column: Tensor, branches: int, num_samples: int) -> Iterator[Tensor]:
        for start in range(0, len(self._positions), WAVES_AT_ONCE):
            group = self._positions[start : start + WAVES_AT_ONCE]
            yield from self._look_up(group, column, branches, num_samples)

    def _look_up(
        self, positions: Sequence[tuple[int, ...]], column: Tensor, branches: int, num_samples: int
    ) -> tuple[Tensor, ...]:
        of_rows = [position for of_wave in positions for position in of_wave * branches]
        index = torch.tensor(of_rows, device="cpu").repeat_interleave(num_samples).to(self._device)
        found: tuple[Tensor, ...] = column[index].split([len(each) * branches * num_samples for each in positions])
        return found


class TiledConditioning:
    """Conditioning [branches * num_samples, ...], guidance branches outermost, repeated for the rows of waves.

    Most waves are one row wider or narrower than the one before. So what is used again is tiled once at peak width, and
    narrower waves take a slice. All rows of a branch are equal, so with two branches the slice around the middle holds
    the right number of each.
    """

    def __init__(self, tensor: Tensor, num_samples: int, branches: int, peak_rows: int) -> None:
        self.tensor = tensor
        self._num_samples, self._branches, self._peak_rows = num_samples, branches, peak_rows
        self._samples: Sequence[int] = ()
        self._of_rows: dict[int, Tensor] = {}

    def of(self, rows: int, samples: Sequence[int]) -> Tensor:
        """For a wave of the samples that still run: [branches * rows * len(samples), ...], ordered as `PerState.of`."""
        if samples != self._samples:
            self._samples = samples
            self._of_rows.clear()
        if rows not in self._of_rows:
            if self._branches > 2:  # no slice is contiguous
                self._of_rows.clear()
            if not self._of_rows:
                self._of_rows[rows] = self._tile(rows)
            else:
                if self._peak_rows not in self._of_rows:
                    self._of_rows[self._peak_rows] = self._tile(self._peak_rows)
                peak, before = self._of_rows[self._peak_rows], (self._branches - 1) * len(samples)
                middle = before * self._peak_rows
                self._of_rows[rows] = peak[middle - before * rows : middle + rows * len(samples)]
        return self._of_rows[rows]

    def forget(self) -> None:
        self._of_rows.clear()

    def _tile(self, rows: int) -> Tensor:
        split = self.tensor.reshape(self._branches, 1, self._num_samples, *self.tensor.shape[1:])
        if len(self._samples) < self._num_samples:
            split = split[:, :, list(self._samples)]
        return split.expand(-1, rows, *split.shape[2:]).flatten(0, 2)


class RowDenoiser:
    """An `engine.eager.Evaluator` that calls the user's `denoiser(x, t, **cond)`; see `srds_fast.sample`.

    x: starting noise, [batch, ...]. cond: tensors of shape [batch, ...], by keyword.
    """

    def __init__(
        self, denoiser: Denoiser, x: Tensor, noise: NoiseTable, program: Program, cond: Mapping[str, Tensor]
    ) -> None:
        self._denoiser = denoiser
        self._timesteps = noise.timesteps.to(x.device)
        self._per_state = PerState(program.positions, x.device)
        self._num_samples = len(x)
        self._cond = {name: TiledConditioning(value, len(x), 1, program.peak_rows) for name, value in cond.items()}

    def __call__(self, wave: Evaluate) -> Tensor:
        """Network output of the wave, [rows, samples, ...]; InvalidArgument if it is no prediction."""
        x, t, cond = wave.x.flatten(0, 1), self._per_state.of(self._timesteps, wave), self._cond_of(wave)
        with telemetry.span("network", "network", len(wave.positions)):
            if (call := distributed.dividing()) is None:
                return self._checked(x, t, cond).reshape(wave.x.shape)

            def run(_: int, part: slice) -> Tensor:
                return self._checked(x[part], t[part], {name: value[part] for name, value in cond.items()})

            (m,) = call.outputs([len(x)], x.shape[1:], x.device, run)
            return m.reshape(wave.x.shape)

    def _checked(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's output; InvalidArgument if it is no prediction."""
        m = self._denoiser(x, t, **cond)
        if not isinstance(m, Tensor) or m.shape != x.shape or not m.is_floating_point():
            found = f"{m.dtype}, shape {tuple(m.shape)}" if isinstance(m, Tensor) else type(m).__name__
            raise InvalidArgument(
                f"The denoiser returned {found} for an input of {x.dtype}, shape {tuple(x.shape)}. It must return one "
                "floating-point tensor of the input's shape. Unpack the output object (`.sample`) or drop extra "
                "channels inside the denoiser."
            )
        return m

    def prepare(self) -> None:
        self._per_state.prepare(self._timesteps, self._num_samples)

    def constants(self) -> Iterator[Tensor]:
        return self._per_state.looked_up()

    def repeat(self, wave: Evaluate) -> None:
        self._cond_of(wave)

    def forget(self) -> None:
        for tiled in self._cond.values():
            tiled.forget()

    def _cond_of(self, wave: Evaluate) -> dict[str, Tensor]:
        return {name: tiled.of(len(wave.positions), wave.samples) for name, tiled in self._cond.items()}

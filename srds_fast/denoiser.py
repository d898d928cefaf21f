"""Rows in, network output out: states are scaled and cast, conditioning is repeated for the rows of each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .errors import InvalidArgument
from .noise import NoiseTable
from .program import Program
from .solvers.core import Evaluate

Denoiser = Callable[..., Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the solver's state for a network of this dtype: float32, or float64 where the network is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw_noise(noise: NoiseTable, like: Tensor, dtype: torch.dtype, generator: Generators = None) -> Tensor | None:
    """The fresh noise of every step, drawn now as the sequential sampler would draw it step by step.

    Args:
        noise: table of N steps.
        like: network output of one step, [batch, ...]: gives shape, device and the dtype that is drawn in.
        dtype: of the state.
        generator: one for the batch, one per sample, or None for torch's global one.

    Returns:
        [N, batch, ...] in the dtype of the state (N times the memory of the batch); None if no step draws.
    """
    if noise.draws is None:
        return None

    def draw() -> Tensor:
        if isinstance(generator, Sequence):
            return torch.cat([_draw(like[:1].shape, each, like) for each in generator])
        return _draw(like.shape, generator, like)

    draws = torch.zeros(noise.num_steps, *like.shape, dtype=dtype, device=like.device)
    for index, drawn in enumerate(noise.draws.tolist()):
        if drawn:
            draws[index] = draw().to(dtype)
    return draws


def _draw(shape: torch.Size, generator: torch.Generator | None, like: Tensor) -> Tensor:
    # a generator of the CPU draws on the CPU, whatever the device of the samples: seeds then mean the same everywhere
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


class PerState:
    """A column with an entry per step, as the states of each wave of a program need it.

    It is spread for all waves at once: looked up wave by wave, it would cost each a copy to the device.

    Args:
        column: [N, ...], on the device of the states.
        program: the waves.
    """

    def __init__(self, column: Tensor, program: Program) -> None:
        self._column = column
        self._positions = program.positions
        self._made_for = (0, 0)
        self._of_waves: tuple[Tensor, ...] = ()

    def of(self, wave: Evaluate, branches: int = 1) -> Tensor:
        """The entry of every state, [branches * rows * samples, ...]: row by row, all its samples."""
        samples = len(wave.samples)
        if self._made_for != (branches, samples):
            self._made_for = branches, samples
            of_waves = [positions * branches for positions in self._positions]
            index = torch.tensor([position for positions in of_waves for position in positions])
            spread = self._column[index.to(self._column.device)].repeat_interleave(samples, 0)
            self._of_waves = spread.split([len(positions) * samples for positions in of_waves])
        return self._of_waves[wave.number]


def input_scales(noise: NoiseTable, program: Program, like: Tensor) -> PerState | None:
    """What states [rows, ...] like `like` are multiplied with on their way into the network; None for nothing."""
    if not bool((noise.input_scale != 1.0).any()):
        return None
    column = noise.input_scale.to(like.dtype).to(like.device)
    return PerState(column.reshape(-1, *[1] * (like.ndim - 1)), program)


def tile(tensor: Tensor, samples: Sequence[int], rows: int, num_samples: int, branches: int = 1) -> Tensor:
    """Repeat conditioning for the rows of a wave.

    Args:
        tensor: [branches * num_samples, ...], guidance branches outermost.
        samples: the samples that still run.
        rows: rows of the wave.
        num_samples: samples in the whole batch.
        branches: guidance branches.

    Returns:
        [branches * rows * len(samples), ...], in the order of `PerState.of`.
    """
    split = tensor.reshape(branches, 1, num_samples, *tensor.shape[1:])
    if len(samples) < num_samples:
        split = split[:, :, list(samples)]
    return split.expand(-1, rows, *split.shape[2:]).flatten(0, 2)


class Tiles:
    """Conditioning repeated for the rows of one wave after another; the arguments are those of `tile`.

    Most waves are a row wider or narrower than the one before. So it is repeated once, for the widest, of which the
    others take a part: the rows of a branch are all the same, so of two branches it is the part around the middle.

    Args:
        peak_rows: rows of the widest wave.
    """

    def __init__(self, tensor: Tensor, num_samples: int, branches: int, peak_rows: int) -> None:
        self.tensor = tensor
        self._num_samples, self._branches, self._peak_rows = num_samples, branches, peak_rows
        self._samples: Sequence[int] = ()
        self._of_rows: dict[int, Tensor] = {}

    def of(self, rows: int, samples: Sequence[int]) -> Tensor:
        """The conditioning of a wave, as `tile` makes it."""
        if samples != self._samples:
            self._samples = samples
            self._of_rows.clear()
        if rows not in self._of_rows:
            self._make(rows)
        return self._of_rows[rows]

    def _make(self, rows: int) -> None:
        if self._branches > 2:  # no part of three branches is in one piece
            self._of_rows = {rows: tile(self.tensor, self._samples, rows, self._num_samples, self._branches)}
            return
        widest = self._of_rows.get(self._peak_rows)
        if widest is None:
            widest = tile(self.tensor, self._samples, self._peak_rows, self._num_samples, self._branches)
            self._of_rows[self._peak_rows] = widest
        before = self._branches - 1  # 0 or 1
        middle = before * self._peak_rows * len(self._samples)
        size = rows * len(self._samples)
        self._of_rows[rows] = widest[middle - before * size : middle + size]


class RowDenoiser:
    """Evaluates waves with a user's denoiser: `denoiser(x, t, **cond)`, see `srds_fast.sample`.

    Args:
        denoiser: the user's callable.
        x: starting noise, [batch, ...]: gives the network's dtype and device.
        noise: table of N steps.
        program: the waves.
        cond: tensors of shape [batch, ...], by keyword.
    """

    def __init__(
        self, denoiser: Denoiser, x: Tensor, noise: NoiseTable, program: Program, cond: Mapping[str, Tensor]
    ) -> None:
        self._denoiser = denoiser
        self._dtype = x.dtype
        self._timesteps = PerState(noise.timesteps.to(x.device), program)
        self._scales = input_scales(noise, program, x.to(state_dtype(x.dtype)))
        self._num_samples = len(x)
        self._cond = cond

    def __call__(self, wave: Evaluate) -> Tensor:
        """Network output of the wave, [rows, samples, ...].

        Raises:
            InvalidArgument: the denoiser returned something else than a tensor shaped like its input.
        """
        rows = len(wave.positions)
        x = wave.x.flatten(0, 1)
        if self._scales is not None:
            x = x * self._scales.of(wave)
        x = x.to(self._dtype)
        cond = {name: tile(value, wave.samples, rows, self._num_samples) for name, value in self._cond.items()}
        m = self._denoiser(x, self._timesteps.of(wave), **cond)
        if not isinstance(m, Tensor) or m.shape != x.shape:
            found = f"shape {tuple(m.shape)}" if isinstance(m, Tensor) else type(m).__name__
            raise InvalidArgument(
                f"The denoiser returned {found} for an input of shape {tuple(x.shape)}. It must return one tensor of "
                "the input's shape. Unpack the output object (`.sample`) or drop extra channels inside the denoiser."
            )
        return m.reshape(wave.x.shape)

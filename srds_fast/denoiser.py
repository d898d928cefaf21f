"""Rows in, network output out: states are scaled and cast, conditioning is repeated for the rows of each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .errors import InvalidArgument
from .noise import NoiseTable
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


class RowInputs:
    """What differs from row to row in the network's input: timestep and input scale.

    Args:
        noise: table of N steps.
        dtype: of the state.
        device: where the states are.
    """

    def __init__(self, noise: NoiseTable, dtype: torch.dtype, device: torch.device) -> None:
        self._timesteps = noise.timesteps.to(device)
        self._scale = noise.input_scale.to(dtype=dtype).to(device)
        self._is_scaled = bool((noise.input_scale != 1.0).any())

    def scaled(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """The states times their input scale. x: [rows, ...], one position each."""
        if not self._is_scaled:
            return x
        return x * self._scale[list(positions)].reshape(-1, *[1] * (x.ndim - 1))

    def timesteps(self, wave: Evaluate) -> Tensor:
        """Timestep of every state, [rows * samples], in the scheduler's dtype and unit: row by row, all its samples."""
        return self._timesteps[list(wave.positions)].repeat_interleave(len(wave.samples))


def tile(tensor: Tensor, samples: Sequence[int], rows: int, num_samples: int, branches: int = 1) -> Tensor:
    """Repeat conditioning for the rows of a wave.

    Args:
        tensor: [branches * num_samples, ...], guidance branches outermost.
        samples: the samples that still run.
        rows: rows of the wave.
        num_samples: samples in the whole batch.
        branches: guidance branches.

    Returns:
        [branches * rows * len(samples), ...], in the order of `RowInputs.timesteps` within each branch.
    """
    split = tensor.reshape(branches, 1, num_samples, *tensor.shape[1:])
    if len(samples) < num_samples:
        split = split[:, :, list(samples)]
    return split.expand(-1, rows, *split.shape[2:]).flatten(0, 2)


class RowDenoiser:
    """Evaluates waves with a user's denoiser: `denoiser(x, t, **cond)`, see `srds_fast.sample`.

    Args:
        denoiser: the user's callable.
        x: starting noise, [batch, ...]: gives the network's dtype and device.
        noise: table of N steps.
        cond: tensors of shape [batch, ...], by keyword.
    """

    def __init__(self, denoiser: Denoiser, x: Tensor, noise: NoiseTable, cond: Mapping[str, Tensor]) -> None:
        self._denoiser = denoiser
        self._dtype = x.dtype
        self._inputs = RowInputs(noise, state_dtype(x.dtype), x.device)
        self._num_samples = len(x)
        self._cond = cond

    def __call__(self, wave: Evaluate) -> Tensor:
        """Network output of the wave, [rows, samples, ...].

        Raises:
            InvalidArgument: the denoiser returned something else than a tensor shaped like its input.
        """
        rows = len(wave.positions)
        x = self._inputs.scaled(wave.x, wave.positions).flatten(0, 1).to(self._dtype)
        cond = {name: tile(value, wave.samples, rows, self._num_samples) for name, value in self._cond.items()}
        m = self._denoiser(x, self._inputs.timesteps(wave), **cond)
        if not isinstance(m, Tensor) or m.shape != x.shape:
            found = f"shape {tuple(m.shape)}" if isinstance(m, Tensor) else type(m).__name__
            raise InvalidArgument(
                f"The denoiser returned {found} for an input of shape {tuple(x.shape)}. It must return one tensor of "
                "the input's shape. Unpack the output object (`.sample`) or drop extra channels inside the denoiser."
            )
        return m.reshape(wave.x.shape)

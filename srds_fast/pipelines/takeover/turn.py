"""The one turn of a pipeline's loop in which its network calls are recorded.

In that turn the network does not run: each call returns random numbers (a probe). The loop's guidance combines the
probes, and the result reaches the scheduler's step. If it is one weighted sum of the probes, the solver gets the
weights and combines the branches itself, and the recorded calls are repeated for the rows of every wave.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.wave_update import NetworkInput
from ...sampling.rows import state_dtype
from ...solvers.contract import SolverInputs
from ..networks import NetworkCall
from .recorded import Residuals

# relative bound on the error of linear guidance in float64: rounding gives 1e-16, a half-precision cast 1e-3
LINEAR = 1e-9
MAX_CACHED = 64


class RecordedTurn:
    """The recorded calls of one turn, and the guidance that the loop applies to their outputs.

    known: guidance weights of earlier calls. To find weights waits for the device; calls of a known kind do not.
    kind: everything that the weights of this call can depend on; None: neither use nor extend `known`.
    """

    def __init__(self, known: dict[Hashable, Tensor], kind: Hashable | None) -> None:
        self.calls: list[NetworkCall] = []
        self.weights: Tensor | None = None  # [branches], of the guided sum; None if the guidance is not linear
        self.scaled = False  # whether the loop calls the scheduler's `scale_model_input`
        self.drive_reason: str | None = None  # why the loop must be driven
        self._known, self._kind = known, kind
        self._key: Hashable | None = None
        self._remembered: Tensor | None = None
        self._probed: list[tuple[NetworkCall, Tensor]] = []

    def record(self, call: NetworkCall) -> Any:
        """Record a call of the first turn and return a probe as its output; None if the loop must be driven."""
        if call.arguments.get("guess_mode"):
            self.drive_reason = "its loop joins zeros to the ControlNet's output (guess_mode)"
        if self.drive_reason is not None:
            return None
        number, states = len(self.calls), call.states
        # copy dictionaries: loops reuse one with other options for their next call
        arguments = {name: dict(value) if isinstance(value, dict) else value for name, value in call.arguments.items()}
        if call.family.gives_residuals and "conditioning_scale" in arguments:
            arguments["conditioning_scale"] = _on_device(arguments["conditioning_scale"], states)
        call = replace(call, arguments=arguments)
        self.calls.append(call)
        if call.family.gives_residuals:
            return Residuals(number, "down"), Residuals(number, "mid")
        if not self._probed and self._kind is not None:
            self._key = self._kind, states.dtype, states.device
            self._remembered = self._known.pop(self._key, None)
            if self._remembered is not None:
                self._known[self._key] = self._remembered  # LRU: mark as most recent
        probe = _probe_of(call, number, self._remembered is not None)
        self._probed.append((call, probe))
        if arguments.get("return_dict", True) is False:
            return (probe,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=probe)

    def read_guidance(self, m: Tensor, x: Tensor) -> str | None:
        """Find the weights of the branches; returns why the loop must be driven, or None.

        m: the loop's guided output for the probes. x: the states that the scheduler steps. Both [samples, ...].
        """
        probes: list[Tensor] = []
        for call, probe in self._probed:
            branches, odd = divmod(len(call.states), len(x))
            if odd or call.states.shape[1:] != x.shape[1:]:
                return "the input of its network is not the states alone"
            probes += probe.narrow(call.family.channels, 0, x.shape[call.family.channels]).chunk(branches)
        weights = self._remembered if self._remembered is not None else _weights_of(probes, m)
        if weights is None:
            return "its guidance is not one weighted sum of the network's outputs"
        if len(weights) != len(probes):
            return "its network is called for other branches than in earlier calls of this kind"
        self.weights = weights.to(x.device, state_dtype(x.dtype))
        if self._remembered is None and self._key is not None:
            for oldest in list(self._known)[: 1 - MAX_CACHED]:
                self._known.pop(oldest, None)
            self._known[self._key] = self.weights
        return None

    def inputs(self, inputs: SolverInputs, num_samples: int) -> SolverInputs:
        """Solver inputs of a run in which the solver applies guidance and input scale."""
        assert self.weights is not None
        copies = max(len(each.states) // num_samples for each in self.calls)
        channels_last = all(_is_channels_last(each.network) for each in self.calls)
        network = NetworkInput(inputs.network.dtype, copies, channels_last)
        unguided = len(self.weights) == 1 and abs(float(self.weights) - 1.0) < LINEAR
        return replace(inputs, network=network, scaled=self.scaled, guidance=None if unguided else self.weights)


def _probe_of(call: NetworkCall, number: int, known: bool) -> Tensor:
    """Random float64 numbers in the shape of the network's output; zeros if the guidance weights are known."""
    config: Any = call.network.config
    shape = list(call.states.shape)
    shape[call.family.channels] = config.get("out_channels") or config["in_channels"]
    if known:
        return call.states.new_zeros(shape)
    generator = torch.Generator().manual_seed(number)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(call.states.device)


def _weights_of(probes: Sequence[Tensor], m: Tensor) -> Tensor | None:
    """The weights w with m = sum of w_i * probe_i, [branches], on the CPU; None if m is no guided sum of the probes."""
    columns = torch.stack([each.flatten() for each in probes] + [m.flatten().double()])
    # all inner products in one transfer to the host
    products = (columns @ columns.T).cpu()
    branches = len(probes)
    weights: Tensor = torch.linalg.solve(products[:branches, :branches], products[:branches, branches])
    residual = columns[branches] - weights.to(columns) @ columns[:branches]
    # the weights of guidance add up to 1; otherwise the loop rescales by the values of the outputs, which is not linear
    deviation = abs(float(weights.sum()) - 1.0)
    is_sum = deviation <= LINEAR and float(residual.norm()) <= LINEAR * float(columns[branches].norm())
    return weights if is_sum else None


def _is_channels_last(network: nn.Module) -> bool:
    """Whether the network's first convolution works in channels-last layout."""
    weight = getattr(getattr(network, "conv_in", None), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 4 or weight.is_contiguous():
        return False
    return weight.is_contiguous(memory_format=torch.channels_last)


def _on_device(scale: Any, like: Tensor) -> Any:
    """A scale as a tensor: a recording reads its value in each replay, instead of a constant."""
    if isinstance(scale, list | tuple):
        return [_on_device(each, like) for each in scale]
    return torch.tensor(scale, dtype=state_dtype(like.dtype), device=like.device)

"""The one turn of a pipeline's loop in which its network calls are recorded.

In that turn the network does not run: each call returns random numbers (a probe). The loop's guidance combines the
probes, and the result reaches the scheduler's step. If it is one weighted sum of the probes, the solver gets the
weights and combines the branches itself, and the recorded calls are repeated for the rows of every wave.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.wave_update import NetworkInput
from ...sampling.rows import state_dtype
from ...solvers.contract import SolverInputs
from ..loop import Loop
from ..networks import Network
from .guidance import LINEAR, GuidanceCache, probe_of
from .recorded import RecordedCall, Residuals


def why_not(loop: Loop) -> str | None:
    """Why a loop cannot be taken over, or None."""
    if not loop.checked:
        return "its loop was not read by hand: it may differ from step to step"
    if loop.blends:
        return "its loop puts the known part of the image back after every step"
    if loop.joins:
        return "its loop joins conditioning to the states"
    return None


class RecordedTurn:
    """The recorded calls of one turn, and the guidance that the loop applies to their outputs.

    Args:
        known: known guidance weights, by kind of call.

    Attributes:
        calls: in order.
        weights: [branches], of the guided sum; None before `read_guidance`, or if the guidance is not linear.
        scaled: the loop calls the scheduler's `scale_model_input`.
        drive_reason: why the loop must be driven; None if it can be taken over.
    """

    def __init__(self, known: GuidanceCache) -> None:
        self.calls: list[RecordedCall] = []
        self.weights: Tensor | None = None
        self.scaled = False
        self.drive_reason: str | None = None
        self._known = known
        self._remembered: Tensor | None = None

    @property
    def linear(self) -> bool:
        """Whether the recorded calls can be repeated for all waves."""
        return bool(self.calls) and self.drive_reason is None and self.weights is not None

    def takes(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call of the first turn can be recorded. kwargs: of the call."""
        if kwargs.get("guess_mode"):
            self.drive_reason = "its loop joins zeros to the ControlNet's output (guess_mode)"
        return self.drive_reason is None

    def record(
        self, network: nn.Module, family: Network, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call and return a probe as its output. names: of the network's parameters, in order."""
        states: Tensor = kwargs[family.state] if family.state in kwargs else args[names.index(family.state)]
        number = len(self.calls)
        # copy dictionaries: loops reuse one with other options for their next call
        args = tuple(dict(arg) if isinstance(arg, dict) else arg for arg in args)
        kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        if family.gives_residuals:
            if "conditioning_scale" in kwargs:
                kwargs["conditioning_scale"] = _on_device(kwargs["conditioning_scale"], states)
            self.calls.append(RecordedCall(network, family, names, args, kwargs, states, None))
            return Residuals(number, "down"), Residuals(number, "mid")
        if not any(recorded.probe is not None for recorded in self.calls):
            self._remembered = self._known.get(states)
        probe = probe_of(network, family, states, number, known=self._remembered is not None)
        self.calls.append(RecordedCall(network, family, names, args, kwargs, states, probe))
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("return_dict", True) is False:
            return (probe,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=probe)

    def read_guidance(self, m: Tensor, x: Tensor) -> None:
        """Find the weights of the branches in m, or the reason why the loop must be driven.

        Args:
            m: the loop's guided output for the probes, [samples, ...].
            x: the states that the scheduler steps, [samples, ...].
        """
        self.drive_reason = self._read_guidance(m, x)

    def _read_guidance(self, m: Tensor, x: Tensor) -> str | None:
        probes: list[Tensor] = []
        for each in self.calls:
            if each.probe is None:
                continue
            branches, odd = divmod(len(each.states), len(x))
            if odd or each.states.shape[1:] != x.shape[1:]:
                return "the input of its network is not the states alone"
            probes += each.probe.narrow(each.family.channels, 0, x.shape[each.family.channels]).chunk(branches)
        if m.shape != x.shape:
            return None  # the lockstep loop raises the error
        dtype = state_dtype(x.dtype)
        if self._remembered is not None:
            if len(self._remembered) != len(probes):
                return "its network is called for other branches than in earlier calls of this kind"
            self.weights = self._remembered.to(dtype)
            return None
        columns = torch.stack([each.flatten() for each in probes] + [m.flatten().double()])
        # all inner products in one transfer to the host
        products = (columns @ columns.T).cpu()
        branches = len(probes)
        weights = torch.linalg.solve(products[:branches, :branches], products[:branches, branches])
        residual = columns[branches] - weights.to(columns) @ columns[:branches]
        # the weights of guidance add up to 1; otherwise the loop rescales by the values of the outputs, which is not
        # linear
        deviation = abs(float(weights.sum()) - 1.0)
        if deviation > LINEAR or float(residual.norm()) > LINEAR * float(columns[branches].norm()):
            return "its guidance is not one weighted sum of the network's outputs"
        self.weights = weights.to(x.device, dtype)
        states = next(recorded.states for recorded in self.calls if recorded.probe is not None)
        self._known.put(states, self.weights)
        return None

    def inputs(self, inputs: SolverInputs, num_samples: int) -> SolverInputs:
        """Solver inputs of a run in which the solver applies guidance and input scale."""
        assert self.weights is not None
        copies = max(len(each.states) // num_samples for each in self.calls)
        channels_last = all(_is_channels_last(each.network) for each in self.calls)
        network = NetworkInput(inputs.network.dtype, copies, channels_last)
        unguided = len(self.weights) == 1 and abs(float(self.weights) - 1.0) < LINEAR
        return replace(inputs, network=network, scaled=self.scaled, guidance=None if unguided else self.weights)


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

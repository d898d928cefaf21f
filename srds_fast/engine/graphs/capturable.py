"""What a call asks to have recorded, and what the recording depends on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.wave_update import NetworkInput
from ...solvers.contract import Core, Evaluate
from ...solvers.program import Program
from ..eager import Evaluator
from .cache_key import hooked, network_key
from .device_lock import in_a_replay
from .recorder import RECORDERS

Through = Callable[[Callable[..., Any], Hashable], Callable[..., Any]]
"""(network, its name among those of the call) -> what is called in its place."""


@dataclass(frozen=True)
class NetworkCalls:
    """The network calls of a run: what network graphs depend on besides the arguments of each call."""

    networks: tuple[nn.Module, ...]
    device: torch.device
    signature: Hashable = None  # by value, what else the calls depend on
    compiled: bool = False  # some network is run through torch.compile

    def why_not(self) -> str | None:
        """Why nothing of them can be recorded or replayed now, or None."""
        if in_a_replay(self.device):
            return "it runs inside another call, which replays a graph on the same device"
        if self.device.type not in RECORDERS:
            return f"graphs need a CUDA device, and the network is on {self.device.type}"
        part = next(filter(None, map(hooked, self.networks)), None)
        return None if part is None else f"{part} has a hook, which a replay would not call"

    def key(self, live: frozenset[int] = frozenset()) -> Hashable:
        """Equal for calls that the same graphs serve, whatever their plan. live: see `Capturable`."""
        networks = tuple(network_key(each, live) for each in self.networks)
        return self.device, self.compiled, self.signature, _process_state(), networks


@dataclass(frozen=True)
class Capturable:
    """What a call asks to have recorded."""

    signature: Hashable  # by value, everything that changes the loop graph besides `inputs` and `calls`
    inputs: Mapping[str, Tensor]  # the tensors that differ from call to call; "x" is the starting noise, [batch, ...]
    calls: NetworkCalls
    # given static tensors in the place of inputs, makes a core that has not begun and the evaluator of its waves;
    # True: coarse rows run on a stream of their own
    begin: Callable[[Mapping[str, Tensor], bool], tuple[Core, Evaluator]]
    # makes an eager evaluator of the same waves whose network calls go through a function
    through: Callable[[Through], Callable[[Evaluate], Tensor]]
    checkpoints: int  # the most that a run has
    program: Program
    network: NetworkInput
    dtype: torch.dtype
    live: frozenset[int] = frozenset()  # dictionaries of the networks, by identity, whose values are among the inputs
    overlap: str = "batch"  # or "streams": coarse rows on a stream of their own; "auto": the faster, measured
    why_no_loop: str | None = None

    @property
    def widths(self) -> list[int]:
        return sorted(set(self.program.all_widths))

    def wave_of_zeros(self, width: int) -> Evaluate:
        """The first wave of this width, on zeros."""
        x = self.inputs["x"]
        number = self.program.all_widths.index(width)
        positions = self.program.positions[number]
        return Evaluate(self.network.empty(width, x).zero_(), positions, tuple(range(len(x))), number)

    def key(self) -> Hashable:
        """Equal for calls that one loop graph serves."""
        layout = tuple((name, each.shape, each.stride(), each.dtype, each.device) for name, each in self.inputs.items())
        return self.signature, layout, self.calls.key(self.live)


def _process_state() -> Hashable:
    """The settings of torch that operations depend on."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    # torch's old switches (allow_tf32, set_float32_matmul_precision) write these too, and cannot always be read
    precise = (torch.backends, cuda.matmul, cudnn, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None))
    return (
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")),
        *(getattr(each, "fp32_precision", None) for each in precise),
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        *(cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        torch.are_deterministic_algorithms_enabled(),
        *(cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()),
        *(cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
    )

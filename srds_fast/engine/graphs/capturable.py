"""What a call would have recorded, and what the recording depends on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.wave_update import NetworkInput
from ...solvers.contract import Core
from ...solvers.program import Program
from ...solvers.waves import CountedWaves
from ..evaluator import Evaluator
from .cache_key import fingerprint, hooked


@dataclass(frozen=True)
class Capturable:
    """What a call would have recorded.

    Attributes:
        signature: by value, all that changes the recording beside `inputs` and `networks`.
        inputs: the tensors that are others in every call, by name; "x" is the starting noise, [batch, ...].
        networks: the networks that are called.
        live: dictionaries of theirs, by identity, whose values are among the inputs.
        compiled: some network is run through torch.compile.
        overlap: "batch"; "streams": coarse rows beside the others; "auto": which of the two is faster, measured.
        begin: given static tensors in the place of inputs, makes a core that has not begun, and what runs its waves: in
            one batch each, or (True) coarse rows beside the others.
        begin_counted: the same with waves that count themselves.
        checkpoints: how many a run has at most.
        program: the waves.
        network: how the network wants its rows.
        dtype: of the network.
    """

    signature: Hashable
    inputs: Mapping[str, Tensor]
    networks: tuple[nn.Module, ...]
    begin: Callable[[Mapping[str, Tensor], bool], tuple[Core, Evaluator]]
    begin_counted: Callable[[Mapping[str, Tensor]], tuple[CountedWaves, Evaluator]]
    checkpoints: int
    program: Program
    network: NetworkInput
    dtype: torch.dtype
    live: frozenset[int] = frozenset()
    compiled: bool = False
    overlap: str = "batch"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.inputs["x"].device

    @property
    def positions(self) -> Sequence[tuple[int, ...]]:
        """Of the rows of every wave."""
        return self.program.positions

    def why_not(self) -> str | None:
        """Why it cannot be recorded, or None."""
        for network in self.networks:
            if (part := hooked(network)) is not None:
                return f"a hook hangs on {part}: a replay would not call it"
        return None

    def key(self) -> Hashable:
        """All that a recording depends on."""
        layout = tuple((name, each.shape, each.stride(), each.dtype, each.device) for name, each in self.inputs.items())
        return self.signature, layout, _process_state(), tuple(fingerprint(each, self.live) for each in self.networks)


def _process_state() -> Hashable:
    """What of torch's own state operations look at."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")),
        *_precisions(),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


def _precisions() -> Iterator[Hashable]:
    """Of float32 products. torch has an old interface and a new one, and refuses the old once the new was used."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    for read in (torch.get_float32_matmul_precision, lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32):
        try:
            yield read()
        except RuntimeError:
            yield None
    for owner in (torch.backends, matmul, cudnn, getattr(cudnn, "conv", None)):
        yield getattr(owner, "fp32_precision", None)

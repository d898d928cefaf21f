"""How the networks of takeovers are called: which argument holds the states, which are per sample, the unit of time.

The name of an argument decides whether it is repeated for the rows of a wave. A network that is not listed here is
called by turns of the pipeline's loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Arguments = dict[str, Any]  # of a pipeline's call, by name


def _thousandths(timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    """Flux takes t / 1000. As in its pipelines, t is first rounded to the dtype of the latents."""
    return timesteps.to(dtype) / 1000


class Joined(NamedTuple):
    """Where an argument holds the state and, beside it, what is the same in every step."""

    dim: int
    state_first: bool


@dataclass(frozen=True)
class Network:
    """How a network family is called."""

    state: str  # name of the argument that holds the states
    per_sample: frozenset[str]  # arguments whose tensors have one entry per branch and sample; repeated for the rows
    shared: frozenset[str] = frozenset({"return_dict"})  # arguments for the whole call, passed on as they are
    options: frozenset[str] = frozenset()  # dictionaries of scalars, SHARED_OPTIONS and PER_SAMPLE_OPTIONS
    # (the scheduler's timesteps, dtype of the latents) -> the network's time input
    time: Callable[[Tensor, torch.dtype], Tensor] = lambda timesteps, dtype: timesteps
    channels: int = 1  # the channel dimension of states and outputs
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # one number a step, [N] on the CPU, by argument
    joined: Joined | None = None  # where `NetworkCall.rest` is joined to the states
    gives_residuals: bool = False  # its output is an input of another network, as with a ControlNet


PER_SAMPLE_OPTIONS = frozenset({"ip_adapter_image_embeds"})
SHARED_OPTIONS = frozenset({"ip_adapter_masks"})

_CONDITIONING = frozenset({
    "encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask", "encoder_attention_mask",
    "added_cond_kwargs",
})  # fmt: skip
_CROSS_ATTENTION = frozenset({"cross_attention_kwargs"})
NETWORKS = {
    "UNet2DConditionModel": Network(
        "sample",
        _CONDITIONING | {"down_intrablock_additional_residuals"},
        # a ControlNet has already computed its residuals for all rows
        shared=frozenset({"down_block_additional_residuals", "mid_block_additional_residual", "return_dict"}),
        options=_CROSS_ATTENTION,
    ),
    "UNet2DModel": Network("sample", frozenset({"class_labels"})),
    "ControlNetModel": Network(
        "sample",
        _CONDITIONING | {"controlnet_cond"},
        shared=frozenset({"conditioning_scale", "guess_mode", "return_dict"}),
        options=_CROSS_ATTENTION,
        gives_residuals=True,
    ),
    "SD3Transformer2DModel": Network(
        "hidden_states",
        frozenset({"encoder_hidden_states", "pooled_projections"}),
        options=frozenset({"joint_attention_kwargs"}),
    ),
    "FluxTransformer2DModel": Network(
        "hidden_states",
        frozenset({"encoder_hidden_states", "pooled_projections", "guidance"}),
        shared=frozenset({"txt_ids", "img_ids", "return_dict"}),
        options=frozenset({"joint_attention_kwargs"}),
        time=_thousandths,
        channels=2,
    ),
    "PixArtTransformer2DModel": Network("hidden_states", _CONDITIONING, options=_CROSS_ATTENTION),
    "DiTTransformer2DModel": Network("hidden_states", frozenset({"class_labels"}), options=_CROSS_ATTENTION),
}
NETWORKS["MultiControlNetModel"] = NETWORKS["ControlNetModel"]


@dataclass(frozen=True)
class Loop:
    """A description of a pipeline's loop."""

    networks: tuple[str, ...]  # names of the components that the loop calls
    copies: int = 1  # of the state in the loop (DiT has two under guidance)
    overwrites: bool = False  # it overwrites its state with what the scheduler scales for the network (DiT)
    why_turns: str | None = None  # why its first turn is not all that it does in the others; None: it is


def network_family(module: object) -> Network | None:
    """The family of a network, by class name, without torch.compile's wrapper; None if unknown."""
    names = (cls.__name__ for cls in type(unwrapped(module)).__mro__)
    return next((NETWORKS[name] for name in names if name in NETWORKS), None)


def is_compiled(module: Any) -> bool:
    """Whether a call of the module runs code from torch.compile."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def unwrapped(module: Any) -> Any:
    """The module that torch.compile wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def named_arguments(network: Any, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """The arguments of a call of a network by name."""
    # of the class: what a user puts in the place of `forward` may take (*args, **kwargs)
    names = list(inspect.signature(type(unwrapped(network)).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


@dataclass(slots=True, eq=False)  # not frozen: one is made for every wave, and that takes twice as long
class NetworkCall:
    """One call of a network by a pipeline's loop. Nothing changes it."""

    network: nn.Module
    family: Network
    arguments: dict[str, Any]  # by name, in order
    positional: int = 0  # how many of them are given by position: hooks on the network may depend on it
    rest: Tensor | None = None  # what is joined to the states, [branches * samples, ...]

    @property
    def states(self) -> Tensor:
        """The argument that holds the states, [branches * rows * samples, ...]."""
        states: Tensor = self.arguments[self.family.state]
        return states

    def through(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call a function in the network's place, with other arguments of the same names."""
        remaining = iter(arguments.items())
        by_position = [value for _, value in islice(remaining, self.positional)]
        return function(*by_position, **dict(remaining))

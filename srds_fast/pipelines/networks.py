"""The networks of a pipeline, and its guiders, which combine the outputs of network calls and count the steps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..engine.compiled import is_compiled, unwrapped
from ..engine.graphs.capturable import NetworkCalls
from ..errors import UnsupportedPipeline
from .lockstep.proxies import NetworkProxy


def check_pipeline(pipe: Any) -> None:
    """Raise UnsupportedPipeline unless it is a pipeline with a scheduler."""
    name = type(pipe).__name__
    if isinstance(pipe, type):
        raise UnsupportedPipeline(
            f"{pipe.__name__} is a class. compile() takes an instance. Pass {pipe.__name__}.from_pretrained(...)."
        )
    # the class is asked first: to gather the components takes a while
    gathers = hasattr(type(pipe), "components") or hasattr(pipe, "components")
    if not callable(pipe) or getattr(pipe, "scheduler", None) is None or not gathers:
        raise UnsupportedPipeline(
            f"{name} is no diffusers pipeline with a scheduler. compile() runs the loop of a pipeline. "
            "Pass a DiffusionPipeline, or call srds_fast.sample with a denoiser."
        )


def networks_of(pipe: Any) -> dict[str, Any]:
    """The networks that the loop of a pipeline may call, by name: all but the autoencoders."""
    from diffusers import ModelMixin

    parts = {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module)}
    models = {name: part for name, part in parts.items() if isinstance(unwrapped(part), ModelMixin)}
    return {name: part for name, part in models.items() if not hasattr(part, "decode")} or models or parts


def upcast_copies(pipe: Any) -> dict[str, Any]:
    """Copies of the parts that a pipeline casts to float32 in place, for a preview: the running call uses them."""
    return {
        name: copy.deepcopy(part)
        for name, part in pipe.components.items()
        if getattr(getattr(part, "config", None), "force_upcast", False) and part.dtype == torch.float16
    }


def training(networks: Iterable[nn.Module]) -> bool:
    """Whether a part of a network is in training mode: it may drop out, and draws random numbers for it."""
    return any(module.training for network in networks for module in network.modules())


def own_guiders(pipe: Any) -> dict[str, Any]:
    """The pipe's guiders by component name, as copies for one call: a loop writes its step into them."""
    return {
        name: _own(part)
        for name, part in vars(pipe).items()
        if any(cls.__name__ == "BaseGuidance" for cls in type(part).__mro__)
    }


def _own(guider: Any) -> Any:
    networks = {id(part): part for part in vars(guider).values() if isinstance(part, nn.Module)}
    twin = copy.deepcopy(guider, networks)  # it shares its networks
    # they look for the layers to put hooks on
    for name in ("prepare_models", "cleanup_models"):
        if hasattr(twin, name):
            setattr(twin, name, functools.partial(_on_network, getattr(twin, name)))
    return twin


def _on_network(function: Callable[[Any], None], network: Any) -> None:
    function(network.network if type(network) is NetworkProxy else network)


def network_calls(
    networks: Sequence[nn.Module], device: torch.device, replacements: Mapping[nn.Module, Callable[..., Any]]
) -> NetworkCalls:
    """What graphs of these networks depend on. replacements: maps a network to the callable to use instead."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backend = str(_AttentionBackendRegistry.get_active_backend()[0])  # of processors that name none
    return NetworkCalls(
        tuple(networks),
        device,
        (tuple(map(id, replacements.values())), backend),
        any(network in replacements or is_compiled(network) for network in networks),
    )

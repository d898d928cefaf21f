"""Guiders: components that combine the outputs of a network's calls, and count the steps of the loop meanwhile."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .lockstep.proxies import NetworkProxy


def own_guiders(pipe: Any) -> dict[str, Any]:
    """The pipe's guiders by component name, as copies for one call: a loop writes its step into them."""
    return {name: _own(guider) for name, guider in guiders_of(pipe).items()}


def guiders_of(pipe: Any) -> dict[str, Any]:
    """The pipe's guiders by component name."""
    return {
        name: part
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

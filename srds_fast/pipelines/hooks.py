"""Hooks of accelerate and diffusers on a pipeline's modules: those that move weights, or keep a state between calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# attributes that hold them
OFFLOADING = frozenset({"_hf_hook", "_diffusers_hook"})


def hooked(root: nn.Module) -> list[nn.Module]:
    """A module and its submodules that have hooks.

    Every call of a pipeline looks for them, so this walks the dictionaries: `modules()` takes three times as long.
    """
    found, left = [], [root]
    while left:
        module = left.pop()
        if not OFFLOADING.isdisjoint(module.__dict__):
            found.append(module)
        left += [child for child in module._modules.values() if child is not None]
    return found


def hooks_of(root: nn.Module) -> Iterator[Any]:
    """diffusers' hooks on a module and its submodules."""
    for module in hooked(root):
        registry = getattr(module, "_diffusers_hook", None)
        yield from [] if registry is None else registry.hooks.values()


def is_offloaded(network: nn.Module) -> bool:
    """Whether hooks move the weights of a network at every call."""
    if any(hasattr(module, "_hf_hook") for module in hooked(network)):
        return True
    return any(hasattr(hook, "next_group") or hasattr(hook, "group") for hook in hooks_of(network))


def execution_device(pipe: Any) -> torch.device:
    """The device that the networks of a pipeline run on.

    diffusers' own property looks at every module four times, which takes some milliseconds: it is asked only where
    there are hooks, or parts on several devices.
    """
    parts = [part for part in vars(pipe).values() if isinstance(part, nn.Module)]
    if not any(hooked(part) for part in parts):
        first = [next(itertools.chain(part.parameters(), part.buffers()), None) for part in parts]
        devices = {tensor.device for tensor in first if tensor is not None}
        if len(devices) == 1:
            return devices.pop()
    found: torch.device = pipe._execution_device
    return found

"""The layout of convolution weights: channels last, or contiguous."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn

from .hold import held, name_of


def layout_set(network: nn.Module, channels_last: bool) -> AbstractContextManager[list[str]]:
    """Set the layout of a convolution network's weights; yields reasons why it was not set.

    Parameters stay the same objects with the same values, but their storage moves: captured graphs become invalid.
    """
    # a transformer's only convolution makes the patches: its stride equals its kernel size
    if any(isinstance(each, nn.Conv2d) and each.kernel_size != each.stride for each in network.modules()):
        return held(network, "channels_last", channels_last, _lay_out)
    option = f"channels_last={channels_last}"
    return nullcontext([f"{option} changes nothing in {name_of(network)}: it is no convolution network"])


def _lay_out(network: nn.Module, channels_last: bool, undo: ExitStack) -> list[str]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for parameter in network.parameters():
        weight = parameter.data
        # neither quantized, distributed nor on the meta device
        plain = type(weight) is Tensor and weight.dim() == 4 and not weight.is_meta
        # nn.Module.to would write every parameter in every call, even while other calls read them
        if plain and not weight.is_contiguous(memory_format=layout):
            parameter.data = weight.contiguous(memory_format=layout)
    return []

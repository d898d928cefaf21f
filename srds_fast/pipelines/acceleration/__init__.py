"""Network options of a call: attention, layout of the weights, torch.compile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ...errors import InvalidArgument
from ..networks import is_compiled
from .attention import attention_set, check_attention
from .compiled import Compiled, check_torch_compile, compiled
from .hold import name_of
from .layout import layout_set


@dataclass(frozen=True)
class NetworkOptions:
    """The network options that the user asked for.

    Attributes:
        attention: "auto" changes nothing; "sdpa" is torch's attention; "xformers"; or the name of a diffusers backend.
        channels_last: True: channels-last convolution weights; False: contiguous ones; None changes nothing.
        torch_compile: a mode of torch.compile that captures no CUDA graphs itself; None: no compilation.

    Raises:
        InvalidArgument: a name, mode or switch is unknown.
    """

    attention: str = "auto"
    channels_last: bool | None = None
    torch_compile: str | None = None

    def __post_init__(self) -> None:
        check_attention(self.attention)
        check_torch_compile(self.torch_compile)
        if not isinstance(self.channels_last, bool | None):
            raise InvalidArgument(
                f"channels_last is {self.channels_last!r}. It is a switch. Pass True, False, or None to change nothing."
            )


@dataclass
class Applied:
    """The result of `applied`.

    Attributes:
        replacements: maps a network to its compiled version. Call that version instead.
        reasons: why options were not applied. The list is complete when the `with` block ends.
    """

    replacements: dict[nn.Module, Compiled] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


@contextmanager
def applied(networks: Iterable[nn.Module], options: NetworkOptions, device: torch.device) -> Iterator[Applied]:
    """Apply the options to the networks, and restore their attention afterwards.

    Concurrent calls share a setting. If a running call has set another value, this call keeps that value and gets a
    reason. The layout is not restored: that would copy all weights twice per call.

    Args:
        networks: the modules that the pipeline calls in its loop.
        device: where the networks run; an offloaded network may be on another device now.
    """
    made = Applied()
    with ExitStack() as settings:
        for network in networks:
            if options.attention != "auto":
                made.reasons += settings.enter_context(attention_set(network, options.attention, device))
            if options.channels_last is not None:
                made.reasons += settings.enter_context(layout_set(network, options.channels_last))
            if options.torch_compile is not None and not is_compiled(network):
                made.replacements[network] = compiled(network, options.torch_compile)
            elif options.torch_compile is not None:
                asked = f"torch_compile={options.torch_compile!r}"
                made.reasons.append(f"{asked} was left out: {name_of(network)} is compiled already")
        try:
            yield made
        finally:
            made.reasons += [each.failure for each in made.replacements.values() if each.failure is not None]

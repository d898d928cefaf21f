"""How networks are computed during a call: their attention, the layout of their weights, torch.compile."""

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
    """How the user wants the networks to be computed.

    Attributes:
        attention: "auto" leaves it as it is; "sdpa" is torch's; "xformers"; or the name of a diffusers backend.
        channels_last: lay convolution weights out so, or (False) contiguously; None leaves them as they are.
        torch_compile: a mode of torch.compile that captures no CUDA graphs of its own; None does not compile.

    Raises:
        InvalidArgument: a name, mode or switch that is not known.
    """

    attention: str = "auto"
    channels_last: bool | None = None
    torch_compile: str | None = None

    def __post_init__(self) -> None:
        check_attention(self.attention)
        check_torch_compile(self.torch_compile)
        if not isinstance(self.channels_last, bool | None):
            raise InvalidArgument(
                f"channels_last is {self.channels_last!r}. It is a switch. Pass True, False, or None to leave it."
            )


@dataclass
class Applied:
    """What `applied` did.

    Attributes:
        instead: maps a network to its compiled version, which is to be called in its place.
        reasons: what was asked for and could not be had, and why. Complete when the `with` block has ended.
    """

    instead: dict[nn.Module, Compiled] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


@contextmanager
def applied(networks: Iterable[nn.Module], options: NetworkOptions, device: torch.device) -> Iterator[Applied]:
    """Apply the options to the networks, and put their attention back afterwards.

    Calls that overlap share a setting. A call that wants another one than a running call has set goes on with what is
    set, and gets a reason. The layout stays: putting it back would copy all weights twice per call.

    Args:
        networks: the modules that the pipeline calls in its loop.
        device: where they run; offloaded networks may be elsewhere now.
    """
    made = Applied()
    with ExitStack() as settings:
        for network in networks:
            if options.attention != "auto":
                made.reasons += settings.enter_context(attention_set(network, options.attention, device))
            if options.channels_last is not None:
                made.reasons += settings.enter_context(layout_set(network, options.channels_last))
            if options.torch_compile is not None and not is_compiled(network):
                made.instead[network] = compiled(network, options.torch_compile)
            elif options.torch_compile is not None:
                asked = f"torch_compile={options.torch_compile!r}"
                made.reasons.append(f"{asked} was left out: {name_of(network)} is compiled already")
        try:
            yield made
        finally:
            made.reasons += [each.failure for each in made.instead.values() if each.failure is not None]

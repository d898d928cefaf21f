"""Network options of a call: attention, layout of the weights, torch.compile.

Two functions of diffusers are not used. `model.set_attention_backend` changes the backend of the whole process.
`enable_xformers_memory_efficient_attention` replaces the user's own processors, and it draws from the random generator
of the device, which changes the images.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..caches import cached
from ..engine.compiled import (
    AUTO,
    MODES,
    CompiledIfFaster,
    CompiledNetwork,
    compiled,
    compiled_if_faster,
    first_sentence,
    is_compiled,
    name_of,
)
from ..engine.distributed import call as distributed
from ..errors import InvalidArgument, shown

# each has a version for torch's attention (suffix "2_0") and one for xformers (prefix "XFormers")
STOCK_PROCESSORS = ("AttnProcessor", "AttnAddedKVProcessor", "JointAttnProcessor")


@dataclass(frozen=True)
class NetworkOptions:
    """The options that the user gave to `compile`, checked; whether an attention can run here is seen at the call."""

    attention: str = "auto"
    channels_last: bool | None = None
    torch_compile: str | None = None

    def __post_init__(self) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName

        if not isinstance(self.attention, str) or self.attention not in [
            "auto",
            "sdpa",
            *(each.value for each in AttentionBackendName),
        ]:
            raise InvalidArgument(
                f"attention is {shown(self.attention)}. diffusers has no attention backend of that name. "
                "Pass 'auto', 'sdpa', 'xformers' or a value of diffusers' AttentionBackendName."
            )
        mode = self.torch_compile
        if mode is not None and (not isinstance(mode, str) or mode not in (AUTO, *MODES)):
            raise InvalidArgument(
                f"torch_compile is {shown(self.torch_compile)}. The mode of torch.compile must not capture CUDA graphs "
                f"itself. Pass None or one of {', '.join(map(repr, (AUTO, *MODES)))}."
            )
        if not isinstance(self.channels_last, bool | None):
            raise InvalidArgument(
                f"channels_last is {shown(self.channels_last)}. It is a switch. "
                "Pass True, False, or None to change nothing."
            )


@dataclass
class Applied:
    """What the options came to in a call.

    replacements: the compiled versions to call instead of networks. not_set: why settings could not be set. before: the
    seconds of `compiling` when the call began.
    """

    replacements: dict[nn.Module, CompiledNetwork | CompiledIfFaster] = field(default_factory=dict)
    not_set: list[str] = field(default_factory=list)
    before: float = 0.0

    @property
    def reasons(self) -> list[str]:
        """Why options were not applied, as far as is known: networks are compiled when they are called."""
        return [*self.not_set, *(each.failure for each in self.replacements.values() if each.failure is not None)]

    @property
    def compile_seconds(self) -> float:
        """What choosing between networks and their compiled versions has taken in this call."""
        return self.compiling() - self.before

    def compiling(self) -> float:
        """The same, since the networks were first called."""
        return sum(each.seconds for each in self.replacements.values() if isinstance(each, CompiledIfFaster))


@contextmanager
def applied(networks: Iterable[nn.Module], options: NetworkOptions, device: torch.device) -> Iterator[Applied]:
    """Apply the options to the networks that a call runs on a device, and restore their attention afterwards."""
    made = Applied()
    attention, channels_last, mode = options.attention, options.channels_last, options.torch_compile
    with ExitStack() as settings:
        for network in networks:
            if attention != "auto":
                if why := _why_no_attention(network, attention, device):
                    made.not_set.append(f"attention={attention!r} cannot be used: {why}")
                else:
                    made.not_set += settings.enter_context(_held(network, "attention", attention, _switch_attention))
            if channels_last is not None:
                # a transformer's only convolution makes the patches: its stride equals its kernel size
                if any(isinstance(each, nn.Conv2d) and each.kernel_size != each.stride for each in network.modules()):
                    made.not_set += settings.enter_context(_held(network, "channels_last", channels_last, _lay_out))
                else:
                    left = f"channels_last={channels_last} changes nothing in {name_of(network)}"
                    made.not_set.append(f"{left}: it is no convolution network")
            if mode is not None and is_compiled(network):
                made.not_set.append(f"torch_compile={mode!r} was left out: {name_of(network)} is compiled already")
            elif mode is not None:
                made.replacements[network] = compiled_if_faster(network) if mode == AUTO else compiled(network, mode)
        if (call := distributed.current()) is not None:
            for each in made.replacements.values():
                if isinstance(each, CompiledIfFaster):
                    each.agree(call)
        made.before = made.compiling()
        yield made


@dataclass
class _Hold:
    """A setting that running calls share: the first call sets it, the last one restores it."""

    value: Any
    reasons: list[str]
    undo: ExitStack
    users: int = 0


# for all pipelines of the process: they may share a network
_lock = threading.Lock()
_holds: dict[tuple[nn.Module, str], _Hold] = {}


@contextmanager
def _held(
    network: nn.Module, setting: str, value: Any, switch: Callable[[nn.Module, Any, ExitStack], list[str]]
) -> Iterator[list[str]]:
    """Keep a setting while the block runs; yields reasons why it, or a part of it, could not be set.

    If another value is set, the call does not wait for it: a call nested in the one that set it would deadlock. It
    still counts as a user, because the network must not change between its waves.
    """
    key = (network, setting)
    with _lock:
        if key not in _holds:
            with ExitStack() as undo:
                _holds[key] = _Hold(value, switch(network, value, undo), undo.pop_all())
        hold = _holds[key]
        hold.users += 1
    try:
        if hold.value == value:
            yield hold.reasons
        else:
            left = f"{setting}={value!r} was not set on {name_of(network)}"
            yield [f"{left}: another call is using it with {setting}={hold.value!r}"]
    finally:
        with _lock:
            hold.users -= 1
            if hold.users == 0:
                del _holds[key]
                hold.undo.close()


def _why_no_attention(network: Any, name: str, device: torch.device) -> str | None:
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else network.dtype
    if dtype.itemsize == 1:  # a storage dtype: diffusers converts the weights before it uses them
        dtype = torch.bfloat16
    head_dims = {each.inner_dim // each.heads for each in _attentions(network) if hasattr(each, "inner_dim")}
    try:
        for head_dim in sorted(head_dims) or [64]:
            _try_attention(_backend(name), head_dim, dtype, device)
    except Exception as why:  # attention libraries raise errors of many types
        return first_sentence(why)
    return None


@cached
def _try_attention(backend: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compute one small attention. The cache remembers a success, not a failure."""
    from diffusers.models import attention_dispatch as dispatch

    name = dispatch.AttentionBackendName(backend)
    dispatch._check_attention_backend_requirements(name)
    dispatch._maybe_download_kernel_for_backend(name)
    x = torch.zeros(1, 16, 2, head_dim, dtype=dtype, device=device)
    with torch.no_grad():
        dispatch.dispatch_attention_fn(x, x, x, backend=name)


def _switch_attention(network: nn.Module, name: str, undo: ExitStack) -> list[str]:
    from diffusers.models.attention_dispatch import AttentionBackendName

    unchanged = set()
    for module in _attentions(network):
        owner, attribute, value = module, "processor", _equivalent(module, _backend(name))
        if hasattr(module.processor, "_attention_backend"):
            owner, attribute, value = module.processor, "_attention_backend", AttentionBackendName(_backend(name))
        if value is None:
            unchanged.add(type(module.processor).__name__)
        else:
            undo.callback(_put_back, owner, attribute, value, getattr(owner, attribute))
            setattr(owner, attribute, value)
    left = f"attention={name!r} was left out where {name_of(network)} has {', '.join(sorted(unchanged))}"
    return [left] if unchanged else []


def _put_back(owner: Any, attribute: str, value: Any, before: Any) -> None:
    if getattr(owner, attribute) is value:  # a callback may have set another one, which stays
        setattr(owner, attribute, before)


def _equivalent(module: Any, backend: str) -> object | None:
    """The stock processor that computes the same with this backend, or None."""
    from diffusers.models import attention_processor as stock

    kind = type(module.processor)
    family = kind.__name__.removeprefix("XFormers").removesuffix("2_0")
    # a user's subclass of a stock processor may compute something else
    if family not in STOCK_PROCESSORS or getattr(stock, kind.__name__, None) is not kind:
        return None
    if backend == "xformers":
        return _shared(getattr(stock, f"XFormers{family}"))
    # torch's processors always scale the queries
    return _shared(getattr(stock, f"{family}2_0")) if backend == "native" and module.scale_qk else None


@functools.cache
def _shared(kind: type) -> object:
    """One object for all calls: compiled code and captured graphs are valid for one object only."""
    return kind()


def _backend(name: str) -> str:
    return "native" if name == "sdpa" else name


def _attentions(network: nn.Module) -> list[Any]:
    return [each for each in network.modules() if hasattr(each, "set_processor") and hasattr(each, "processor")]


def _lay_out(network: nn.Module, channels_last: bool, _undo: ExitStack) -> list[str]:
    """Parameters stay the same objects with the same values, but their storage moves: captured graphs are invalid."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for parameter in network.parameters():
        weight = parameter.data
        # neither quantized, distributed nor on the meta device
        plain = type(weight) is Tensor and weight.dim() == 4 and not weight.is_meta
        # nn.Module.to would write every parameter in every call, even while other calls read them
        if plain and not weight.is_contiguous(memory_format=layout):
            parameter.data = weight.contiguous(memory_format=layout)
    return []

"""The network made fast: its attention, the layout of its weights, and torch.compile.

What is switched belongs to the user's pipeline, so a switch of the attention lasts as long as the calls that asked for
it: the first of them makes it, the last one puts everything back. What cannot be had is not an error but a reason, to
be shown in the report; the call goes on with what was there.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .errors import InvalidArgument
from .pipelines.networks import is_compiled

MODES = ("default", "max-autotune-no-cudagraphs")
_MODES_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
_UNSET = object()
_numbers = itertools.count()


def check_attention(name: str) -> None:
    """Refuse what is neither "auto", "sdpa", "xformers" nor one of diffusers' attention backends.

    Raises:
        InvalidArgument: the name is not known. Whether it can run here is another matter, see `faster`.
    """
    if name in ("auto", "sdpa", "xformers"):
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    if not isinstance(name, str) or name not in {each.value for each in AttentionBackendName}:
        raise InvalidArgument(
            f"attention is {name!r}. diffusers has no attention backend of that name. "
            "Pass 'auto', 'sdpa', 'xformers' or a value of diffusers' AttentionBackendName."
        )


def check_torch_compile(mode: str | None) -> None:
    """Refuse modes that torch.compile does not have, and those that capture CUDA graphs of their own.

    Raises:
        InvalidArgument: such a mode; the message names the one to pass.
    """
    if mode is None or mode in MODES:
        return
    if mode in _MODES_WITHOUT_GRAPHS:
        raise InvalidArgument(
            f"torch_compile is {mode!r}. That mode captures CUDA graphs of its own, which cannot be captured again. "
            f"Pass {_MODES_WITHOUT_GRAPHS[mode]!r}."
        )
    raise InvalidArgument(
        f"torch_compile is {mode!r}. It is a mode of torch.compile. Pass None or one of {', '.join(map(repr, MODES))}."
    )


@dataclass(frozen=True)
class NetworkOptions:
    """What `faster` is asked for; the meaning is there.

    Raises:
        InvalidArgument: a name, mode or switch that is not known.
    """

    attention: str = "auto"
    channels_last: bool | None = None
    torch_compile: str | None = None

    def __post_init__(self) -> None:
        check_attention(self.attention)
        check_torch_compile(self.torch_compile)
        if self.channels_last is not None and not isinstance(self.channels_last, bool):
            raise InvalidArgument(
                f"channels_last is {self.channels_last!r}. It is a switch. Pass True, False, or None to leave it."
            )


@dataclass
class Faster:
    """What `faster` made.

    Attributes:
        networks: what to call instead of the networks, in their order; the networks themselves unless compiled.
        reasons: what was asked for and could not be had, and why. Complete when the `with` block has ended.
    """

    networks: tuple[Any, ...]
    reasons: list[str] = field(default_factory=list)


@contextmanager
def faster(
    networks: Iterable[Any],
    attention: str = "auto",
    channels_last: bool | None = None,
    torch_compile: str | None = None,
    device: torch.device | None = None,
) -> Iterator[Faster]:
    """Switch the networks for the time they are called in, and put the attention back as it was.

    Calls that overlap, in threads or nested, share one switch. One that wants something else than is set on a network
    at that time does not wait (it could wait for itself): it goes on with what is set, and has that as a reason. Others
    that use the network meanwhile see it switched; that changes rounding only.

    The layout is not put back, as that would copy all weights twice a call: values and behaviour are the same, and
    `lay_out(network, False)` undoes it.

    Args:
        networks: the modules a pipeline calls in its loop.
        attention: "auto" leaves it as it is; "sdpa" is torch's; "xformers"; or a backend of diffusers.
        channels_last: lay convolution weights out so, or (False) not so; None leaves them as they are.
        torch_compile: a mode of torch.compile without CUDA graphs of its own.
        device: where the networks will run, if they are elsewhere now because they are offloaded.

    Raises:
        InvalidArgument: a name or mode that is not known.
    """
    check_attention(attention)
    check_torch_compile(torch_compile)
    made = Faster(tuple(networks))
    if attention == "auto" and channels_last is None and torch_compile is None:
        yield made
        return
    reasons: list[str] = []
    originals = made.networks
    with ExitStack() as switched:
        for network in dict.fromkeys(originals):
            if attention != "auto":
                reasons += switched.enter_context(_attention_held(network, attention, device or network.device))
            if channels_last is not None:
                reasons += switched.enter_context(_layout_held(network, channels_last))
        if torch_compile is not None:
            switched.enter_context(torch_flags_kept())
            reasons += [
                f"torch_compile={torch_compile!r} was left out: {_name(network)} is compiled already"
                for network in originals
                if is_compiled(network)
            ]
            made.networks = tuple(each if is_compiled(each) else compiled(each, torch_compile) for each in originals)
        made.reasons += dict.fromkeys(reasons)
        try:
            yield made
        finally:
            failures = [each.failure for each in made.networks if isinstance(each, Compiled)]
            made.reasons += dict.fromkeys(failure for failure in failures if failure is not None)


def _first_sentence(error: BaseException) -> str:
    said = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".:")
    return said or type(error).__name__


def _name(network: Any) -> str:
    return type(getattr(network, "_orig_mod", network)).__name__


@dataclass
class _Hold:
    """What is set on a network now, and for how many calls."""

    value: Any
    reasons: list[str]
    undo: ExitStack
    users: int = 0


_lock = threading.Lock()
_holds: weakref.WeakKeyDictionary[Any, dict[str, _Hold]] = weakref.WeakKeyDictionary()


@contextmanager
def _held(network: Any, what: str, value: Any, switch: Callable[[ExitStack], list[str]]) -> Iterator[list[str]]:
    """Keep a network switched until its last user leaves; yields reasons.

    A call that wants another value counts as a user as well: the network does not change under it, where a wave
    computed one way would meet a wave computed the other way.
    """
    with _lock:
        holds = _holds.setdefault(network, {})
        hold = holds.get(what)
        if hold is None:
            with ExitStack() as undo:
                hold = holds[what] = _Hold(value, switch(undo), undo.pop_all())
        hold.users += 1
    try:
        if hold.value == value:
            yield hold.reasons
        else:
            yield [
                f"{what}={value!r} was not set on {_name(network)}: another call is using it with {what}={hold.value!r}"
            ]
    finally:
        with _lock:
            hold.users -= 1
            if hold.users == 0:
                del holds[what]
                hold.undo.close()


@contextmanager
def _attention_held(network: Any, attention: str, device: torch.device) -> Iterator[list[str]]:
    modules = [each for each in network.modules() if hasattr(each, "set_processor") and hasattr(each, "processor")]
    backend = "native" if attention == "sdpa" else attention
    reason = _why_not(network, modules, attention, backend, device)
    if reason is not None:
        yield [reason]
        return

    def switch(undo: ExitStack) -> list[str]:
        return _switch_attention(network, modules, attention, backend, undo)

    with _held(network, "attention", attention, switch) as reasons:
        yield reasons


def _why_not(network: Any, modules: list[Any], attention: str, backend: str, device: torch.device) -> str | None:
    """Why nothing in this network can be switched to that backend here, or None."""
    by_backend = [each for each in modules if hasattr(each.processor, "_attention_backend")]
    if not by_backend and backend not in ("native", "xformers"):
        return (
            f"attention={attention!r} changes nothing in {_name(network)}: its attention does not go through "
            "diffusers' backends"
        )
    head_dims = {each.inner_dim // each.heads for each in modules if hasattr(each, "inner_dim")}
    try:
        for head_dim in sorted(head_dims) or [64]:
            _try_backend(backend, head_dim, _attention_dtype(network, device), device)
        _check_context_parallel(backend, by_backend)
    except Exception as why:  # attention libraries raise what they like
        return f"attention={attention!r} cannot be used: {_first_sentence(why)}"
    return None


def _attention_dtype(network: Any, device: torch.device) -> torch.dtype | None:
    """The dtype attention is computed in; None where the weights are stored in another one than they are used in."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return network.dtype if network.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) else None


@functools.cache
def _try_backend(backend: str, head_dim: int, dtype: torch.dtype | None, device: torch.device) -> None:
    """Compute one small attention. Success is remembered, failure is not.

    diffusers' own trial of xformers draws from the generator of the device, which would change the user's images.
    """
    from diffusers.models import attention_dispatch

    if backend == "native":
        return
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ModuleNotFoundError("xformers is not installed")
    if backend == "xformers" and device.type != "cuda":
        raise ValueError(f"xformers runs on CUDA devices only, and the network is on {device.type}")
    name = attention_dispatch.AttentionBackendName(backend)
    attention_dispatch._check_attention_backend_requirements(name)
    attention_dispatch._maybe_download_kernel_for_backend(name)
    if dtype is not None:
        x = torch.zeros(1, 16, 2, head_dim, dtype=dtype, device=device)
        with torch.no_grad():
            attention_dispatch.dispatch_attention_fn(x, x, x, backend=name)


def _check_context_parallel(backend: str, modules: list[Any]) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    parallel = any(getattr(each.processor, "_parallel_config", None) is not None for each in modules)
    if parallel and not _AttentionBackendRegistry._is_context_parallel_available(AttentionBackendName(backend)):
        raise ValueError("the network is context parallel, which this backend does not support")


def _switch_attention(network: Any, modules: list[Any], attention: str, backend: str, undo: ExitStack) -> list[str]:
    """Switch every attention module that can be; returns reasons for those that cannot."""
    replacements = _replacements(backend)
    left = set()
    for module in modules:
        processor = module.processor
        kind = type(processor)
        if hasattr(processor, "_attention_backend"):
            _set_backend(processor, backend, undo)
        elif kind in replacements and (backend == "xformers" or module.scale_qk):
            _set_processor(module, _shared(replacements[kind]), undo)
        elif kind not in replacements.values():
            left.add(kind.__name__)
    if not left:
        return []
    return [f"attention={attention!r} was left out where {_name(network)} has {', '.join(sorted(left))}"]


def _set_backend(processor: Any, backend: str, undo: ExitStack) -> None:
    """What `model.set_attention_backend` does to a processor.

    The method itself would also change the backend of every other model in the process, and `reset_attention_backend`
    would forget a backend that the user had set.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    name = AttentionBackendName(backend)
    before = vars(processor).get("_attention_backend", _UNSET)

    def put_back() -> None:
        if vars(processor).get("_attention_backend") is not name:
            return  # somebody else has set it since
        if before is _UNSET:
            del processor._attention_backend
        else:
            processor._attention_backend = before

    processor._attention_backend = name
    undo.callback(put_back)


def _set_processor(module: Any, processor: Any, undo: ExitStack) -> None:
    before = module.processor

    def put_back() -> None:
        if module.processor is processor:
            module.set_processor(before)

    module.set_processor(processor)
    undo.callback(put_back)


def _replacements(backend: str) -> dict[type, type]:
    """Stock processors that do not go through diffusers' backends, and what computes the same through this one."""
    from diffusers.models import attention_processor as stock

    if backend == "xformers":
        return {
            stock.AttnProcessor: stock.XFormersAttnProcessor,
            stock.AttnProcessor2_0: stock.XFormersAttnProcessor,
            stock.AttnAddedKVProcessor: stock.XFormersAttnAddedKVProcessor,
            stock.AttnAddedKVProcessor2_0: stock.XFormersAttnAddedKVProcessor,
            stock.JointAttnProcessor2_0: stock.XFormersJointAttnProcessor,
        }
    if backend == "native":
        return {
            stock.AttnProcessor: stock.AttnProcessor2_0,
            stock.XFormersAttnProcessor: stock.AttnProcessor2_0,
            stock.AttnAddedKVProcessor: stock.AttnAddedKVProcessor2_0,
            stock.XFormersAttnAddedKVProcessor: stock.AttnAddedKVProcessor2_0,
            stock.XFormersJointAttnProcessor: stock.JointAttnProcessor2_0,
        }
    return {}


@functools.cache
def _shared(kind: type) -> Any:
    """The same processor in every call: compiled code is guarded by its identity."""
    return kind()


@contextmanager
def _layout_held(network: Any, channels_last: bool) -> Iterator[list[str]]:
    def switch(_: ExitStack) -> list[str]:
        if not _convolves(network):
            return [f"channels_last={channels_last} changes nothing in {_name(network)}: it is no convolution network"]
        lay_out(network, channels_last)
        return []

    with _held(network, "channels_last", channels_last, switch) as reasons:
        yield reasons


def lay_out(network: nn.Module, channels_last: bool) -> bool:
    """Lay the four-dimensional weights of a convolution network out as torch.channels_last, or contiguously.

    Parameters stay the same objects with the same values, those of LoRA layers and shared ones as well; their storage
    is another one, so captured CUDA graphs of the network are void. Networks whose only convolution embeds patches are
    left alone, and so are weights on the meta device and tensor subclasses (quantized, distributed).

    Returns:
        Whether anything changed.
    """
    if not _convolves(network):
        return False
    layout = torch.channels_last if channels_last else torch.contiguous_format
    changed = False
    for parameter in network.parameters():
        weight = parameter.data
        plain = type(weight) is torch.Tensor and weight.dim() == 4 and not weight.is_meta
        if plain and not weight.is_contiguous(memory_format=layout):
            parameter.data = weight.contiguous(memory_format=layout)
            changed = True
    return changed


def _convolves(network: nn.Module) -> bool:
    """Whether any convolution mixes pixels, and does not merely cut patches."""
    return any(
        isinstance(module, nn.Conv2d)
        and max(module.kernel_size) > 1
        and module.stride != module.kernel_size
        and module.groups == 1
        for module in network.modules()
    )


class Compiled:
    """A network run through torch.compile. Attributes are the network's own.

    Refers to the network weakly: whoever calls it holds the network. The network itself is not changed. If it cannot be
    compiled here, for want of a C++ compiler for instance, it is called as it is.

    Attributes:
        failure: why it is called as it is, or None.
    """

    def __init__(self, network: nn.Module, mode: str, backend: str | Callable[..., Any]) -> None:
        self.failure: str | None = None
        self._mode = mode
        self._network = weakref.ref(network)

        # the network is an argument, as a closure would keep it alive
        def call(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return network(*args, **kwargs)

        # torch keeps compiled code, its limit and the shapes it has seen by code object, file, line and name
        call.__code__ = call.__code__.replace(co_name=f"call_{_name(network)}_{next(_numbers)}")
        options = None
        if backend == "inductor":
            # a mode cannot be combined with options, and the user may have turned graphs on for all compilations
            options = {**torch._inductor.list_mode_options(mode), "triton.cudagraphs": False}
        self._call = torch.compile(call, backend=backend, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network = self._alive()
        if self.failure is None:
            try:
                return self._call(network, *args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as why:
                # the network's own errors are such too: then the call below raises them
                said = _first_sentence(getattr(why, "inner_exception", why))
            output = network(*args, **kwargs)
            self.failure = f"torch_compile={self._mode!r} failed on {_name(network)}: {said}"
            return output
        return network(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and "_network" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._alive(), name)

    def _alive(self) -> Any:
        network = self._network()
        if network is None:
            raise ReferenceError("The compiled network is gone. It is held weakly here. Keep a reference to it.")
        return network


_compiled: weakref.WeakKeyDictionary[Any, dict[Any, Compiled]] = weakref.WeakKeyDictionary()


def compiled(network: nn.Module, mode: str, _backend: str | Callable[..., Any] = "inductor") -> Compiled:
    """A compiled callable that shares the network's parameters; the same one for the same network and mode.

    Nothing is compiled before its first call.

    Raises:
        InvalidArgument: a mode that is not known or has CUDA graphs of its own.
    """
    check_torch_compile(mode)
    with _lock:
        by_mode = _compiled.setdefault(network, {})
        if (mode, _backend) not in by_mode:
            by_mode[mode, _backend] = Compiled(network, mode, _backend)
        return by_mode[mode, _backend]


_PRECISIONS = (
    "",
    "cuda.matmul",
    "cudnn",
    "cudnn.conv",
    "cudnn.rnn",
    "mkldnn",
    "mkldnn.matmul",
    "mkldnn.conv",
    "mkldnn.rnn",
)


@contextmanager
def torch_flags_kept() -> Iterator[None]:
    """Put back process-wide torch flags that are changed inside: float32 precision (TF32) and cuDNN's choices.

    They belong to the process: other threads see them changed meanwhile.
    """
    backends = torch.backends
    benchmark, deterministic = backends.cudnn.benchmark, backends.cudnn.deterministic
    legacy = _legacy_precision()
    precisions = {name: _precision_owner(name).fp32_precision for name in _PRECISIONS}
    try:
        yield
    finally:
        backends.cudnn.benchmark, backends.cudnn.deterministic = benchmark, deterministic
        if legacy is not None and legacy != _legacy_precision():
            matmul, cudnn_tf32 = legacy
            torch.set_float32_matmul_precision(matmul)
            backends.cudnn.allow_tf32 = cudnn_tf32
        # the general ones first: what inherits from them must not be pinned
        for name, precision in precisions.items():
            if _precision_owner(name).fp32_precision != precision:
                _precision_owner(name).fp32_precision = precision


def _precision_owner(name: str) -> Any:
    return functools.reduce(getattr, filter(None, name.split(".")), torch.backends)


def _legacy_precision() -> tuple[str, bool] | None:
    """Matmul precision and cuDNN's TF32; None where they were set in the new way only, which cannot be read so."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None

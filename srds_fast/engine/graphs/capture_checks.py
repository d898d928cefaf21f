"""Capture checks: refuse what a graph cannot hold, while it is captured.

A replay repeats the launches of a capture and nothing else. An operation that waits for the device, copies from or to
the host, draws random numbers or has a shape that depends on values would break the capture, or be replayed with the
values it had in the capture. Such an operation is refused by name before it runs.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ...errors import CaptureFailed
from .cache_key import tensors_of

_aten = torch.ops.aten
_FROM_PYTHON = {_aten.lift_fresh.default, _aten.lift_fresh_copy.default}
# the shape of an index depends on values only where it is a mask
_INDEX = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten.copy.default}
# reads a flag on the device, but has no tag that says so
_WAITS = {_aten._linalg_check_errors.default}
# on a tensor of the host these run no operation: a graph would freeze the values that they read
_TO_HOST = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}
_SPLITS = {torch.tensor_split, Tensor.tensor_split}
_FROM_NUMBERS = {torch.tensor, Tensor.new_tensor}
_FROM_ANY = {torch.as_tensor, torch.asarray}
# arguments that switch random numbers on and off
_SWITCHES = ("dropout_p", "dropout", "p", "train", "training")
_NUMBERS = "makes a tensor from Python numbers, and a replay would always use the first ones"


class CaptureCheck(TorchDispatchMode):
    """Refuses operations that cannot be captured, and collects the tensors that are read from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0  # run so far, about as many as launches
        self.made: set[Hashable] = set()  # memory that was allocated in this capture, as `storage_of` it
        # tensors that existed before, in the order of their first use: held, so that no other gets their memory
        self.read: dict[Hashable, Tensor] = {}
        self.read_by_network: dict[Hashable, Tensor] = {}
        self._in_network = False
        self._numbers: set[Hashable] = set()
        self._functions = _Functions()

    def __enter__(self) -> Self:
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        super().__exit__(*why)
        self._functions.__exit__(*why)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse_uncapturable(func, args, kwargs, self._numbers)
        given = list(tensors_in((args, kwargs)))
        if self._in_network and func._schema.is_mutable:
            self._refuse_lasting_writes(func, args, kwargs)
        if func in _FROM_PYTHON:  # a number, as in x[0] = 1.0: others were refused
            self._numbers.update(map(storage_of, given))
        for tensor in given:
            storage = storage_of(tensor)  # a view of an outside tensor is an outside tensor
            if storage not in self.made and storage not in self._numbers:
                self.read.setdefault(storage, tensor)
                if self._in_network:
                    self.read_by_network.setdefault(storage, tensor)
        out = self.execute(func, args, kwargs)
        self.operations += 1
        self.made.update(map(storage_of, new_in(out, given)))
        return out

    def execute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation that was not refused."""
        return func(*args, **kwargs)

    @contextmanager
    def network(self, unseen: bool = False) -> Iterator[None]:
        """Within it, operations are those of the network. unseen: torch would compile it anew if they were checked."""
        self._in_network = True
        if unseen:  # both modes are left: compiled code is guarded by those that are on
            self._functions.__exit__(None, None, None)
        try:
            with _disable_current_modes() if unseen else nullcontext():
                yield
        finally:
            if unseen:
                self._functions.__enter__()
            self._in_network = False

    def _refuse_lasting_writes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for argument, value in _arguments(func, args, kwargs):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            if any(storage_of(tensor) not in self.made for tensor in tensors_in(value)):
                raise _refusal(str(func), "writes to a tensor that is kept after the call")


class _Functions(TorchFunctionMode):
    """Refuses functions that read or write values of the host without running an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TO_HOST or (func in _SPLITS and len(list(tensors_in((args, kwargs)))) > 1):
            raise _refusal(f"Tensor.{func.__name__}", "has the host read values")
        if func in _FROM_NUMBERS or (func in _FROM_ANY and not isinstance(args[0], Tensor)):
            raise _refusal(func.__name__, _NUMBERS)
        return func(*args, **kwargs)


def refuse_uncapturable(func: Any, args: Any, kwargs: dict[str, Any], numbers: Container[Hashable] = ()) -> None:
    """Raise CaptureFailed for an operation that a graph cannot hold; numbers: memory that holds Python numbers."""
    what = None
    if func in _FROM_PYTHON and not (args[0].ndim == 0 and args[0].device.type == "cpu"):
        what = _NUMBERS  # but for the number of x[0] = 1.0, which becomes an argument of the launch
    elif torch.Tag.data_dependent_output in func.tags or func in _WAITS:
        what = "makes the host wait for a value"
    elif _has_mask(args) if func in _INDEX else torch.Tag.dynamic_output_shape in func.tags:
        what = "has a shape that depends on values"
    elif torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
        what = "draws random numbers"
    elif len(devices := _devices(func, args, kwargs, numbers)) > 1:
        what = f"copies between {' and '.join(sorted(devices))}"
    if what is not None:
        raise _refusal(str(func), what)


def cannot_capture(why: str) -> CaptureFailed:
    return CaptureFailed(
        f"The loop cannot be recorded: {why}. The call runs without graphs. Pass engine='eager' to keep it so."
    )


def failed(error: Exception) -> CaptureFailed:
    """The error of a capture that broke off."""
    if isinstance(error, CaptureFailed):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return cannot_capture("the device has no memory left for it. Lower max_graphs or max_rows")
    first_line = str(error).partition("\n")[0]
    return cannot_capture(f"{type(error).__name__}: {first_line}")


def _refusal(name: str, what: str) -> CaptureFailed:
    return cannot_capture(f"{name} {what}. A replay would not repeat that")


def _has_mask(args: Any) -> bool:
    return any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))


def _arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The arguments of an operation, by its schema, with their values."""
    for index, argument in enumerate(func._schema.arguments):
        yield argument, kwargs.get(argument.name, args[index] if index < len(args) else argument.default_value)


def _draws(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    # torch marks attention and dropout as drawing even where nothing is dropped
    switches = [value for argument, value in _arguments(func, args, kwargs) if argument.name in _SWITCHES]
    return not any(value is not None and not value for value in switches)


def _devices(func: Any, args: Any, kwargs: dict[str, Any], numbers: Container[Hashable]) -> set[str]:
    # the host would read any other tensor without dimensions on the CPU, and its value would be frozen
    tensors = tensors_in((args, kwargs))
    devices = {each.device.type for each in tensors if func in _COPIES or storage_of(each) not in numbers}
    device = kwargs.get("device")
    return devices | {torch.device(device).type} if device is not None and devices else devices


def tensors_in(found: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))


def new_in(out: Any, given: Iterable[Tensor]) -> list[Tensor]:
    """The outputs of an operation in memory of their own."""
    storages = set(map(storage_of, given))
    return [tensor for tensor in tensors_in(out) if storage_of(tensor) not in storages]


def storage_of(tensor: Tensor) -> Hashable:
    """Equal for tensors in the same memory, also after it was freed: a weak reference keeps its identity."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError, ValueError):  # it has no memory of its own, such as a sparse one
        return (id(tensor),)


def refuse_unknown_reads(
    check: CaptureCheck, inputs: Iterable[Tensor], networks: Iterable[nn.Module], made: Iterable[Hashable] = ()
) -> None:
    """Refuse a network that read a tensor that nobody would compare before a replay. made: by earlier captures."""
    known = {*map(storage_of, inputs), *made}
    for network in networks:
        known.update(map(storage_of, tensors_of(network)))
    for storage, tensor in check.read_by_network.items():
        if storage not in known:
            raise cannot_capture(
                f"the network reads a tensor of shape {tuple(tensor.shape)} that is neither an argument nor held by "
                "one of its modules. A replay would not notice another tensor in its place. Make it a parameter or a "
                "buffer"
            )

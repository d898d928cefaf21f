"""Capture checks: refuse what a graph cannot hold, while it is captured.

A replay repeats the launches of a capture and nothing else. An operation that waits for the device, copies from or to
the host, draws random numbers or has a shape that depends on values would break the capture, or be replayed with the
values it had in the capture. Every operation of a capture passes through here, and such a one is refused by name before
it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager, nullcontext, suppress
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
# an index has a shape that depends on values only where it is a mask
_INDEX = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
# reads a flag on the device, which no tag of torch says
_WAITS = {_aten._linalg_check_errors.default}
# on the CPU these run no operation that could be refused
_TO_HOST = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}
_SPLITS = {torch.tensor_split, Tensor.tensor_split}  # it reads where to split from a tensor on the host
_FROM_NUMBERS = {torch.tensor, Tensor.new_tensor}
_FROM_ANY = {torch.as_tensor, torch.asarray}
# arguments that switch random numbers on and off
_SWITCHES = ("dropout_p", "dropout", "p", "train", "training")


class CaptureCheck(TorchDispatchMode):
    """Refuses operations that cannot be captured, and collects the tensors that are read from outside.

    Attributes:
        operations: run so far, about as many as launches.
        read: tensors made before the capture, in the order of their first use; held, so that their memory stays
            theirs.
        read_by_network: those of them that the network reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self._in_network = False
        self.read: list[Tensor] = []
        self.read_by_network: list[Tensor] = []
        self._made: set[int] = set()
        self._numbers: set[int] = set()
        self._seen: set[int] = set()
        self._seen_by_network: set[int] = set()
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
            self._numbers.update(map(_Memory, given))
        for tensor in given:
            self._note(tensor)
        self.before(func, given)
        out = func(*args, **kwargs)
        self.operations += 1
        self._made.update(map(_Memory, new_in(out, given)))
        self.after(func, args, kwargs, out)
        return out

    @contextmanager
    def network(self, unseen: bool = False) -> Iterator[None]:
        """Within it, operations are those of the network.

        Args:
            unseen: do not look at them, since the network is compiled: under this mode torch would compile it anew.
        """
        self._in_network = True
        try:
            with self.unseen() if unseen else nullcontext():
                yield
        finally:
            self._in_network = False

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Within it, operations are not looked at. torch compiles code anew when the modes around it change."""
        self._functions.__exit__(None, None, None)
        try:
            with _disable_current_modes():
                yield
        finally:
            self._functions.__enter__()

    def before(self, func: Any, given: list[Tensor]) -> None:
        """Called before an operation runs on these tensors."""

    def after(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Called after an operation."""

    def _refuse_lasting_writes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = kwargs.get(argument.name, args[index] if index < len(args) else None)
            if any(storage_of(tensor) not in self._made for tensor in tensors_in(written)):
                raise _refusal(str(func), "writes to a tensor that outlasts the call")

    @property
    def storages(self) -> set[int]:
        """The memory allocated in this capture, as numbers that no other memory gets while they are kept."""
        return self._made

    def made(self, tensor: Tensor) -> bool:
        """Whether the memory of a tensor was allocated in this capture."""
        return storage_of(tensor) in self._made

    def _note(self, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        if storage in self._made or storage in self._numbers:
            return
        # a view of an outside tensor is an outside tensor
        if storage not in self._seen:
            self._seen.add(storage)
            self.read.append(tensor)
        if self._in_network and storage not in self._seen_by_network:
            self._seen_by_network.add(storage)
            self.read_by_network.append(tensor)


class _Functions(TorchFunctionMode):
    """Refuses functions that move values to the host without running an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TO_HOST or (func in _SPLITS and len(list(tensors_in((args, kwargs)))) > 1):
            raise _refusal(f"Tensor.{func.__name__}", "has the host read values")
        if func in _FROM_NUMBERS or (func in _FROM_ANY and not isinstance(args[0], Tensor)):
            raise _refusal(func.__name__, "makes a tensor from Python numbers, which a graph would freeze")
        return func(*args, **kwargs)


def refuse_uncapturable(func: Any, args: Any, kwargs: dict[str, Any], numbers: Set[int] = frozenset()) -> None:
    """Raise CaptureFailed for an operation that a graph cannot hold; numbers: memory that holds Python numbers."""
    what = None
    if func in _FROM_PYTHON and not _is_number(args[0]):
        what = "makes a tensor from Python numbers, which a graph would freeze"
    elif torch.Tag.data_dependent_output in func.tags or func in _WAITS:
        what = "makes the host wait for a value"
    elif (func in _INDEX and _has_mask(args)) or (torch.Tag.dynamic_output_shape in func.tags and func not in _INDEX):
        what = "has a shape that depends on values"
    elif torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
        what = "draws random numbers"
    elif len(devices := _devices(func, args, kwargs, numbers)) > 1:
        what = f"copies between {' and '.join(sorted(devices))}"
    if what is not None:
        raise _refusal(str(func), what)


def failed(error: Exception) -> CaptureFailed:
    """The error of a capture that broke for another reason."""
    reason = str(error).partition("\n")[0]
    return CaptureFailed(
        f"The loop cannot be captured: {type(error).__name__}: {reason}. It runs eagerly. "
        "Pass engine='eager' to leave it so."
    )


def _refusal(name: str, what: str) -> CaptureFailed:
    return CaptureFailed(
        f"The loop cannot be captured: {name} {what}. A replay would not repeat that. "
        "It runs eagerly; pass engine='eager' to leave it so."
    )


def _is_number(tensor: Tensor) -> bool:
    """The tensor that x[0] = 1.0 makes: its number becomes an argument of the launch."""
    return tensor.ndim == 0 and tensor.device.type == "cpu"


def _has_mask(args: Any) -> bool:
    return any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))


def _draws(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it draws. torch marks attention and dropout as drawing even where nothing is dropped."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.name in _SWITCHES:
            value = kwargs.get(argument.name, args[index] if index < len(args) else argument.default_value)
            if value is not None and not value:
                return False
    return True


def _devices(func: Any, args: Any, kwargs: dict[str, Any], numbers: Set[int]) -> set[str]:
    # the host would read any other tensor without dimensions on the CPU, and its value would be frozen
    copies = func in (_aten._to_copy.default, _aten.copy_.default, _aten.copy.default)
    devices = {
        tensor.device.type
        for tensor in tensors_in((args, kwargs))
        if copies or not numbers or storage_of(tensor) not in numbers
    }
    device = kwargs.get("device")
    return devices | {torch.device(device).type} if device is not None and devices else devices


def tensors_in(found: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    return (leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))


def new_in(out: Any, given: Iterable[Tensor]) -> list[Tensor]:
    """The outputs of an operation in memory of their own."""
    storages = {storage_of(tensor) for tensor in given}
    return [tensor for tensor in tensors_in(out) if storage_of(tensor) not in storages]


def storage_of(tensor: Tensor) -> int:
    """The number of the memory that a tensor lies in; for one without memory of its own, as a sparse one, its id."""
    try:
        return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]
    except (NotImplementedError, RuntimeError, ValueError):
        return id(tensor)


class _Memory(int):
    """`storage_of` memory that may be freed: no other memory gets the number while this is kept."""

    def __new__(cls, tensor: Tensor) -> Self:
        made = super().__new__(cls, storage_of(tensor))
        with suppress(NotImplementedError, RuntimeError, ValueError):
            made._held = StorageWeakRef(tensor.untyped_storage())
        return made

    _held: Any = None


def refuse_unknown_reads(
    check: CaptureCheck, known: Iterable[Tensor], networks: Iterable[nn.Module], made: Set[int] = frozenset()
) -> None:
    """Raise CaptureFailed if the network read a tensor that nobody would compare before a replay.

    Args:
        check: of the capture.
        known: tensors that it may read: its inputs.
        networks: modules whose tensors it may read.
        made: memory allocated in captures before, of the same recording.
    """
    for tensor in not_among(check.read_by_network, [*known, *(each for net in networks for each in tensors_of(net))]):
        if storage_of(tensor) not in made:
            raise CaptureFailed(
                f"The loop cannot be captured: the network reads a tensor of shape {tuple(tensor.shape)} that is "
                "neither an argument nor held by one of its modules. Another one in its place would not be seen. "
                "Make it a parameter or a buffer; until then it runs eagerly."
            )


def not_among(read: Iterable[Tensor], known: Iterable[Tensor]) -> list[Tensor]:
    """The tensors read whose memory belongs to none of the known ones."""
    storages = {storage_of(tensor) for tensor in known}
    return [tensor for tensor in read if storage_of(tensor) not in storages]

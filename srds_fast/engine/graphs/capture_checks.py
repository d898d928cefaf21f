"""What captured code must not do, seen as it is captured: every operation goes through here.

A replay repeats the launches of a capture and nothing else. An operation that waits for the device, copies from or to
the host, draws random numbers or has a shape that depends on values would freeze what it found in the capture, or break
it. It is refused by name before it runs, on a CUDA device as on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ...errors import CaptureFailed

_aten = torch.ops.aten
_FROM_PYTHON = {_aten.lift_fresh.default, _aten.lift_fresh_copy.default}
# of an index, only a mask has a shape that depends on values
_INDEX = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
# not marked in torch: look at a flag on the device
_WAITS = {_aten._linalg_check_errors.default}
# what the CPU lets pass unseen: no operation runs, and a replay would not do it again
_TO_HOST = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}
_SPLITS = {torch.tensor_split, Tensor.tensor_split}  # a tensor that tells where must lie on the host
_FROM_NUMBERS = {torch.tensor, Tensor.new_tensor}
_FROM_ANY = {torch.as_tensor, torch.asarray}
# arguments that say whether anything is drawn
_SWITCHES = ("dropout_p", "dropout", "p", "train", "training")


class Guard(TorchDispatchMode):
    """Refuses operations that cannot be captured, and notes what is read from outside.

    Attributes:
        operations: that have run, about as many as launches.
        read: tensors that were there before the capture, in the order they were first read; held, so that their memory
            stays theirs.
        read_by_network: the part of them that the network reads.
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
        if func in _FROM_PYTHON:  # what is left of them: x[0] = 1.0
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
            unseen: do not look at them: the network is compiled, and would be taken apart to be seen.
        """
        self._in_network = True
        try:
            with self.unseen() if unseen else nullcontext():
                yield
        finally:
            self._in_network = False

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Within it, operations are not looked at: compiled code is guarded by the modes that are on."""
        self._functions.__exit__(None, None, None)
        try:
            with _disable_current_modes():
                yield
        finally:
            self._functions.__enter__()

    def before(self, func: Any, given: list[Tensor]) -> None:
        """An operation is about to run on these tensors."""

    def after(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operation has run."""

    def _refuse_lasting_writes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = kwargs.get(argument.name, args[index] if index < len(args) else None)
            if any(storage_of(tensor) not in self._made for tensor in tensors_in(written)):
                raise _refusal(str(func), "writes to a tensor that outlasts the call")

    @property
    def storages(self) -> set[int]:
        """Memory taken in this capture. None of these numbers is given to other memory as long as they are kept."""
        return self._made

    def made(self, tensor: Tensor) -> bool:
        """Whether the memory of a tensor was taken in this capture."""
        return storage_of(tensor) in self._made

    def _note(self, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        if storage in self._made or storage in self._numbers:
            return
        # a view of what was there before is not made here
        if storage not in self._seen:
            self._seen.add(storage)
            self.read.append(tensor)
        if self._in_network and storage not in self._seen_by_network:
            self._seen_by_network.add(storage)
            self.read_by_network.append(tensor)


class _Functions(TorchFunctionMode):
    """Refuses the functions that run no operation which could be refused."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TO_HOST or (func in _SPLITS and len(list(tensors_in((args, kwargs)))) > 1):
            raise _refusal(f"Tensor.{func.__name__}", "has the host read values")
        if func in _FROM_NUMBERS or (func in _FROM_ANY and not isinstance(args[0], Tensor)):
            raise _refusal(func.__name__, "makes a tensor from Python numbers, which a graph would freeze")
        return func(*args, **kwargs)


def refuse_uncapturable(func: Any, args: Any, kwargs: dict[str, Any], numbers: Set[int] = frozenset()) -> None:
    """Raise CaptureFailed for an operation that a graph cannot hold; numbers: memory of Python numbers."""
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
    """What else went wrong in a capture."""
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
    """What x[0] = 1.0 makes of its number: it goes along with the launch, as the number itself would."""
    return tensor.ndim == 0 and tensor.device.type == "cpu"


def _has_mask(args: Any) -> bool:
    return any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))


def _draws(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it draws: attention and dropout are marked so even where nothing is dropped."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.name in _SWITCHES:
            value = kwargs.get(argument.name, args[index] if index < len(args) else argument.default_value)
            if value is not None and not value:
                return False
    return True


def _devices(func: Any, args: Any, kwargs: dict[str, Any], numbers: Set[int]) -> set[str]:
    # another tensor of no dimensions on the CPU would be read by the host, and frozen
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
    """The outputs of an operation that do not lie in the memory of what it was given."""
    storages = {storage_of(tensor) for tensor in given}
    return [tensor for tensor in tensors_in(out) if storage_of(tensor) not in storages]


def storage_of(tensor: Tensor) -> int:
    """Which memory a tensor lies in; for one without memory of its own, as a sparse one, which tensor it is."""
    try:
        return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]
    except (NotImplementedError, RuntimeError, ValueError):
        return id(tensor)


class _Memory(int):
    """As `storage_of`, of memory that may be given back: the number is not used again as long as this is kept."""

    def __new__(cls, tensor: Tensor) -> Self:
        made = super().__new__(cls, storage_of(tensor))
        with suppress(NotImplementedError, RuntimeError, ValueError):
            made._held = StorageWeakRef(tensor.untyped_storage())
        return made

    _held: Any = None


def not_among(read: Iterable[Tensor], known: Iterable[Tensor]) -> list[Tensor]:
    """The tensors read whose memory belongs to none of the known ones."""
    storages = {storage_of(tensor) for tensor in known}
    return [tensor for tensor in read if storage_of(tensor) not in storages]

"""The processes that evaluate the rows of a call together, and what they send each other.

Before the outputs of a wave are gathered, the ranks exchange a header of a few numbers between their hosts: what each
is about to do, and whether it has failed. So a rank that fails never leaves the others waiting in a collective: they
read of it, and no data is sent. The header goes through a gloo group, which needs no device; the outputs go through
the group that the user gave.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidArgument, RankLost, RankMismatch, shown

# of a text that ranks send each other, in bytes
MOST_WORDS = 8192


class Doing(IntEnum):
    """What a rank is about to do. All ranks do the same, or one has left the call."""

    GATHER = 1  # outputs of a wave
    AGREE = 2  # on a number
    TAKE = 3  # tensors of rank 0
    COMPARE = 4  # digests
    TRY = 5  # something has been tried, see `SharedCall.attempt`
    LOOK = 6  # whether a rank was interrupted
    END = 7  # the call has ended


class Status(IntEnum):
    """How a rank fares."""

    WELL = 0
    NO_MEMORY = 1  # something did not fit
    FAILED = 2  # it leaves the call, or what is tried
    CANCELLED = 3  # it leaves the call, as its user asked


@dataclass(frozen=True)
class Header:
    """What a rank tells before each exchange.

    size: numbers that it is about to send, the same on all ranks. place: tells this exchange from others of its kind.
    level: of the attempt that a failure ends, 0: of the call. wants: it was interrupted, by diffusers' `_interrupt`.
    value: of what is agreed on. dtype: of its outputs, 0 if it evaluated nothing.
    """

    doing: Doing
    status: Status = Status.WELL
    size: int = 0
    place: int = 0
    level: int = 0
    wants: bool = False
    dtype: int = 0
    value: float = 0.0

    def packed(self) -> list[int]:
        (bits,) = struct.unpack("<q", struct.pack("<d", self.value))
        return [self.doing, self.status, self.size, self.place, self.level, self.wants, self.dtype, bits]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Header:
        doing, status, size, place, level, wants, dtype, bits = numbers
        (value,) = struct.unpack("<d", struct.pack("<q", bits))
        return cls(Doing(doing), Status(status), size, place, level, bool(wants), dtype, value)

    def agrees_with(self, other: Header) -> bool:
        """Whether both are about to do the same."""
        return self._about() == other._about()

    def _about(self) -> tuple[int, ...]:
        return self.doing, self.size, self.place, self.level


DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8)


# dimensions of a mesh along which processes evaluate the same rows together: diffusers' context parallelism
CONTEXT = ("ring", "ulysses")


class Ranks:
    """A process group whose processes share rows. They make the same calls, one at a time.

    members: global ranks of all processes that make these calls: also of those that evaluate the same rows together.
        None: there are no others. They agree on everything, and are the ranks of headers and messages.
    beside: global ranks that evaluate the same rows as this process, itself included.

    rank, size: of this process in the group, and how many there are. processes: how many make the calls. place: of
    this one among them.
    """

    def __init__(
        self, group: Any, members: tuple[int, ...] | None = None, beside: frozenset[int] | None = None
    ) -> None:
        import torch.distributed as dist

        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.backend = str(dist.get_backend(group))
        self._lock = threading.Lock()
        self._is_ending: Callable[[], bool] = lambda: False  # of the call that holds the lock
        self._lost: str | None = None
        own = tuple(dist.get_process_group_ranks(group))
        members = own if members is None else members

        def made(backend: str) -> Any:
            if members == own and backend == self.backend:
                return group
            return dist.new_group(members, backend=backend, use_local_synchronization=True)

        self._everyone = made(self.backend)
        self._hosts = self._everyone if self.backend == "gloo" else made("gloo")
        self.beside = frozenset((dist.get_rank(),)) if beside is None else beside
        self.processes, self.place = len(members), dist.get_rank(self._everyone)
        self._root = dist.get_global_rank(self._everyone, 0)

    @contextlib.contextmanager
    def one_call(self, is_ending: Callable[[], bool]) -> Iterator[None]:
        """In the block this process makes a call with the others. It begins when one that is about to end has ended.

        is_ending: whether this call is about to end, as it was cancelled; another thread asks.

        Raises:
            InvalidArgument: another thread makes one: ranks cannot know which of the two comes first.
            RankLost: a rank was lost before.
        """
        if self._lost is not None:
            raise RankLost(f"{self._lost} It was lost in an earlier call. Start the processes again.")
        if not self._lock.acquire(blocking=self._is_ending()):
            raise InvalidArgument(
                "Another thread of this process makes a call with the same ranks. Ranks would not know which of the "
                "two comes first. Make one call after another, or give each thread a process group of its own."
            )
        self._is_ending = is_ending
        try:
            yield
        finally:
            self._lock.release()

    def headers(self, own: Header) -> list[Header]:
        """Exchange headers; those of all ranks, in order. Waits for the slowest rank."""
        sent = torch.tensor(own.packed(), dtype=torch.int64, device="cpu")
        found = [torch.empty_like(sent) for _ in range(self.processes)]
        with self._heard():
            self._dist.all_gather(found, sent, group=self._hosts)
        return [Header.of(each.tolist()) for each in found]

    def words(self, own: str) -> list[str]:
        """Exchange short texts."""
        coded = own.encode()[:MOST_WORDS]
        sent = torch.zeros(MOST_WORDS, dtype=torch.uint8, device="cpu")
        sent[: len(coded)] = torch.tensor(list(coded), dtype=torch.uint8, device="cpu")
        found = [torch.empty_like(sent) for _ in range(self.processes)]
        with self._heard():
            self._dist.all_gather(found, sent, group=self._hosts)
        return [bytes(each.tolist()).rstrip(b"\0").decode(errors="replace") for each in found]

    def room(self, part: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What `gather` sends and what it receives, [most, ...] and [size * most, ...] for the most of counts.

        part: [own count, ...]. It is asked for before the ranks go into the exchange, in which none may fail.
        """
        most = max(counts)
        sent = part.contiguous() if len(part) == most else part.new_zeros(most, *part.shape[1:])
        if sent is not part:
            sent[: len(part)] = part
        return sent, sent.new_empty(self.size * most, *sent.shape[1:])

    def gather(self, sent: Tensor, found: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """The parts of all ranks, of so many entries each: views of what `room` has made."""
        with self._heard():
            self._gather_into(found, sent, group=self.group)
        return [each[:count] for each, count in zip(found.split(len(sent)), counts, strict=True)]

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, which has the same shape and dtype on all ranks."""
        found = tensor.contiguous().clone()
        with self._heard():
            # a group of CUDA devices takes no tensors of the host
            hosts = found.device.type == "cpu"
            self._dist.broadcast(found, self._root, group=self._hosts if hosts else self._everyone)
        return found

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        """In the block this rank hears of the others. RankLost: one of them is gone, or does not answer in time."""
        try:
            yield
        except RuntimeError as why:
            what = str(why).partition("\n")[0]
            self._lost = f"A rank of {self.processes} did not answer rank {self.place}: {what}."
            raise RankLost(f"{self._lost} It has ended, or takes longer than the group's timeout.") from None

    @functools.cached_property
    def _dist(self) -> Any:
        import torch.distributed as dist

        return dist

    @functools.cached_property
    def _gather_into(self) -> Any:
        # the newer name of the same, where there is one: the older is deprecated then
        return getattr(self._dist, "all_gather_single", None) or self._dist.all_gather_into_tensor


def ranks_of(parallel: Any) -> Ranks | None:
    """The ranks that `parallel` of `compile` and `sample` asks for; None: this process alone.

    Raises InvalidArgument.
    """
    import torch.distributed as dist

    if parallel is None:
        return None
    started = dist.is_available() and dist.is_initialized()
    if isinstance(parallel, str) and parallel == "auto":
        group = dist.group.WORLD if started else None
        return None if group is None else _ranks(group)
    if not started:
        raise InvalidArgument(
            f"parallel is {shown(parallel)}, and no process group is initialised. Start the script by torchrun, and "
            "call torch.distributed.init_process_group() first; or leave parallel out."
        )
    if isinstance(parallel, dist.ProcessGroup):
        return _ranks(parallel)
    if isinstance(parallel, dist.device_mesh.DeviceMesh):
        return _of_mesh(parallel)
    raise InvalidArgument(
        f"parallel is {shown(parallel)}. It is 'auto' (the default process group, if there is one), None, a "
        "torch.distributed.ProcessGroup or a DeviceMesh. Pass one of these."
    )


def _of_mesh(mesh: Any) -> Ranks | None:
    """Those along "time", or along its only dimension; other dimensions than those of `CONTEXT` are calls of their own.

    Raises InvalidArgument.
    """
    names = mesh.mesh_dim_names or ()
    if "time" not in names:
        if mesh.ndim == 1 and not set(names) & set(CONTEXT):
            return _ranks(mesh.get_group())
        raise InvalidArgument(
            f"parallel is a mesh with the dimensions {names or mesh.ndim}. The rows of a wave are shared over one of "
            "them. Name that one 'time'."
        )
    context = tuple(name for name in names if name in CONTEXT)
    if not context:
        return _ranks(mesh.get_group("time"))
    members = mesh[tuple(name for name in names if name == "time" or name in CONTEXT)].mesh
    beside = frozenset(mesh[context].mesh.flatten().tolist())
    return _ranks(mesh.get_group("time"), tuple(sorted(members.flatten().tolist())), beside)


@functools.lru_cache(maxsize=16)
def _ranks(group: Any, members: tuple[int, ...] | None = None, beside: frozenset[int] | None = None) -> Ranks | None:
    """Made once for a group: all its ranks must make it together."""
    found = Ranks(group, members, beside)
    return found if found.processes > 1 else None


def mismatch(headers: Sequence[Header], words: Sequence[str]) -> RankMismatch:
    """Ranks that are not about to do the same. words: what each is about to do."""
    other = next(number for number, each in enumerate(headers) if not each.agrees_with(headers[0]))
    return RankMismatch(
        f"Rank 0 is about to {words[0]}, rank {other} to {words[other]}. They do not run the same call, or something "
        "changed a network on one of them. Make the same calls with the same arguments, in the same order, on every "
        "rank."
    )

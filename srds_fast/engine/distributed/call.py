"""One call that several ranks make together: rows are shared, what decides is agreed on, failures are told."""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ... import clock
from ...errors import Cancelled, RankError, RankFailed, RankLost, RankMismatch
from .. import cancellation
from .digests import hashed
from .ranks import DTYPES, Doing, Header, Ranks, Status, mismatch


class Work(NamedTuple):
    """What ranks have done: entries that this one evaluated, that all did, that the busiest one of each wave did."""

    own: int = 0
    of_all: int = 0
    busiest: int = 0
    seconds: float = 0.0  # spent on waiting for the others and on gathering

    def since(self, before: Work) -> Work:
        own, of_all, busiest, seconds = (now - then for now, then in zip(self, before, strict=True))
        return Work(int(own), int(of_all), int(busiest), seconds)


NOTHING_DONE = Work()


class _Left(BaseException):
    """An attempt is left on all ranks. level: of the attempt. why: what is raised behind it."""

    def __init__(self, level: int, why: Exception) -> None:
        super().__init__(level, why)
        self.level, self.why = level, why


@dataclass(eq=False)
class SharedCall:
    """What one rank knows of a call.

    asks: whether this rank was interrupted. interrupted: whether any was, as all know since the same exchange.
    exchanges: how many there were. random: what draws without a generator begin with, by device, if not with torch's
    global generators.
    """

    ranks: Ranks
    asks: Callable[[], bool] = lambda: False
    interrupted: bool = False
    work: Work = NOTHING_DONE
    exchanges: int = 0
    random: Mapping[torch.device, Tensor] | None = None
    replicates: bool = False  # each rank evaluates all rows, see `replicating`
    told: bool = field(default=False, repr=False)  # all ranks know how the call has ended
    uneven: bool = field(default=False, repr=False)  # something failed, not on all ranks alike
    _level: int = field(default=0, repr=False)  # of the attempt under way; 0: none is
    _cause: str = field(default="", repr=False)  # why this rank fails
    _dtype: torch.dtype = field(default=torch.float32, repr=False)  # of the last outputs

    def compare(self, digests: Mapping[str, str]) -> None:
        """RankMismatch, on every rank, if ranks were given different things; it names rank and field."""
        # a setting may be long, and hold line breaks
        lines = "\n".join(f"{name}={hashed(digest)}" for name, digest in digests.items())
        header = Header(Doing.COMPARE, value=hashed(lines))
        if len({each.value for each in self._exchange(header, "compare what they were given")}) == 1:
            return
        found = [dict(line.partition("=")[::2] for line in words.splitlines()) for words in self._words(lines)]
        for name in dict.fromkeys(name for each in found for name in each):
            for rank, other in enumerate(found):
                if other.get(name) != found[0].get(name):
                    self.told = True
                    raise RankMismatch(
                        f"Rank {rank} was called with another {name} than rank 0. All ranks make one sample together. "
                        f"Pass the same {name} on every rank."
                    )

    def agreed(self, value: float, what: str) -> float:
        """The number of rank 0: what depends on a clock must be the same on all ranks. what: names it in messages."""
        return self._exchange(Header(Doing.AGREE, value=value), f"agree on {what}")[0].value

    def agreed_reason(self, reason: str | None, what: str) -> str | None:
        """The first reason that a rank puts into words; None if some rank has no reason.

        reason: of this rank; "" if it agrees without words of its own.
        """
        votes = self._exchange(Header(Doing.AGREE, value=reason is not None), f"agree on {what}")
        if not all(each.value for each in votes):
            return None
        return next(filter(None, self._words(reason or "")), None)

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0."""
        self._exchange(Header(Doing.TAKE, size=tensor.numel()), f"take {tensor.numel()} numbers of rank 0")
        with self._hearing():
            return self.ranks.take(tensor)

    def take_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same for several tensors at once, on one device."""
        whole = self.take(torch.cat([each.contiguous().flatten().view(torch.uint8) for each in tensors]))
        parts = whole.split([each.nbytes for each in tensors])
        # a view in another dtype begins at a multiple of its size: each part gets memory of its own
        return [part.clone().view(own.dtype).view(own.shape) for part, own in zip(parts, tensors, strict=True)]

    def look(self) -> bool:
        """Whether any rank was interrupted, where nothing else is exchanged that tells."""
        if not self.interrupted:
            self._exchange(Header(Doing.LOOK), "look whether one was interrupted")
        return self.interrupted

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """In the block, an error on one rank ends the block on all ranks, and not yet the call.

        Behind it all ranks have the same error: what they have raised, if all of them did alike; OutOfMemoryError; or
        RankFailed. So where one process would go on in another way, all ranks do. What is no `Exception` ends the call.
        """
        self._level = level = self._level + 1
        header, words = Header(Doing.TRY, level=level), f"end {what}"
        try:
            try:
                yield
            except Exception as error:
                self._exchange(replace(header, status=self._fails(error)), words, error)
                raise
            self._exchange(header, words)
        except _Left as left:
            if left.level < level:
                raise
            why = left.why
        else:
            return
        finally:
            self._level = level - 1
        try:
            raise why
        finally:
            del why  # it keeps the memory of the block alive

    def outputs(
        self, lengths: Sequence[int], shape: Sequence[int], device: torch.device, run: Callable[[int, slice], Tensor]
    ) -> list[Tensor]:
        """Outputs of a wave, made by all ranks: for each group of entries one tensor, [its length, *shape].

        run: evaluates a part of a group, [part, *shape].
        """
        found, shares = self._gathered(lengths, shape, device, run)
        return joined(found, shares, lengths)

    def units(self, count: int, nbytes: int, device: torch.device, run: Callable[[slice], Tensor]) -> list[Tensor]:
        """What some units of work give, in bytes, each [nbytes]; views, for which no memory is asked.

        run: evaluates some of the units, [part, nbytes].
        """
        found, _ = self._gathered([count], [nbytes], device, lambda _, part: run(part), torch.uint8)
        return [each for of_rank in found for each in of_rank]

    def _gathered(
        self,
        lengths: Sequence[int],
        shape: Sequence[int],
        device: torch.device,
        run: Callable[[int, slice], Tensor],
        likely: torch.dtype | None = None,
    ) -> tuple[list[Tensor], list[list[slice]]]:
        """What each rank has made of all groups, and its share. likely: the dtype, on a rank that makes nothing."""
        shares = shares_of(lengths, self.ranks.size)
        counts = [sum(part.stop - part.start for part in share) for share in shares]
        parts: list[Tensor] = []
        error: Exception | None = None
        dtype = 0
        try:
            for number, part in enumerate(shares[self.ranks.rank]):
                if part.stop > part.start:
                    parts.append(run(number, part))
            if parts:
                dtype = DTYPES.index(parts[0].dtype)
            else:
                parts.append(torch.empty(0, *shape, dtype=likely or self._dtype, device=device))
            # all memory of the exchange: a rank that finds none in the middle of it would leave the others waiting
            sent, room = self.ranks.room(parts[0] if len(parts) == 1 else torch.cat(parts), counts)
            status = Status.WELL
        except Exception as why:
            error, status = why, self._fails(why)
        began = time.perf_counter()
        size = sum(lengths) * math.prod(shape)
        header = Header(Doing.GATHER, status, size, level=self._level, dtype=dtype)
        headers = self._exchange(header, f"gather {size} numbers", error, narrows=True)
        if error is not None and status is not Status.NO_MEMORY:  # on all ranks alike
            raise error
        if any(each.status is Status.NO_MEMORY for each in headers):
            short = [rank for rank, each in enumerate(headers) if each.status is Status.NO_MEMORY]
            error = None  # it keeps the memory of the wave alive
            raise torch.OutOfMemoryError(f"the wave did not fit into the memory of rank {short[0]}")
        # a network may answer one rank in another dtype than the others
        found_in = DTYPES[next((each.dtype for each in headers if each.dtype), 0)]
        assert found_in is not None
        if sent.dtype is not found_in:
            sent, room = sent.to(found_in), room.to(found_in)
        self._dtype = found_in
        with self._hearing():
            found = self.ranks.gather(sent, room, counts)
        own_before, all_before, busiest, seconds = self.work
        seconds += time.perf_counter() - began
        self.work = Work(own_before + counts[self.ranks.rank], all_before + sum(counts), busiest + max(counts), seconds)
        return found, shares

    def leave(self, error: BaseException) -> None:
        """Tell the others that this rank leaves the call; raises what all ranks raise, if this rank alone fails."""
        if self.told:
            return
        own = error.why if isinstance(error, cancellation.Ended) else error
        status = self._fails(own)
        try:
            header = Header(Doing.END, Status.FAILED if status is Status.NO_MEMORY else status)
            self._exchange(header, "end the call", own)
        except (RankError, cancellation.Ended):
            if isinstance(own, Exception):
                raise  # Ctrl-C and the like stay what they are on their own rank

    def end(self) -> None:
        """The call has ended well here; raises what all ranks raise if it did not elsewhere."""
        self._exchange(Header(Doing.END), "end the call")

    def _fails(self, error: BaseException) -> Status:
        """This rank has failed; how."""
        self._cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, torch.OutOfMemoryError):
            return Status.NO_MEMORY
        return Status.CANCELLED if isinstance(error, Cancelled) else Status.FAILED

    def _exchange(
        self, own: Header, what: str, error: BaseException | None = None, *, narrows: bool = False
    ) -> list[Header]:
        """Exchange headers. what: this rank is about to do. narrows: all ranks can do with less memory.

        error: of this rank. If all ranks fail alike, each raises its own, as in one process. Otherwise all leave what
        the failure ends, by the same error; but for a rank that was cancelled itself, whose error says so.
        """
        own = replace(own, place=zlib.crc32(what.encode()), wants=self.asks())
        self.exchanges += 1
        with self._hearing():
            headers = self.ranks.headers(own)
        self.interrupted |= any(each.wants for each in headers)
        agree = all(each.agrees_with(own) for each in headers)
        failed = [rank for rank, each in enumerate(headers) if each.status is not Status.WELL]
        if agree and len({each.status for each in headers}) == 1:
            return headers
        if agree and narrows and all(headers[rank].status is Status.NO_MEMORY for rank in failed):
            return headers
        self.uneven = True
        if not failed:
            self.told = True
            raise self._left(0, mismatch(headers, self._words(what)))
        level = min(headers[rank].level for rank in failed)
        first = next(rank for rank in failed if headers[rank].level == level)
        self.told |= level == 0
        causes = self._words(self._cause)
        if own.status is Status.CANCELLED:
            return headers
        why = self._why(first, headers[first].status, causes[first])
        if isinstance(why, RankFailed):
            why.__cause__ = error
        raise self._left(level, why)

    def _why(self, rank: int, status: Status, cause: str) -> Exception:
        """What a rank raises where another one has failed."""
        if status is Status.CANCELLED:
            watch = cancellation.current()
            return Cancelled(
                f"The call was cancelled on rank {rank}. All ranks make one sample together. Clear what was given as "
                "cancel there before the next call.",
                0 if watch is None else watch.waves,
                0 if watch is None else watch.settled,
            )
        if status is Status.NO_MEMORY:
            return torch.OutOfMemoryError(f"on rank {rank}: {cause}")
        return RankFailed(
            f"Rank {rank} left the call: {cause}. All ranks make one sample together, so it has ended on each. The "
            "next call works if the cause is gone.",
            rank,
        )

    def _words(self, own: str) -> list[str]:
        with self._hearing():
            return self.ranks.words(own)

    @contextlib.contextmanager
    def _hearing(self) -> Iterator[None]:
        """A rank that is lost ends the call, whatever handles errors on the way."""
        try:
            yield
        except RankLost as why:
            self.told = True
            raise self._left(0, why) from None

    @staticmethod
    def _left(level: int, why: Exception) -> BaseException:
        """What leaves an attempt, or the call: handlers of `Exception` on the way must not take it for another."""
        if level > 0:
            return _Left(level, why)
        watch = cancellation.current()
        return why if watch is None else cancellation.Ended(watch, why)


MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
_current: ContextVar[SharedCall | None] = ContextVar("srds_fast.ranks", default=None)
current = _current.get


@contextlib.contextmanager
def sharing(
    ranks: Ranks | None, asks: Callable[[], bool] = lambda: False, forget: Callable[[], None] = lambda: None
) -> Iterator[SharedCall | None]:
    """The block is one call of all ranks; None: of this process alone.

    asks: whether this rank was interrupted. forget: forgets what the call may have learnt, where it has ended by a
    failure of some ranks: what they learnt before may not be the same, and the next call must go alike on all.

    Raises in all ranks what one of them has raised, as RankFailed, unless all of them raise.
    """
    around = current()
    if around is not None and ranks is around.ranks:
        yield around
        return
    if ranks is None:  # also within a call of several ranks, whose others know nothing of this one
        token = _current.set(None)
        try:
            with clock.agreeing(None):
                yield None
        finally:
            _current.reset(token)
        return
    watch = cancellation.current()
    with ranks.one_call(lambda: watch is not None and watch.is_ending()):
        call = SharedCall(ranks, asks)
        token = _current.set(call)
        try:
            with clock.agreeing(call.agreed):
                cancellation.look_within()
                yield call
            call.end()
        except BaseException as error:
            try:
                call.leave(error)
            finally:
                if call.uneven:
                    forget()
            raise
        finally:
            _current.reset(token)


def size() -> int:
    """How many ranks make the call under way."""
    call = current()
    return 1 if call is None else call.ranks.size


def dividing() -> SharedCall | None:
    """The call under way, if its ranks divide the rows of a wave; None: this process evaluates them all."""
    call = current()
    return None if call is None or call.replicates else call


@contextlib.contextmanager
def replicating(wanted: bool) -> Iterator[None]:
    """In the block each rank evaluates all rows of every wave itself: where networks are small, that is faster.

    What the waves lead to must be taken from rank 0, as ranks may round differently.
    """
    call = current()
    if call is None or not wanted:
        yield
        return
    before, call.replicates = call.replicates, True
    try:
        yield
    finally:
        call.replicates = before


def of_first(tensor: MaybeTensor) -> MaybeTensor:
    """A tensor that ranks may have drawn otherwise: that of rank 0, where several make the call."""
    call = current()
    return tensor if call is None or tensor is None else call.take(tensor)


def attempt(what: str) -> contextlib.AbstractContextManager[None]:
    """See `SharedCall.attempt`; of this process alone a block like any other."""
    call = current()
    return contextlib.nullcontext() if call is None else call.attempt(what)


def shares_of(lengths: Sequence[int], size: int) -> list[list[slice]]:
    """What each of `size` ranks evaluates of each group: entries in order, as evenly as they go; a pure function.

    No rank has more than one before it: the first sees all that is evaluated anywhere, where it decides for all.
    """
    total = sum(lengths)
    bounds = [-(-total * rank // size) for rank in range(size + 1)]
    shares = []
    for begin, end in pairwise(bounds):
        share, offset = [], 0
        for length in lengths:
            start = min(max(begin - offset, 0), length)
            share.append(slice(start, max(start, min(end - offset, length))))
            offset += length
        shares.append(share)
    return shares


def joined(found: Sequence[Tensor], shares: Sequence[Sequence[slice]], lengths: Sequence[int]) -> list[Tensor]:
    """The outputs of each group, from what each rank has made of all groups."""
    groups: list[list[Tensor]] = [[] for _ in lengths]
    for part, share in zip(found, shares, strict=True):
        sizes = [each.stop - each.start for each in share]
        for number, of_group in enumerate(part.split(sizes)):
            if len(of_group):
                groups[number].append(of_group)
    return [each[0] if len(each) == 1 else torch.cat(each) for each in groups]

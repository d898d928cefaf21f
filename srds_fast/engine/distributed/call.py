"""One call that several ranks make together: rows are shared, what decides is agreed on, failures are told."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ... import clock
from ...errors import Cancelled, RankError, RankFailed, RankMismatch
from .. import cancellation
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


@dataclass(eq=False)
class SharedCall:
    """What one rank knows of a call. interrupted: whether any rank was interrupted."""

    ranks: Ranks
    asks: Callable[[], bool] = lambda: False  # whether this rank was interrupted
    interrupted: bool = False
    work: Work = NOTHING_DONE
    told: bool = field(default=False, repr=False)  # all ranks know how the call has ended
    _cause: str = field(default="", repr=False)  # why this rank fails

    def compare(self, digests: Mapping[str, str]) -> None:
        """RankMismatch, on every rank, if ranks were given different things; it names rank and field."""
        self._exchange(Header(Doing.COMPARE))
        lines = "\n".join(f"{name}={digest}" for name, digest in digests.items())
        found = [dict(line.partition("=")[::2] for line in words.splitlines()) for words in self.ranks.words(lines)]
        for name in dict.fromkeys(name for each in found for name in each):
            for rank, other in enumerate(found):
                if other.get(name) != found[0].get(name):
                    self.told = True
                    raise RankMismatch(
                        f"Rank {rank} was called with another {name} than rank 0. All ranks make one sample together. "
                        f"Pass the same {name} on every rank."
                    )

    def agreed(self, value: float) -> float:
        """The number of rank 0: what depends on a clock must be the same on all ranks."""
        return self._exchange(Header(Doing.AGREE, value=value))[0].value

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0."""
        self._exchange(Header(Doing.TAKE, size=tensor.numel()))
        return self.ranks.take(tensor)

    def outputs(
        self, lengths: Sequence[int], shape: Sequence[int], device: torch.device, run: Callable[[int, slice], Tensor]
    ) -> list[Tensor]:
        """Outputs of a wave, made by all ranks: for each group of entries one tensor, [its length, *shape].

        run: evaluates a part of a group, [part, *shape].
        """
        shares = shares_of(lengths, self.ranks.size)
        counts = [sum(part.stop - part.start for part in share) for share in shares]
        parts: list[Tensor] = []
        own: Tensor | None = None
        error: Exception | None = None
        dtype = 0
        try:
            for number, part in enumerate(shares[self.ranks.rank]):
                if part.stop > part.start:
                    parts.append(run(number, part))
            own = None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)
            dtype = 0 if own is None else DTYPES.index(own.dtype)
            status = Status.WELL
        except torch.OutOfMemoryError as why:
            error, status = why, Status.NO_MEMORY
        except Exception as why:
            error, status = why, Status.FAILED
            self._cause = f"{type(why).__name__}: {why}"
        began = time.perf_counter()
        size = sum(lengths) * math.prod(shape)
        headers = self._exchange(Header(Doing.GATHER, status, size, self.asks(), dtype))
        if error is not None and status is Status.FAILED:
            # as it would be raised in one process, unless the call has ended
            raise self._ended(error) if self.told else error
        if any(each.status is Status.NO_MEMORY for each in headers):
            short = [rank for rank, each in enumerate(headers) if each.status is Status.NO_MEMORY]
            error = None  # it keeps the memory of the wave alive
            raise torch.OutOfMemoryError(f"the wave did not fit into the memory of rank {short[0]}")
        # a network may answer one rank in another dtype than the others
        found_in = DTYPES[next((each.dtype for each in headers if each.dtype), 0)]
        own = torch.empty(0, *shape, dtype=found_in, device=device) if own is None else own.to(found_in)
        found = self.ranks.gather(own, counts)
        own_before, all_before, busiest, seconds = self.work
        seconds += time.perf_counter() - began
        self.work = Work(own_before + counts[self.ranks.rank], all_before + sum(counts), busiest + max(counts), seconds)
        return joined(found, shares, lengths)

    def leave(self, error: BaseException) -> None:
        """Tell the others that this rank leaves the call; raises what all ranks raise, if this rank alone fails."""
        if self.told or isinstance(error, RankError):
            return
        own = error.why if isinstance(error, cancellation.Ended) else error
        self._cause = f"{type(own).__name__}: {own}" if str(own) else type(own).__name__
        status = Status.CANCELLED if isinstance(own, Cancelled) else Status.FAILED
        try:
            self._exchange(Header(Doing.END, status))
        except (RankError, cancellation.Ended):
            if isinstance(own, Exception):
                raise  # Ctrl-C and the like stay what they are on their own rank

    def end(self) -> None:
        """The call has ended well here; raises what all ranks raise if it did not elsewhere."""
        self._exchange(Header(Doing.END))

    def _exchange(self, own: Header) -> list[Header]:
        headers = self.ranks.headers(own)
        self.interrupted |= any(each.wants for each in headers)
        failed = [rank for rank, each in enumerate(headers) if each.status in (Status.FAILED, Status.CANCELLED)]
        if len(failed) == len(headers):
            # alike, as in one process: the call may go on behind a handler. Otherwise each raises its own error
            self.told |= not all(each.agrees_with(own) and each.status is own.status for each in headers)
            return headers
        if failed:
            self.told = True
            causes = self.ranks.words(self._cause)
            self._raise(failed[0], headers[failed[0]].status, causes[failed[0]])
        elif not all(each.agrees_with(own) for each in headers):
            self.told = True
            raise self._ended(mismatch(headers))
        return headers

    def _raise(self, rank: int, status: Status, cause: str) -> None:
        if status is Status.CANCELLED:
            if rank == self.ranks.rank:
                return  # its own error says so
            watch = cancellation.current()
            why: Exception = Cancelled(
                f"The call was cancelled on rank {rank}. All ranks make one sample together. Clear what was given as "
                "cancel there before the next call.",
                0 if watch is None else watch.waves,
                0 if watch is None else watch.settled,
            )
        else:
            why = RankFailed(
                f"Rank {rank} left the call: {cause}. All ranks make one sample together, so it has ended on each. The "
                "next call works if the cause is gone.",
                rank,
            )
        raise self._ended(why)

    @staticmethod
    def _ended(why: Exception) -> BaseException:
        """What ends the call with this error: handlers of `Exception` on the way must not take it for another."""
        watch = cancellation.current()
        return why if watch is None else cancellation.Ended(watch, why)


MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
_current: ContextVar[SharedCall | None] = ContextVar("srds_fast.ranks", default=None)
current = _current.get


@contextlib.contextmanager
def sharing(ranks: Ranks | None, asks: Callable[[], bool] = lambda: False) -> Iterator[SharedCall | None]:
    """The block is one call of all ranks; None: of this process alone.

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
            call.leave(error)
            raise
        finally:
            _current.reset(token)


def size() -> int:
    """How many ranks make the call under way."""
    call = current()
    return 1 if call is None else call.ranks.size


def of_first(tensor: MaybeTensor) -> MaybeTensor:
    """A tensor that ranks may have drawn otherwise: that of rank 0, where several make the call."""
    call = current()
    return tensor if call is None or tensor is None else call.take(tensor)


def shares_of(lengths: Sequence[int], size: int) -> list[list[slice]]:
    """What each of `size` ranks evaluates of each group: entries in order, as evenly as they go; a pure function."""
    total = sum(lengths)
    bounds = [total * rank // size for rank in range(size + 1)]
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

"""Networks called through torch.compile: always, or where that was timed to be faster."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import threading
import time
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..words import counted
from . import cancellation
from .distributed import call as distributed
from .distributed.call import SharedCall

MODES = ("default", "max-autotune-no-cudagraphs")
# compile, and call what was compiled where that is faster
AUTO = "auto"
# pairs of calls that are timed, and the share of the network's own time that compiled code must not exceed
PAIRS, WORTH = 3, 0.97
# of a number of rows
MOST_BITS = 64
logger = logging.getLogger("srds_fast")


class CompiledNetwork:
    """A network called through torch.compile; called directly if compilation fails (for example: no C++ compiler).

    The network itself is not changed, and only weakly referenced: the caller keeps it alive.
    """

    def __init__(self, network: nn.Module, mode: str) -> None:
        self.failure: str | None = None  # why the network is called directly
        self._mode = mode
        self._network = weakref.ref(network)

        # the network is an argument, because a closure would keep it alive
        def call(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return network(*args, **kwargs)

        # torch counts recompilations and caches shapes by file, line and name: each network needs its own name
        call.__code__ = call.__code__.replace(co_name=f"call_{name_of(network)}_{next(_numbers)}")
        # torch accepts a mode or options, not both; the user may have enabled graphs for all compilations
        options = {**torch._inductor.list_mode_options(mode), "triton.cudagraphs": False}
        self._call = torch.compile(call, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network: Any = self._network()
        if self.failure is not None:
            return network(*args, **kwargs)
        _mark_rows((args, kwargs))
        try:
            return self._call(network, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as why:
            reason = first_sentence(getattr(why, "inner_exception", why))
        # torch also wraps errors of the network itself; this call raises such an error, and no failure is recorded
        output = network(*args, **kwargs)
        self.failure = f"torch_compile={self._mode!r} failed on {name_of(network)}: {reason}"
        return output


def _mark_rows(arguments: Any) -> None:
    """Tell torch.compile that the number of rows differs from wave to wave: one version of the code serves all.

    Only a batch of one entry is compiled apart, as torch compiles tensors of one entry for this number.
    """
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) > 1:
            torch._dynamo.maybe_mark_dynamic(leaf, 0)


class CompiledIfFaster:
    """A network called through torch.compile for the numbers of rows where that is faster, and directly elsewhere.

    The first call of about each number of rows (1, 2 to 3, 4 to 7, ...) decides: it times both on its own arguments,
    after a call of each that may compile. The number of rows is the length of the first tensor that is no vector.

    In a call of several ranks rank 0 decides, while the others wait for its share of the wave, and all ranks follow
    from their next call on: the same rows are then computed by the same code, whatever the clocks of the others say.
    """

    def __init__(self, network: nn.Module) -> None:
        self.seconds = 0.0  # that deciding has taken, compiling included
        self._compiled = compiled(network, MODES[0])
        self._network = weakref.ref(network)
        self._ratios: dict[int, float] = {}  # time over that of the network, by the bits of the number of rows
        self._agreed: dict[int, float] = {}  # those that rank 0 knew when the call of several ranks began
        self._deciding = threading.Lock()

    @property
    def failure(self) -> str | None:
        """Why the network is called directly; None while nothing is decided, or where compiled code is called."""
        if self._compiled.failure is not None:
            return self._compiled.failure
        if not self._ratios or min(self._ratios.values()) <= WORTH:
            return None
        found = f"compiled code takes {min(self._ratios.values()):.2f} times as long as the network itself, at best"
        return f"torch_compile={AUTO!r} changes nothing in {name_of(self._network())}: {found}"

    def agree(self, call: SharedCall) -> None:
        """Take the ratios of rank 0, at the beginning of a call."""
        known = torch.full((MOST_BITS,), math.nan, dtype=torch.float64, device="cpu")
        for size, ratio in self._ratios.items():
            known[size] = ratio
        found = call.take(known).tolist()
        self._agreed = {size: ratio for size, ratio in enumerate(found) if not math.isnan(ratio)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network: Any = self._network()
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 1]
        rows = len(leaves[0]) if leaves else 1
        size = rows.bit_length()
        recorded = bool(leaves) and leaves[0].is_cuda and torch.cuda.is_current_stream_capturing()
        shared = distributed.current()
        # where calls of the network wait for other processes, none may make one alone
        follows = shared is not None and (shared.ranks.place > 0 or shared.ranks.processes > shared.ranks.size)
        # one thread decides; others call the network meanwhile, and so does a recording, in which nothing can be timed
        if size not in self._ratios and not recorded and not follows and self._deciding.acquire(blocking=False):
            try:
                self._decide(size, rows, leaves[0].device if leaves else torch.device("cpu"), args, kwargs)
            finally:
                self._deciding.release()
        ratios = self._ratios if shared is None else self._agreed
        return (self._compiled if ratios.get(size, 1.0) <= WORTH else network)(*args, **kwargs)

    def _decide(self, size: int, rows: int, device: torch.device, args: Any, kwargs: Any) -> None:
        network: Any = self._network()

        def timed(call: Any) -> float:
            cancellation.look_within()
            started = time.perf_counter()
            call(*args, **kwargs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - started

        if not self._ratios:
            logger.info("Compiling %s with torch.compile, to see whether it is faster.", name_of(network))
        started = time.perf_counter()
        timed(network)
        compiling = timed(self._compiled)
        if self._compiled.failure is None:
            ratio = statistics.median(timed(self._compiled) / timed(network) for _ in range(PAIRS))
            logger.info(
                "torch.compile of %s: the first call of %s took %.3g seconds, later ones take %.2f times as long "
                "as the network itself.",
                name_of(network),
                counted(rows, "row"),
                compiling,
                ratio,
            )
            self._ratios[size] = ratio
        else:
            self._ratios[size] = 1.0
        self.seconds += time.perf_counter() - started


_numbers = itertools.count()
_if_faster: weakref.WeakKeyDictionary[nn.Module, CompiledIfFaster] = weakref.WeakKeyDictionary()
_compiled: weakref.WeakKeyDictionary[nn.Module, dict[str, CompiledNetwork]] = weakref.WeakKeyDictionary()


def compiled(network: nn.Module, mode: str) -> CompiledNetwork:
    """The compiled version of the network. Always the same object: captured graphs are valid for one object only."""
    by_mode = _compiled.setdefault(network, {})
    return by_mode.get(mode) or by_mode.setdefault(mode, CompiledNetwork(network, mode))


def compiled_if_faster(network: nn.Module) -> CompiledIfFaster:
    """See `CompiledIfFaster`. Always the same object for a network, as `compiled` is."""
    return _if_faster.get(network) or _if_faster.setdefault(network, CompiledIfFaster(network))


def is_compiled(module: Any) -> bool:
    """Whether a call of the module runs code from torch.compile."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def unwrapped(module: Any) -> Any:
    """The module that torch.compile wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def name_of(network: object) -> str:
    """The name of a network's class, for messages."""
    return type(unwrapped(network)).__name__


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, without its full stop."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".:") or type(error).__name__

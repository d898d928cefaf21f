"""Network graphs: one graph of the network call for each width of a wave, replayed for every wave of that width.

A graph holds a call of the network and nothing else. The tensors among its arguments are copied to static tensors
before each replay, and the solver's update runs eagerly between the calls. A graph therefore serves every wave of its
width, in any plan, also where a loop graph cannot: windows that slide, runs that keep their states, long loops.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ... import telemetry
from ...errors import CaptureFailed
from .. import cancellation
from .cache_key import PLAIN
from .capturable import NetworkCalls
from .capture_checks import CaptureCheck, cannot_capture, failed, refuse_unknown_reads, tensors_in
from .device_lock import DeviceBusy, device_lock
from .loop_graph import copy_to, refuse_difference
from .recorder import Graph, TooLarge, record, recorder, within_memory
from .utilisation import why_not_worth

# graphs of one set of networks, the least recently used is given up first
MOST_WIDTHS = 64
NOT_WHILE_SERVING = "lazy_capture=False was given, so calls record nothing: make a call like this one in warmup()"
CHANGED = "the network changed its own attributes while it ran, and a replay would not change them"


@dataclass(frozen=True)
class _CallGraph:
    """The graph of one network call: from its static inputs to the leaves of what the call returned."""

    graph: Graph
    inputs: list[Tensor]
    outputs: list[Any]
    structure: TreeSpec

    def replay(self, tensors: list[Tensor]) -> Any:
        """Make the call on these tensors; returns copies, as the next replay overwrites the graph's own memory."""
        copy_to(self.inputs, tensors)
        self.graph.replay()
        copies = [output.clone() if isinstance(output, Tensor) else output for output in self.outputs]
        return tree_unflatten(copies, self.structure)


class NetworkGraphs:
    """The graphs of the calls of some networks: they read the tensors of these networks and their own inputs alone.

    May be used from several threads. nbytes: see `GraphStats`.
    """

    name = "network graphs"

    def __init__(self, calls: NetworkCalls) -> None:
        self.device = calls.device
        self.nbytes = 0
        self._calls = calls
        self._graphs: OrderedDict[Hashable, _CallGraph] = OrderedDict()
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._full: str | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def replay(self, key: Hashable, tensors: list[Tensor]) -> tuple[bool, Any]:
        """Whether there is a graph for a call, and what the call returns. Raises DeviceBusy after a long wait."""
        with device_lock(self.device):
            found = self._graphs.get(key)
            if found is None:
                return False, None
            self._graphs.move_to_end(key)
            return True, found.replay(tensors)

    def record(
        self, key: Hashable, function: Callable[..., Any], leaves: list[Any], structure: TreeSpec, expected: Any
    ) -> None:
        """Record a call that has just been made eagerly, and keep its graph if a replay returns what is expected.

        leaves, structure: of the arguments. Raises TooLarge also where an earlier recording was too large.
        """
        if self._full is not None:
            raise TooLarge(self._full)
        with device_lock(self.device), telemetry.recording():
            try:
                made, taken = within_memory(
                    self.device, self.name, lambda: self._record(function, leaves, structure), held=self.nbytes
                )
            except TooLarge as why:
                self._full = str(why)
                raise
            found = made.replay([leaf for leaf in leaves if isinstance(leaf, Tensor)])
            for ours, theirs in zip(tensors_in(found), tensors_in(expected), strict=True):
                refuse_difference(ours, theirs, theirs.dtype)
            self.nbytes += taken
            self._graphs[key] = made
            if len(self._graphs) > MOST_WIDTHS:
                self._graphs.popitem(last=False)

    def _record(self, function: Callable[..., Any], leaves: list[Any], structure: TreeSpec) -> _CallGraph:
        static = [self._static(i, leaf) if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)]
        inputs = [leaf for leaf in static if isinstance(leaf, Tensor)]
        args, kwargs = tree_unflatten(static, structure)
        cancellation.look_within()

        def work(check: CaptureCheck) -> Any:
            with check.network(self._calls.compiled):
                return function(*args, **kwargs)

        graph, check, found = record(recorder(self.device), work)
        refuse_unknown_reads(check, inputs, self._calls.networks)
        outputs, structure = tree_flatten(found)
        _refuse_unknown("returns", outputs)
        return _CallGraph(graph, inputs, outputs, structure)

    def _static(self, index: int, leaf: Tensor) -> Tensor:
        """A static copy of an argument, in a buffer that the calls of all widths share."""
        where = index, leaf.dtype, leaf.device
        buffer = self._buffers.get(where)
        if buffer is None or buffer.numel() < leaf.numel():
            size = leaf.numel() if buffer is None else max(leaf.numel(), 2 * buffer.numel())
            buffer = self._buffers[where] = torch.empty(size, dtype=leaf.dtype, device=leaf.device)
        return buffer.as_strided(leaf.shape, _dense_strides(leaf)).copy_(leaf)


class GraphedCalls:
    """The network calls of one run, through graphs where there are any.

    key_now: what the graphs depend on, now; `key` is what they depended on when the run began. records: record calls of
    a width that has no graph yet. weigh: before the first recording, see whether graphs can save time.
    ended: why the rest of the run neither replays nor records. "busy": another call holds the device; "changed": the
    network's own attributes have changed, and what this run recorded is of no use; "failed": the network cannot be
    recorded; "declined": graphs would save no time.
    """

    def __init__(
        self, graphs: NetworkGraphs, key_now: Callable[[], Hashable], *, records: bool, weigh: bool = False
    ) -> None:
        self.graphs = graphs
        self._weigh = weigh and not len(graphs)
        self._key_now, self._records = key_now, records
        self.key = key_now()
        self.replays = self.recordings = 0
        self.reason: str | None = None  # why calls were not replays, beyond the first of their width; None: all were
        self.seconds = 0.0  # spent on recording
        self.ended: str | None = None

    def through(self, function: Callable[..., Any], name: Hashable = None) -> Callable[..., Any]:
        """The function, called through its graphs. name: of the network, the same in every run."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.ended is not None:
                return function(*args, **kwargs)
            leaves, structure = tree_flatten((args, kwargs))
            try:
                key = key_of(name, leaves, structure)
                is_there, output = self.graphs.replay(key, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
            except CaptureFailed as why:
                self._give_up(why)
                return function(*args, **kwargs)
            if is_there:
                self.replays += 1
                return output
            output = function(*args, **kwargs)
            if self._records:
                self._record(key, function, leaves, structure, output)
            else:
                self.reason = NOT_WHILE_SERVING
            return output

        return call

    def _record(
        self, key: Hashable, function: Callable[..., Any], leaves: list[Any], structure: TreeSpec, output: Any
    ) -> None:
        if not all(bool(leaf.isfinite().all()) for leaf in tensors_in(output)):
            return  # the run ends in its error: there is nothing to compare with
        started = time.perf_counter()
        try:
            if self._weigh:
                self._weigh = False
                args, kwargs = tree_unflatten(leaves, structure)
                self.reason = why_not_worth(lambda: function(*args, **kwargs), self.graphs.device)
                self.ended = None if self.reason is None else "declined"
            self._look_for_changes()
            if self.ended is None:
                self.graphs.record(key, function, leaves, structure, output)
                self.recordings += 1
                self._look_for_changes()
        except Exception as why:  # the call is made: it must not fail for what would help later ones
            self._give_up(failed(why))
        finally:
            self.seconds += time.perf_counter() - started

    def _look_for_changes(self) -> None:
        if self._key_now() != self.key:
            self.end_as_changed()

    def end_as_changed(self) -> None:
        """The networks have changed: the rest of the run calls them as they are now."""
        self.ended, self.reason = "changed", CHANGED

    def _give_up(self, why: CaptureFailed) -> None:
        self.reason = str(why)
        if isinstance(why, DeviceBusy):
            self.ended = "busy"
        elif not isinstance(why, TooLarge) or not len(self.graphs):
            self.ended = "failed"


def key_of(name: Hashable, leaves: Sequence[Any], structure: TreeSpec) -> Hashable:
    """Equal for calls that one graph can make: the same layout of tensors, the same values of everything else."""
    _refuse_unknown("is given", leaves)
    layout = (
        (leaf.shape, _dense_strides(leaf), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
        for leaf in leaves
    )
    return name, structure, tuple(layout)


def _refuse_unknown(how: str, leaves: Iterable[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor) and type(leaf) not in PLAIN:
            raise cannot_capture(f"the network {how} a {type(leaf).__name__}, whose contents are not known")


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty_like(tensor, device="meta").stride()

"""Copies of a modular pipeline's blocks for one call. Blocks of the user are not changed.

A block with a loop numbers its turns by `enumerate`, and shows its own progress bar. In its copy, the number is that
of the step, and the bar counts final steps. The copies of all other blocks only hold those copies. Blocks that follow
the loop, such as a decoder, are not run where nobody sees the output.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

from torch import Tensor
from tqdm.auto import tqdm

from ...caches import cached
from ..lockstep.own_enumerate import with_own_enumerate
from ..lockstep.proxies import ProgressProxy, SchedulerProxy, TimestepsProxy
from .arguments import is_modular

_BEGIN = "_srds_fast_begin"  # the attribute of a loop's copy that is called when the loop begins


def driven(blocks: Any, lockstep: Any, *, whole: bool) -> Any:
    """The blocks for a call whose turns a `LockstepLoop` decides. whole: run those that follow the loop, too."""

    def drive(block: Any) -> None:
        if hasattr(block, "progress_bar"):
            block.progress_bar = ProgressProxy(block.progress_bar, lockstep)
            if not whole:
                vars(block)[_BEGIN] = lambda state: _take_out_following(twin, block, state)

    twin = _copied(blocks, drive, _by_step)
    return twin


def without_progress_bar(pipe: Any) -> dict[str, Any]:
    """Attributes with which a copy of a pipeline, modular or not, shows no progress bar."""
    if not is_modular(pipe):
        own = {"progress_bar": functools.partial(tqdm, disable=True)} if "progress_bar" in vars(pipe) else {}
        return {"_progress_bar_config": {"disable": True}, **own}

    def silence(block: Any) -> None:
        if hasattr(block, "progress_bar"):
            block._progress_bar_config = {"disable": True}

    return {"_blocks": _copied(pipe._blocks, silence, lambda cls, call: cls)}


def without_proxies(output: Any) -> Any:
    """What a call returns, with the scheduler and the timesteps themselves: a pipeline state, a dictionary or a value.

    The state of the call is changed in place: it belongs to the caller.
    """
    values = output if isinstance(output, dict) else getattr(output, "values", None)
    if isinstance(values, dict):
        values.update({name: _plain(value) for name, value in values.items()})
        return output
    return _plain(output)


def _plain(value: Any) -> Any:
    if type(value) is SchedulerProxy:
        return value.inner
    return value.as_subclass(Tensor) if isinstance(value, TimestepsProxy) else value


def _copied(block: Any, change: Callable[[Any], None], class_of: Callable[[type, Any], type]) -> Any:
    cls: Any = type(block)
    twin: Any = object.__new__(class_of(cls, cls.__call__))
    for name, value in vars(block).items():
        # what a block keeps in a list or a dictionary of its own must not stay there if the stock loop follows
        vars(twin)[name] = copy.copy(value) if type(value) in (dict, list) else value
    if block.sub_blocks:
        twin.sub_blocks = copy.copy(block.sub_blocks)
        for name, each in block.sub_blocks.items():
            twin.sub_blocks[name] = _copied(each, change, class_of)
    change(twin)
    return twin


@cached
def _by_step(cls: type, call: Any) -> type:
    """The class, or where its `__call__` uses `enumerate`, a subclass that numbers turns by their steps."""
    code = getattr(inspect.unwrap(call), "__code__", None)
    if code is None or "enumerate" not in code.co_names:
        return cls
    run = with_own_enumerate(call)

    @functools.wraps(call)
    def __call__(self: Any, components: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        vars(self).get(_BEGIN, lambda state: None)(state)
        return run(self, components, state, *args, **kwargs)

    shown = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), {"__call__": __call__, **shown})


def _take_out_following(blocks: Any, loop: Any, state: Any) -> None:
    """Put blocks that do nothing in the place of those that follow the loop, which begins now.

    blocks: of the whole call. state: as the loop is given it.
    """
    with suppress(NotImplementedError):  # by a pipeline that is nothing but a loop
        run = list(blocks.get_execution_blocks(**state.values).sub_blocks.values())
        following = run[run.index(loop) + 1 :] if any(each is loop for each in run) else []
        if not any(hasattr(each, "progress_bar") for each in following):  # another loop
            _take_out(blocks, {id(each) for each in following})


def _take_out(blocks: Any, out: set[int]) -> None:
    """Also where their parent is running now."""
    for name, each in blocks.sub_blocks.items():
        if id(each) in out:
            blocks.sub_blocks[name] = _Nothing()
        else:
            _take_out(each, out)


class _Nothing:
    sub_blocks: ClassVar[dict[str, Any]] = {}

    def __call__(self, components: Any, state: Any) -> Any:
        return components, state

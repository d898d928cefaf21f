"""The blocks that follow the loop of a modular pipeline, such as its decoder: not run where nobody sees the output."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, ClassVar


def take_out_following(blocks: Any, loop: Any, state: Any) -> None:
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

"""Previews of a modular pipeline: its own blocks behind the loop, run on the latents of an iteration.

A call with previews, or a trial whose output nobody sees, does not run these blocks itself.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any, ClassVar

from torch import Tensor

from ...errors import UnsupportedPipeline
from ..networks import upcast_copies

SHOWN = ("images", "videos")  # the outputs of blocks that decode


class LoopState:
    """What a call's pipeline state holds when its denoising loop begins, and the blocks that follow the loop."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._state: Any = None
        self._following: list[Any] = []

    def enter(self, blocks: Any, loop: Any, state: Any) -> None:
        """The loop begins. blocks: of the whole call, which loses those that follow; state: as the loop is given it."""
        with suppress(NotImplementedError):  # by a pipeline that is nothing but a loop
            run = list(blocks.get_execution_blocks(**state.values).sub_blocks.values())
            following = run[run.index(loop) + 1 :] if any(each is loop for each in run) else []
            if not any(hasattr(each, "progress_bar") for each in following):  # another loop
                self._state, self._following = _copied(state), following
                _take_out(blocks, {id(each) for each in following})

    def decode(self, latents: Tensor) -> Any:
        """PIL images, as the blocks make them of latents, [batch, ...].

        UnsupportedPipeline: no block that decodes follows the loop.
        """
        outputs = {each.name for block in self._following for each in block.intermediate_outputs}
        shown = next((name for name in SHOWN if name in outputs), None)
        if shown is None:
            raise UnsupportedPipeline(
                f"No block of {type(self._pipe).__name__} decodes the latents of its loop. Refinement.latents are "
                "available."
            )
        pipe = copy.copy(self._pipe)  # a block may set attributes
        vars(pipe).update(upcast_copies(pipe))
        state = _copied(self._state, latents=latents, output_type="pil")
        for block in self._following:
            _, state = block(pipe, state)
        return state.get(shown)


def _take_out(blocks: Any, out: set[int]) -> None:
    """Put blocks that do nothing in the place of some, also where their parent is running now."""
    for name, each in blocks.sub_blocks.items():
        if id(each) in out:
            blocks.sub_blocks[name] = _Nothing()
        else:
            _take_out(each, out)


class _Nothing:
    sub_blocks: ClassVar[dict[str, Any]] = {}

    def __call__(self, components: Any, state: Any) -> Any:
        return components, state


def _copied(state: Any, **changes: Any) -> Any:
    twin = copy.copy(state)
    twin.values = {**state.values, **changes}
    return twin

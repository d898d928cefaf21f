"""The arguments of a call of a modular pipeline: those of the blocks that the call will run."""

from __future__ import annotations

import inspect
from typing import Any

from ..networks import Arguments


def is_modular(pipe: Any) -> bool:
    """Whether it is a diffusers ModularPipeline. By name: an import of the class would cost other pipelines time."""
    return any(cls.__name__ == "ModularPipeline" for cls in type(pipe).__mro__)


def bind_modular(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The inputs of the blocks by name: what the call gives, what its `state` holds, and defaults.

    Which blocks run depends on the inputs, and so do the defaults: image-to-image has a strength, text-to-image none.
    TypeError: the arguments do not fit the signature of a modular pipeline.
    """
    call = inspect.signature(type(pipe).__call__).bind(pipe, *args, **kwargs).arguments
    given: Arguments = dict(call.get("kwargs", {}))
    blocks: Any = pipe._blocks
    groups = {each.kwargs_type for each in blocks.inputs if each.kwargs_type is not None}
    for group in groups & given.keys():  # several inputs in one dictionary
        given |= given.pop(group)
    state = call.get("state")
    given = ({} if state is None else state.values) | given
    given = {name: value for name, value in given.items() if value is not None}  # None stands for the default
    defaults = {each.name: each.default for each in _that_run(blocks, given).inputs if each.name is not None}
    arguments = defaults | given
    if arguments.get("num_inference_steps") is None and arguments.get("timesteps") is None:
        # no block of it sets the number of steps: the loop takes the timesteps that the scheduler has
        arguments["num_inference_steps"] = len(pipe.scheduler.timesteps)
    return arguments


def _that_run(blocks: Any, given: Arguments) -> Any:
    try:
        return blocks.get_execution_blocks(**given) or blocks
    except NotImplementedError:  # a single block
        return blocks

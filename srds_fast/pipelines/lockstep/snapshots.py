"""The scheduler as it is before each of its steps, for turns that are made in any order.

A loop may ask its scheduler for more than a step: to scale the network's input, for a sigma, for the noise of another
step. The answers depend on what the scheduler has stepped before. So a copy of it steps a sample of a single number
through the whole grid, and what the copy holds before each step, and after the last one, is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...caches import Cache, of_process
from ...schedulers.private_draws import PrivateDraws
from ...schedulers.reader import next_sample, state_key
from .turns import refused

MOST_KEPT = 8


@dataclass(frozen=True)
class Snapshots:
    """The attributes of a scheduler between its steps, and the dtype in which its last step returns the sample.

    keeps_sample: it keeps the very tensor that its step is given, for a later step. returns: how many values a step
    returns. ends_alike: all values of the last step are equal, as the sample and the predicted x0 of a scheduler that
    ends at x0.
    """

    kind: type
    states: list[dict[str, Any]]
    dtype: torch.dtype
    keeps_sample: bool
    returns: int
    ends_alike: bool

    def before(self, step: int, *, own: bool = False) -> Any:
        """A scheduler as it is before a step, and after the one before that. The loop may change it.

        own: its tensors are copies too, into which a user may write.
        """
        twin: Any = object.__new__(self.kind)
        state = _copied(self.states[step])
        if own:
            state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        vars(twin).update(state)
        return twin


_kept: Cache[Snapshots] = of_process("schedulers between steps", MOST_KEPT)


def snapshots(scheduler: Any, timesteps: Tensor, options: dict[str, Any], x: Tensor, m: Tensor) -> Snapshots:
    """Snapshots of a scheduler that is about to make its first step, from timesteps[0]; it is not changed.

    options: of the step. x, m: sample and output of the first step, of which the dtypes count.
    """
    given = {name: value for name, value in options.items() if name != "generator"}
    key = (
        state_key(scheduler),
        timesteps.cpu().numpy().tobytes(),
        repr(given),
        (x.dtype, m.dtype, x.device, x.ndim),
    )
    found = _kept.get(key)
    if found is None:
        found = _stepped(scheduler, timesteps, options, x, m)
        _kept[key] = found
    return found


def _stepped(scheduler: Any, timesteps: Tensor, options: dict[str, Any], x: Tensor, m: Tensor) -> Snapshots:
    twin: Any = object.__new__(type(scheduler))
    vars(twin).update(_copied(vars(scheduler)))
    if options.get("generator") is not None:
        options = {**options, "generator": torch.Generator().manual_seed(0)}
    sample, output = x.new_ones([1] * x.ndim), m.new_ones([1] * m.ndim)
    states, keeps_sample = list[dict[str, Any]](), False
    returned: tuple[Any, ...] = ()
    try:
        with PrivateDraws():
            for timestep in timesteps:
                states.append(_copied(vars(twin)))
                if hasattr(twin, "scale_model_input"):
                    twin.scale_model_input(sample, timestep)
                returned = twin.step(output, timestep, sample, **{**options, "return_dict": False})
                keeps_sample |= any(value is sample for value in vars(twin).values())
                sample = next_sample(returned)
            states.append(_copied(vars(twin)))
    except Exception as error:
        raise refused(f"{type(scheduler).__name__} cannot step a single number ({error})") from error
    alike = all(isinstance(each, Tensor) and torch.equal(each, sample) for each in returned)
    return Snapshots(type(scheduler), states, sample.dtype, keeps_sample, len(returned), alike)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in which lists are other lists: steps write into those, and into no tensor."""
    return {name: list(value) if isinstance(value, list) else value for name, value in state.copy().items()}

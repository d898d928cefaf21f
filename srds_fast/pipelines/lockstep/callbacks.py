"""`callback_on_step_end` in a loop that turns once per wave.

The user's function is called once for every final step, in order, with the state after that step. Only the timing
differs: several steps may become final in one wave. If the function changes anything, all results beyond that step are
dropped, and the rest of the call runs step by step, as the stock loop would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .loop import LockstepLoop


class StepCallback:
    """Replaces the user's `callback_on_step_end` in one call.

    Args:
        user: the user's function: (pipe, step, timestep, tensors by name) -> tensors by name.
        lockstep: the loop of this call, made with keep_states.

    Attributes:
        notified: number of steps for which the user's function was called.
    """

    def __init__(self, user: Callable[..., Any], lockstep: LockstepLoop) -> None:
        self.notified = 0
        self._user = user
        self._lockstep = lockstep

    def __call__(self, pipe: Any, turn: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        """Called by the loop at the end of each turn, with row-shaped latents.

        Returns:
            the tensors that the loop must continue with; none if nothing changed.
        """
        lockstep = self._lockstep
        latents = tensors.get("latents")
        while self.notified < lockstep.final_steps:
            step, self.notified = self.notified, self.notified + 1
            state = lockstep.state_after(step)
            x = state.to(pipe_dtype(latents, pipe), copy=True)
            shown = self._shown(tensors, x)
            before = _Snapshot(shown, pipe)
            assert lockstep.timesteps is not None
            outputs = self._user(pipe, step, lockstep.timesteps[step], dict(shown))
            if not isinstance(outputs, dict):
                return outputs  # the loop raises the stock pipe's own error
            if getattr(pipe, "_interrupt", False):
                newest = lockstep.newest()
                return {"latents": lockstep.interrupt(state if newest is None else newest, x.dtype)}
            changed = before.changed(outputs)
            if changed:
                reason = f"the callback changed {', '.join(changed)} at step {step}"
                return self._continue(step, outputs, x, reason)
        return {}

    def _shown(self, tensors: dict[str, Any], x: Tensor) -> dict[str, Any]:
        """The tensors as they are in the stock loop."""
        inpainting = self._lockstep.inpainting
        real: dict[str, Any] = {"latents": x}
        if inpainting is not None and inpainting.mask is not None:
            real["mask"] = inpainting.mask
        return {name: real.get(name, value) for name, value in tensors.items()}

    def _continue(self, step: int, outputs: dict[str, Any], x: Tensor, reason: str) -> dict[str, Any]:
        outputs = dict(outputs)
        mask = outputs.pop("mask", None)
        if mask is not None and self._lockstep.inpainting is not None:
            self._lockstep.inpainting.replace_mask(mask)
        outputs["latents"] = self._lockstep.go_on_from(step, outputs.get("latents", x), reason)
        return outputs


class _Snapshot:
    """Everything a callback can change: its tensors, and the attributes of the pipe that steer the loop."""

    def __init__(self, shown: dict[str, Any], pipe: Any) -> None:
        self._shown = shown
        self._kept = {name: _copy(value) for name, value in shown.items()}
        self._pipe = pipe
        self._attributes = self._steering()

    def changed(self, outputs: dict[str, Any]) -> list[str]:
        """Names of the tensors and attributes that have changed since."""
        tensors = [
            name
            for name, value in self._shown.items()
            if not _same(value, self._kept[name]) or (name in outputs and not _same(outputs[name], self._kept[name]))
        ]
        # the loop uses every tensor that is returned, even one that the callback was not given
        tensors += [name for name in outputs if name not in self._shown]
        attributes = self._steering()
        names = self._attributes.keys() | attributes.keys()
        missing = object()
        steering = [n for n in names if self._attributes.get(n, missing) is not attributes.get(n, missing)]
        return sorted(tensors) + sorted(name.lstrip("_") for name in steering)

    def _steering(self) -> dict[str, Any]:
        ignored = ("_interrupt", "_progress_bar_config", "_current_timestep")
        return {name: value for name, value in vars(self._pipe).items() if name[:1] == "_" and name not in ignored}


def _copy(value: Any) -> Any:
    if isinstance(value, list | tuple):  # the images of several ControlNets
        return type(value)(_copy(entry) for entry in value)
    return value.clone() if isinstance(value, Tensor) else value


def _same(value: Any, kept: Any) -> bool:
    if isinstance(value, list | tuple) and isinstance(kept, list | tuple):
        return len(value) == len(kept) and all(map(_same, value, kept))
    if isinstance(value, Tensor) and isinstance(kept, Tensor):
        return value.shape == kept.shape and torch.equal(value, kept)
    return value is kept


def pipe_dtype(latents: Any, pipe: Any) -> torch.dtype:
    """Dtype of the latents in the loop."""
    return latents.dtype if isinstance(latents, Tensor) else pipe.dtype

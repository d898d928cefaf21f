"""The loop of a scheduler as pipelines write it, with the arguments that its step asks for.

A step is given the network's output, the timestep and the sample. A few ask for more, which a loop knows: the timestep
of the turn before or after, or what the step before has returned beside the sample. They say so by the names of their
arguments, and some want the timestep as a vector. A scheduler may also list one timestep more than it has steps: the
one that its last step arrives at.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caches import signature_of
from .private_draws import PrivateDraws
from .refusal import refused

# arguments by the turn whose timestep they are, counted from the one that is made; None beyond the ends of the loop
OTHER_TIMESTEPS = {"timestep_back": -1, "prev_timestep": 1}
# an argument is what the step before has returned under the rest of this name; None in the first turn
RETURNED = "old_"
_STATE = ("model_output", "timestep", "sample")


@dataclass(frozen=True)
class StepCall:
    """How a loop calls the step of a scheduler, beyond what all of them are given.

    Attributes:
        eta: given to a step that takes it; None leaves the step's own default.
        asked: arguments that it is given beyond the three of all steps, by the names above.
        dtype: timesteps are converted to it; None: they are as the scheduler lists them.
        vector: the timestep is a vector with an entry for each sample.
    """

    eta: float | None = None
    asked: frozenset[str] = frozenset()
    dtype: torch.dtype | None = None
    vector: bool = False

    @classmethod
    def of(
        cls,
        scheduler: Any,
        eta: float | None = None,
        asked: frozenset[str] = frozenset(),
        dtype: torch.dtype | None = None,
    ) -> StepCall:
        """How this scheduler is called, if a loop also gives the arguments `asked`, which its step can do without.

        Raises UnsupportedScheduler if its step needs arguments that are not known here.
        """
        if not hasattr(scheduler, "step"):
            raise refused(scheduler, "it has no `step`")
        needed = _needed(scheduler)
        if len(needed) > len(_STATE):
            others = [name for name in needed if name not in _STATE]
            if len(others) + len(_STATE) > len(needed) or not all(map(is_known, others)):
                taken = f"({', '.join(_STATE)})"
                raise refused(scheduler, f"its step takes ({', '.join(needed)}), where others take {taken}")
            asked |= frozenset(others)
        found = cls(eta, asked, dtype)
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or not len(timesteps) or _steps_once(scheduler, found):
            return found
        vector = cls(eta, asked, dtype, vector=True)
        return vector if _steps_once(scheduler, vector) else found


def is_known(name: str) -> bool:
    """Whether it is known what an argument of a step is."""
    return name in OTHER_TIMESTEPS or name.startswith(RETURNED)


class OwnLoop:
    """Makes the steps of a scheduler, one after another.

    start: the timestep at which the loop begins, as those of img2img do. copied: make those of a fresh copy. device: of
    the timesteps. generator: for the noise of its steps, if they take one. options: further arguments of its step.
    """

    def __init__(
        self,
        scheduler: Any,
        call: StepCall,
        start: int = 0,
        *,
        copied: bool = True,
        device: torch.device | str = "cpu",
        generator: Any = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.scheduler = fresh_copy(scheduler, start, device) if copied else scheduler
        self.timesteps: Tensor = self.scheduler.timesteps[start:].to(device, call.dtype)
        self._timesteps = self.timesteps.unbind()
        self._call, self._turn = call, 0
        self._returned: Any = None  # by the last step
        self._by_name = len(_needed(scheduler)) > len(_STATE)
        self._options = self._fixed(generator) | (options or {})

    @property
    def takes_generator(self) -> bool:
        return "generator" in self._options

    def scaled(self, x: Tensor) -> Tensor:
        """The network's input in the turn that comes next."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        found: Tensor = self.scheduler.scale_model_input(x, self._timesteps[self._turn])
        return found

    def step(self, m: Tensor, x: Tensor) -> Tensor:
        """Make the next step: the next sample."""
        timestep = self._timesteps[self._turn]
        if self._call.vector:
            timestep = timestep.expand(len(x))
        given = {name: self._asked(name) for name in self._call.asked}
        if self._by_name:
            state = dict(zip(_STATE, (m, timestep, x), strict=True))
            self._returned = self.scheduler.step(**state, **given, **self._options)
        else:
            self._returned = self.scheduler.step(m, timestep, x, **given, **self._options)
        self._turn += 1
        found: Tensor = next_sample(self._returned)
        return found

    @property
    def returned(self) -> tuple[Any, ...]:
        """All values that the last step returned."""
        found: tuple[Any, ...] = self._returned if isinstance(self._returned, tuple) else self._returned.to_tuple()
        return found

    @property
    def clean(self) -> Any:
        """The clean sample that the last step reported; None if it reported none."""
        return self._beside("pred_original_sample")

    def _asked(self, name: str) -> Any:
        """The value of an argument in the turn that comes next."""
        if name in OTHER_TIMESTEPS:
            turn = self._turn + OTHER_TIMESTEPS[name]
            return self._timesteps[turn] if 0 <= turn < len(self._timesteps) else None
        return None if self._returned is None else self._beside(name.removeprefix(RETURNED))

    def _beside(self, name: str) -> Any:
        """What the last step returned under a name. A plain tuple has one such value, if a step asks for it by name."""
        if not isinstance(self._returned, tuple):
            return getattr(self._returned, name, None)
        named = f"{RETURNED}{name}" in self._call.asked and len(self._returned) > 1
        return self._returned[1] if named else None

    def _fixed(self, generator: Any) -> dict[str, Any]:
        """Options that are the same in every turn."""
        parameters = signature_of(self.scheduler.step).parameters
        options: dict[str, Any] = {}
        if "return_dict" in parameters:
            options["return_dict"] = True  # the output then says which of its parts is x0
        elif any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            options["return_dict"] = False  # a step that passes its arguments on, as loops call it
        if "generator" in parameters:
            options["generator"] = generator
        if self._call.eta is not None and "eta" in parameters:
            options["eta"] = self._call.eta
        return options


def _needed(scheduler: Any) -> list[str]:
    """The arguments that a step cannot do without."""
    listed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = signature_of(scheduler.step).parameters
    return [name for name, each in parameters.items() if each.default is each.empty and each.kind not in listed]


def _steps_once(scheduler: Any, call: StepCall) -> bool:
    """Whether a first step on a sample of a single number succeeds."""
    number = torch.ones(1, 1, 1, 1, dtype=torch.float64, device="cpu")
    try:
        with PrivateDraws():
            loop = OwnLoop(scheduler, call, generator=torch.Generator().manual_seed(0))
            loop.scaled(number)
            loop.step(number, number)
    except Exception:
        return False
    return True


def copy_scheduler(scheduler: Any) -> Any:
    """A deep copy. dict.copy() is atomic, which matters if another thread sets timesteps on the original."""
    twin, held = object.__new__(type(scheduler)), vars(scheduler).copy()
    # deepcopy takes ten times as long to copy a tensor
    tensors = {id(value): value.clone() for value in held.values() if type(value) is Tensor}
    vars(twin).update(copy.deepcopy(held, {id(scheduler): twin, **tensors}))
    return twin


def fresh_copy(scheduler: Any, start: int = 0, device: torch.device | str = "cpu") -> Any:
    """A copy whose next step is that of timestep `start`, as if it were the first, with its timesteps on a device."""
    trial = copy_scheduler(scheduler)
    trial.timesteps = trial.timesteps.to(device)
    if hasattr(trial, "set_begin_index"):  # img2img pipelines set another begin index
        trial.set_begin_index(start)
        trial._step_index = None
    return trial


def next_sample(output: Any) -> Any:
    """The sample in what a step returns."""
    return output[0] if isinstance(output, tuple) else output.prev_sample

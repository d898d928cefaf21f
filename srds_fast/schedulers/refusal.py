"""What the error says about a scheduler that is not supported: what, why, and the line to write instead."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedScheduler

# supported schedulers, each with those of its kind that are not: their steps are called in their own way
_REPLACED_BY = {
    "EDMEuler": ("KarrasVe",),
}


# values of options that are supported, by class; the first one is put into the line to write
_DPM: dict[str, tuple[Any, ...]] = {"variance_type": (None,)}
_DDPM: dict[str, tuple[Any, ...]] = {
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
}
_OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDPM": _DDPM,
    "DDPMParallel": _DDPM,
    "DPMSolverMultistep": _DPM,
    "DPMSolverSinglestep": _DPM,
    "EDMDPMSolverMultistep": _DPM,
    "UnCLIP": {"variance_type": ("fixed_small_log",)},
}


def refused(scheduler: Any, reason: str) -> UnsupportedScheduler:
    """The error for a scheduler that is not supported. reason: a clause in plain words, without a full stop."""
    name = type(scheduler).__name__
    kind = name.removesuffix("Scheduler")
    other = next((f"{each}Scheduler" for each, replaced in _REPLACED_BY.items() if kind in replaced), None)
    options = "".join(
        f", {option}={values[0]!r}"
        for option, values in _OPTIONS.get(kind, {}).items()
        if scheduler.config.get(option, values[0]) not in values
    )
    if options:
        other = name
    what_to_do = (
        "Use a scheduler of another class if the network was trained for it, or run without srds_fast."
        if other is None
        else "Another scheduler changes the sample, so the choice is yours. Write "
        f"`pipe.scheduler = diffusers.{other}.from_config(pipe.scheduler.config{options})`."
    )
    return UnsupportedScheduler(f"{name} is not supported: {reason}. {what_to_do}")

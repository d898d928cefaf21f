"""What the error says about a scheduler that is not supported: what, why, and the line to write instead."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedScheduler

# supported schedulers, each with those of its kind that are not: they carry more than one x0 from step to step, draw
# noise in their own way, or are called in their own way
_REPLACED_BY = {
    "DDIM": ("PNDM", "IPNDM"),
    "CogVideoXDDIM": ("CogVideoXDPM",),
    "DPMSolverMultistep": ("UniPCMultistep", "DEISMultistep", "SASolver", "DPMSolverSinglestep"),
    "EulerDiscrete": ("LMSDiscrete",),
    "EulerAncestralDiscrete": ("DPMSolverSDE",),
    "EDMEuler": ("KarrasVe",),
    "EDMDPMSolverMultistep": ("CosineDPMSolverMultistep",),
}


# classes that are supported with these values of options only
_DPM = {"thresholding": False, "variance_type": None, "algorithm_type": "dpmsolver++", "solver_order": 2}
_OPTIONS: dict[str, dict[str, Any]] = {
    "DPMSolverMultistep": _DPM,
    "DPMSolverSinglestep": _DPM,
    "EDMDPMSolverMultistep": _DPM,
    "FlowMatchEulerDiscrete": {"invert_sigmas": False},
    "HeunDiscrete": {"clip_sample": False},
    "LCM": {"clip_sample": False, "thresholding": False},
    "TCD": {"clip_sample": False, "thresholding": False},
    "UnCLIP": {"clip_sample": False},
}


def refused(scheduler: Any, reason: str) -> UnsupportedScheduler:
    """The error for a scheduler that is not supported. reason: a clause in plain words, without a full stop."""
    name = type(scheduler).__name__
    kind = name.removesuffix("Scheduler")
    other = next((f"{each}Scheduler" for each, replaced in _REPLACED_BY.items() if kind in replaced), None)
    needed = _OPTIONS.get(kind, {})
    options = "".join(
        f", {option}={value!r}"
        for option, value in needed.items()
        if (given := scheduler.config.get(option, value)) != value and not (option == "solver_order" and given == 1)
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

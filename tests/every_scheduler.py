"""The scheduler classes of diffusers, each with configs and what becomes of them."""

from __future__ import annotations

import importlib.util
from typing import Any

import diffusers.schedulers

STEPS = 20
CLIPS, TAKES = "clips or thresholds", "its step takes"
UNCLIPPED = {"clip_sample": False}
ORDERS: list[dict[str, Any]] = [{"solver_order": order} for order in (1, 2, 3)]
SIGMAS: list[dict[str, Any]] = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, **V}
DPM: list[dict[str, Any]] = [
    *ORDERS,
    *SIGMAS,
    FLOW,
    V,
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"solver_type": "heun"},
]

# what becomes of each class, by config: None if it is read, else a part of the reason
VERDICTS: dict[str, list[tuple[dict[str, Any], str | None]]] = {
    "CMStochasticIterative": [({}, CLIPS), ({"clip_denoised": False}, None)],
    "CogVideoXDDIM": [({}, None), (V, None), (ZERO_SNR, None)],
    "CogVideoXDPM": [
        ({}, None),
        (V, None),
        ({**ZERO_SNR, "timestep_spacing": "trailing"}, None),
    ],
    "CosineDPMSolverMultistep": [({}, None)],
    "DDIM": [({}, CLIPS), (UNCLIPPED, None), ({"thresholding": True}, CLIPS), ({**UNCLIPPED, **V}, None)],
    "DDIMInverse": [({}, CLIPS), (UNCLIPPED, None)],
    "DDIMParallel": [({}, CLIPS), (UNCLIPPED, None)],
    "DDPM": [({}, CLIPS), (UNCLIPPED, None), ({**UNCLIPPED, "variance_type": "fixed_large"}, None)],
    "DDPMParallel": [({}, CLIPS), (UNCLIPPED, None)],
    "DDPMWuerstchen": [({}, None), ({"scaler": 2.0}, None)],
    "DEISMultistep": [({}, None), *((each, None) for each in (*ORDERS, *SIGMAS, FLOW, V))],
    "DPMSolverMultistep": [({}, None), *((each, None) for each in DPM), ({"thresholding": True}, CLIPS)],
    "DPMSolverMultistepInverse": [({}, None)],
    "DPMSolverSDE": [({}, None), (V, None), ({"use_karras_sigmas": True, "noise_sampler_seed": 3}, None)],
    "DPMSolverSinglestep": [({}, None), *((each, None) for each in (*ORDERS, *SIGMAS, FLOW, V))],
    "EDMDPMSolverMultistep": [({}, None), *((each, None) for each in (*ORDERS, {"algorithm_type": "sde-dpmsolver++"}))],
    "EDMEuler": [({}, None), (V, None), ({"sigma_schedule": "exponential"}, None)],
    "EulerAncestralDiscrete": [({}, None), (V, None)],
    "EulerDiscrete": [({}, None), *((each, None) for each in (*SIGMAS, V))],
    "FlowMapEulerDiscrete": [({}, None), ({"shift": 3.0}, None)],
    "FlowMatchEulerDiscrete": [
        ({}, None),
        ({"shift": 3.0}, None),
        ({"invert_sigmas": True}, None),
        ({"stochastic_sampling": True}, None),
    ],
    "FlowMatchHeunDiscrete": [({}, None), ({"shift": 3.0}, None)],
    "FlowMatchLCM": [({}, None), ({"shift": 3.0}, None)],
    "HeunDiscrete": [({}, None), *((each, None) for each in (*SIGMAS, V)), ({"clip_sample": True}, CLIPS)],
    "IPNDM": [({}, None)],
    "KDPM2AncestralDiscrete": [({}, None), *((each, None) for each in (*SIGMAS, V))],
    "KDPM2Discrete": [({}, None), *((each, None) for each in (*SIGMAS, V))],
    "KarrasVe": [({}, TAKES)],
    "LCM": [({}, None), (V, None), ({"clip_sample": True}, CLIPS)],
    "LMSDiscrete": [({}, None), ({"use_karras_sigmas": True}, None), (V, None)],
    "LTXEulerAncestralRF": [({}, None), ({"eta": 0.0}, None)],
    "MiniMaxH3": [({}, None)],
    "PNDM": [({}, None), ({"skip_prk_steps": True}, None), ({**V, "skip_prk_steps": True}, None)],
    "RePaint": [({}, TAKES)],
    "SASolver": [({}, None), (V, None)],
    "ScoreSdeVe": [({}, "it has no `step`")],
    "ScoreSdeVp": [({}, "it has no `step`")],
    "SCM": [({}, None)],
    "TCD": [({}, None), (V, None)],
    "UnCLIP": [({}, CLIPS), (UNCLIPPED, None)],
    "UniPCMultistep": [
        ({}, None),
        *((each, None) for each in (*ORDERS, *SIGMAS, FLOW, V)),
        ({"disable_corrector": [0, 1]}, None),
        ({"solver_type": "bh1"}, "divides by zero"),  # diffusers' own loop ends in NaN
        ({"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, None),
        ({"predict_x0": False, "final_sigmas_type": "sigma_min"}, None),
    ],
}
# made with arguments, for tokens, for two steps at most, or with a package that is not installed
NOT_MADE = {
    "Amused", "BlockRefinement", "ConsistencyDecoder", "DiscreteDDIM",
    "EntropyBound", "HeliosDMD", "Helios", "Piflow", "RFD4Proteina", "VQDiffusion",
}  # fmt: skip


# whose noise follows a path of their own: a package makes it of many draws
BROWNIAN = {"CosineDPMSolverMultistep", "DPMSolverSDE"}


def made(name: str, config: dict[str, Any], num_steps: int = STEPS) -> Any:
    scheduler = getattr(diffusers.schedulers, f"{name}Scheduler")(**config)
    if name == "CMStochasticIterative":
        num_steps = 10
    if hasattr(scheduler, "set_timesteps"):
        scheduler.set_timesteps(num_steps, **({"intermediate_timesteps": None} if name == "SCM" else {}))
    return scheduler


def is_there(name: str) -> bool:
    """Whether this installation of diffusers has the class, and the package that it needs."""
    cls = getattr(diffusers.schedulers, f"{name}Scheduler", None)
    needed = set(getattr(cls, "_backends", ())) - {"torch"}  # a class that stands in for one whose package is missing
    return cls is not None and all(map(importlib.util.find_spec, needed))


READ = [
    (name, config)
    for name, verdicts in VERDICTS.items()
    if is_there(name)
    for config, reason in verdicts
    if reason is None
]


def has_table(name: str, config: dict[str, Any]) -> bool:
    """Whether what is read of a scheduler is a table: its noise levels are known."""
    return name != "DDIMInverse"


def is_sampled(name: str, config: dict[str, Any]) -> bool:
    """Whether `sample` takes it: SCM sets its timesteps by more than their number."""
    return has_table(name, config) and name != "SCM"


# schedulers that carry more from step to step than one x0
HISTORIES: list[tuple[str, dict[str, Any]]] = [
    ("PNDM", {"skip_prk_steps": True}),
    ("PNDM", {}),
    ("IPNDM", {}),
    ("UniPCMultistep", {}),
    ("UniPCMultistep", {"solver_order": 3}),
    ("UniPCMultistep", FLOW),
    ("DEISMultistep", {}),
    ("DEISMultistep", {"solver_order": 3}),
    ("DPMSolverMultistep", {"solver_order": 3}),
    ("DPMSolverMultistep", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestep", {"solver_order": 3}),
    ("EDMDPMSolverMultistep", {"solver_order": 3}),
    ("LMSDiscrete", {}),
    ("SASolver", {}),
]

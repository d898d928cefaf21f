"""Check: rows shared over one dimension of a mesh, and each call of the transformer over another one, by diffusers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from failing import FailsOnce
from ranked import apart, ended, latents, named, pipeline

import srds_fast

SETTINGS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "srds": {"method": "srds", "exact": True},
    "collocation": {"method": "collocation", "exact": True},
    "auto": {"tolerance": 1e-9},
}


@named
def composed() -> Any:
    """Four processes: two for rows, and two for the sequence of each of their calls."""
    mesh = dist.init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("time", "ring", "ulysses"))
    pipe, call = pipeline("flux")
    call |= {"true_cfg_scale": 2.0, "negative_prompt": "a dog", "num_inference_steps": 6}
    stock = latents(pipe, call)
    found: dict[str, Any] = {
        "no call is split": ended(lambda: latents(srds_fast.compile(pipe, parallel=mesh), call)),
        "samples": {},
        "plans": [],
    }
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):  # diffusers divides by it, on CPUs too
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
    for name, settings in SETTINGS.items():
        fast = srds_fast.compile(pipe, parallel=mesh, **settings)
        for _ in range(1 + 2 * (name == "auto")):
            difference, report = apart(latents(fast, call), stock), fast.report
            found["plans"].append([report.plan, report.plan_state, report.waves])
        found["samples"][name] = [difference, report.path, report.ranks, report.rank_units, report.fallback_reason]
    found["all ranks share rows"] = ended(lambda: latents(srds_fast.compile(pipe, parallel="auto"), call))
    alone = srds_fast.compile(pipe)
    latents(alone, call)
    found["without a mesh"] = alone.report.fallback_reason
    fast = srds_fast.compile(pipe, parallel=mesh, method="srds")
    broken = FailsOnce(ValueError("broken"), on=3)
    found["fails on one rank"] = ended(lambda: latents(fast, {**call, "callback_on_step_end": broken}))
    found["after it"] = apart(latents(srds_fast.compile(pipe, parallel=mesh, method="sequential"), call), stock)
    return found

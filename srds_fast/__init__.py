"""srds_fast: parallel-in-time diffusion sampling (SRDS) for diffusers pipelines and any other denoiser.

    fast = srds_fast.compile(pipe)          # a drop-in for the pipeline
    result = srds_fast.sample(denoiser, x, scheduler, num_inference_steps=100)

Importing this package is light: everything is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import program as program
    from . import zoo as zoo
    from .engine.graphs import Graphs as Graphs
    from .errors import (
        CaptureFailed as CaptureFailed,
    )
    from .errors import (
        DivergenceError as DivergenceError,
    )
    from .errors import (
        InvalidArgument as InvalidArgument,
    )
    from .errors import (
        PlanMismatch as PlanMismatch,
    )
    from .errors import (
        SrdsFastError as SrdsFastError,
    )
    from .errors import (
        UnsupportedPipeline as UnsupportedPipeline,
    )
    from .errors import (
        UnsupportedScheduler as UnsupportedScheduler,
    )
    from .pipeline import compile as compile
    from .plan import Plan as Plan
    from .report import Report as Report
    from .sampler import SampleResult as SampleResult
    from .sampler import sample as sample
    from .telemetry import profile as profile

__version__ = "0.1.0"

_HOME = {
    "compile": "pipeline",
    "sample": "sampler",
    "profile": "telemetry",
    "SampleResult": "sampler",
    "Plan": "plan",
    "Report": "report",
    "Graphs": "engine.graphs",
    "CaptureFailed": "errors",
    "DivergenceError": "errors",
    "InvalidArgument": "errors",
    "PlanMismatch": "errors",
    "SrdsFastError": "errors",
    "UnsupportedPipeline": "errors",
    "UnsupportedScheduler": "errors",
}
_MODULES = ("kernels", "program", "zoo")

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

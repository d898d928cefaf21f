"""srds_fast: parallel-in-time diffusion sampling (SRDS) for diffusers pipelines and any other denoiser.

    fast = srds_fast.compile(pipe)          # a drop-in for the pipeline
    result = srds_fast.sample(denoiser, x, scheduler, num_inference_steps=100)

Importing this package is fast: modules are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import log as _log
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import caches as caches
    from . import methods as methods
    from . import schedulers as schedulers
    from . import zoo as zoo
    from .engine.cancellation import using as using
    from .engine.graphs.cache import Graphs as Graphs
    from .errors import Cancelled as Cancelled
    from .errors import CaptureFailed as CaptureFailed
    from .errors import DivergenceError as DivergenceError
    from .errors import InvalidArgument as InvalidArgument
    from .errors import PlanMismatch as PlanMismatch
    from .errors import RankFailed as RankFailed
    from .errors import RankLost as RankLost
    from .errors import RankMismatch as RankMismatch
    from .errors import SrdsFastError as SrdsFastError
    from .errors import UnknownArgument as UnknownArgument
    from .errors import UnsupportedPipeline as UnsupportedPipeline
    from .errors import UnsupportedScheduler as UnsupportedScheduler
    from .pipelines.compile import Compiled as Compiled
    from .pipelines.compile import compile as compile
    from .planner.plan import Plan as Plan
    from .sampling.sample import SampleResult as SampleResult
    from .sampling.sample import sample as sample
    from .sampling.stream import AsyncStream as AsyncStream
    from .sampling.stream import Refinement as Refinement
    from .sampling.stream import Stream as Stream
    from .sampling.streams import astream as astream
    from .sampling.streams import stream as stream
    from .solvers import program as program
    from .telemetry import profile as profile
    from .telemetry.report import Report as Report


_log.configure()

_HOME = {
    "compile": "integrations.compile",
    "Compiled": "pipelines.compile",
    "sample": "sampling.sample",
    "stream": "sampling.streams",
    "astream": "sampling.streams",
    "using": "engine.cancellation",
    "profile": "telemetry",
    "Stream": "sampling.stream",
    "AsyncStream": "sampling.stream",
    "Refinement": "sampling.stream",
    "SampleResult": "sampling.sample",
    "Plan": "planner.plan",
    "Report": "telemetry.report",
    "Graphs": "engine.graphs.cache",
    "Cancelled": "errors",
    "CaptureFailed": "errors",
    "DivergenceError": "errors",
    "InvalidArgument": "errors",
    "PlanMismatch": "errors",
    "RankFailed": "errors",
    "RankLost": "errors",
    "RankMismatch": "errors",
    "SrdsFastError": "errors",
    "UnknownArgument": "errors",
    "UnsupportedPipeline": "errors",
    "UnsupportedScheduler": "errors",
}
_MODULES = {
    "caches": "caches",
    "kernels": "kernels",
    "methods": "methods",
    "program": "solvers.program",
    "schedulers": "schedulers",
    "zoo": "zoo",
}

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *__all__])

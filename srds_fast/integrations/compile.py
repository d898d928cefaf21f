"""`srds_fast.compile`: of a diffusers pipeline, or of a robot policy."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from ..errors import UnknownArgument
from ..pipelines.compile import compile as compile_pipeline
from .lerobot import compile_policy, is_policy

_OF_POLICIES = tuple(inspect.signature(compile_policy).parameters)[1:]


@functools.wraps(compile_pipeline)
def compile(pipe: Any, **settings: Any) -> Any:
    if not is_policy(pipe):
        return compile_pipeline(pipe, **settings)
    for name in settings:
        if name not in _OF_POLICIES:
            raise UnknownArgument(
                f"{name} is no setting for a policy. Known are {', '.join(_OF_POLICIES)}. Leave it out."
            )
    return compile_policy(pipe, **settings)

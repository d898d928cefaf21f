"""Keywords of a call that are settings of `compile`: an error, with the line to write instead.

Many pipelines of diffusers take `**kwargs`, look for one or two names in it, and drop the rest without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import UnknownArgument
from .modular.arguments import is_modular


def refuse_settings(pipe: Any, given: Mapping[str, Any]) -> None:
    """Raise UnknownArgument for the first of the keywords given that the pipeline does not know, and `compile` does."""
    import srds_fast

    known = set(inspect.signature(type(pipe).__call__).parameters)
    settings = inspect.signature(srds_fast.compile).parameters.keys() & given.keys() - known
    if settings and is_modular(pipe):
        settings -= {each.name for each in pipe._blocks.inputs}
    for name in settings:
        value = given[name]
        shown = repr(value) if value is None or isinstance(value, bool | int | float | str) else "..."
        raise UnknownArgument(
            f"{type(pipe).__name__} takes no argument {name}. {name} is a setting of compile: write "
            f"srds_fast.compile(pipe, {name}={shown})."
        )

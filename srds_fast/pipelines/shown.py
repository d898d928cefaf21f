"""What a stock call leaves to be read on a pipeline, such as `num_timesteps`: compiled pipelines keep it by thread.

A compiled pipeline shares its attributes with the user's own one. A stock call of that one in another thread steers its
loop by the same attributes, so nothing is written to them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .kinds import set_by

_TOLD = (type(None), bool, int, float, str, dict, list, tuple, Tensor)


def settings_of(twin: Any) -> dict[str, Any]:
    """What a call has set on the copy of the pipe that it ran on, for its properties to read."""
    marks = set_by(type(twin)) - {"_interrupt"}
    return {name: value for name, value in vars(twin).items() if name in marks and type(value) in _TOLD}


def shown_properties(base: type) -> dict[str, property]:
    """The properties of a pipeline's class, to be read from what the last call of the thread left."""
    from diffusers import DiffusionPipeline  # it takes a second to import, and has been by who has a pipeline

    if not issubclass(base, DiffusionPipeline):
        return {}
    own = (cls for cls in base.__mro__ if not issubclass(DiffusionPipeline, cls))
    names = {name for cls in own for name in vars(cls) if isinstance(getattr(base, name, None), property)}
    return {name: _shown(base, getattr(base, name)) for name in names}


def _shown(base: type, inherited: property) -> property:
    read = inherited.fget
    assert read is not None

    def read_last(fast: Any) -> Any:
        left = dict(fast._srds.last.settings)
        if not left:
            return read(fast)
        view: Any = object.__new__(base)
        vars(view).update({"_interrupt": False} | vars(fast) | left)
        return read(view)

    return property(read_last, inherited.fset, inherited.fdel, inherited.__doc__)

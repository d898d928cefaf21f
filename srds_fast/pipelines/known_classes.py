"""Classes of diffusers whose loops make the same turns in any order, as was seen when the matrix of support was made.

known_classes.json is written by `python -m bench.quality.support`, which rehearses every loop in full. It holds digests
of the source files of these classes, for one version of diffusers. The rehearsal of such a loop makes a few turns again
instead of all: it has no counter. Momentum, which may depend on a setting, shows in each turn.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

from ..engine.graphs.cache_key import global_names
from .network_checks import foreign_code
from .replaced import functions_of

FILE = Path(__file__).with_suffix(".json")
_PACKAGES = ("diffusers", "torch", "huggingface_hub")


def is_known(pipe: Any, networks: Iterable[nn.Module]) -> bool:
    """Whether the loop of a pipeline is one of these, and nothing stands in it that diffusers has not put there.

    All functions of its class and of its scheduler's are those of diffusers, no function or object of the user's is on
    the pipeline, and no module has a class, a `forward`, a hook or a processor of an unknown package.
    """
    cls, scheduler = type(pipe.original), type(pipe.scheduler)
    known = digests().get(cls.__name__)
    if known is None or not cls.__module__.startswith("diffusers.") or known != digest_of(cls):
        return False
    functions = (*_functions_of(cls), *_functions_of(scheduler), *_called_by(cls.__call__))
    return all(map(is_of_diffusers, functions)) and not any(functions_of(pipe)) and foreign_code(networks) is None


@functools.cache
def digests() -> dict[str, str]:
    """Digests by name of class; none where another version of diffusers is installed."""
    import diffusers

    found = json.loads(FILE.read_text())
    classes: dict[str, str] = found["classes"]
    return classes if found["diffusers"] == diffusers.__version__ else {}


def digest_of(cls: type) -> str:
    """Of the source file that a class is from."""
    return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()


def is_of_diffusers(function: Any) -> bool:
    """Whether a function, with its decorators, is all from diffusers or torch."""
    while function is not None:
        # functools.wraps copies __module__, so only the globals show where the code comes from
        module = str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))
        if module.partition(".")[0] not in _PACKAGES:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _functions_of(cls: type) -> Iterator[FunctionType]:
    """The functions of a class and of those that it is made from."""
    for each in cls.__mro__:
        for value in vars(each).values():
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if isinstance(function, FunctionType):
                yield function


def _called_by(function: Any) -> Iterator[FunctionType]:
    """The functions of its module that a function calls by their names."""
    inner = inspect.unwrap(function)
    for name in global_names(inner.__code__) & inner.__globals__.keys():
        if isinstance(value := inner.__globals__[name], FunctionType):
            yield value

"""Keywords of a call that its pipeline does not know: an error, with the line to write instead.

Many pipelines of diffusers take `**kwargs`, look for one or two names in it, and drop the rest without a word.
"""

from __future__ import annotations

import difflib
import dis
import inspect
import itertools
import weakref
from collections.abc import Collection, Iterator, Mapping
from types import CodeType
from typing import Any

from ..caches import Cache, cached, of_process, signature_of
from ..errors import UnknownArgument

_LOOKED_UP = ("get", "pop")  # methods of a dictionary that ask for one name
# by modular pipeline
_inputs: Cache[set[str]] = of_process("inputs of modular pipelines")


def refuse_unknown(pipe: Any, given: Mapping[str, Any], own: Collection[str], modular: bool) -> None:
    """Raise UnknownArgument for the first keyword that the pipeline does not know.

    given: the keywords of a call. own: those that srds_fast adds.
    """
    known = _inputs_of(pipe, given) if modular else _keywords_of(type(pipe).__call__)
    if known is None:
        return
    for name, value in given.items():
        if name not in known:
            raise UnknownArgument(f"{type(pipe).__name__} takes no argument {name}. {_advice(name, value, known, own)}")


def _advice(name: str, value: Any, known: Collection[str], own: Collection[str]) -> str:
    import srds_fast

    if name in inspect.signature(srds_fast.compile).parameters:
        shown = repr(value) if value is None or isinstance(value, bool | int | float | str) else "..."
        return f"{name} is a setting of compile: write srds_fast.compile(pipe, {name}={shown})."
    close = difflib.get_close_matches(name, [*known, *own], n=1, cutoff=0.75)
    return f"Did you mean {close[0]}?" if close else "It would have no effect. Leave it out."


@cached
def _keywords_of(call: Any) -> frozenset[str] | None:
    """The keywords that a pipeline's `__call__` knows; None if it passes those that it does not name to another."""
    parameters = signature_of(call).parameters.values()
    named = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
    rest = next((each.name for each in parameters if each.kind is each.VAR_KEYWORD), None)
    if rest is None:
        return frozenset(named)
    code = getattr(inspect.unwrap(call), "__code__", None)
    if code is None or rest in code.co_cellvars or not _only_looks_up(code, rest):
        return None
    return frozenset(named | set(_strings(code)))


def _only_looks_up(code: CodeType, rest: str) -> bool:
    """Whether code asks its dictionary of other keywords for single names, and does nothing else with it."""
    instructions = list(dis.get_instructions(code))
    for this, after in itertools.pairwise(instructions):
        if isinstance(this.argval, tuple) and rest in this.argval:  # loaded together with another variable
            return False
        if this.argval == rest and this.opname.startswith("LOAD"):
            by_name = after.opname in ("CONTAINS_OP", "LOAD_CONST") or after.argval in _LOOKED_UP
            if not by_name:
                return False
    return True


def _strings(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple | frozenset):  # names that it goes through
            yield from (each for each in constant if isinstance(each, str))
        elif isinstance(constant, CodeType):
            yield from _strings(constant)


def _inputs_of(pipe: Any, given: Mapping[str, Any]) -> set[str]:
    """The inputs that the blocks of a modular pipeline take. To ask for them takes milliseconds."""
    blocks, call = pipe._blocks, signature_of(type(pipe).__call__).parameters
    key = weakref.ref(blocks)
    found = _inputs.get(key)
    if found is None or not found.issuperset(given):
        names = [name for each in blocks.inputs for name in (each.name, each.kwargs_type)]
        _inputs[key] = found = {name for name in names if name is not None} | set(call)
    return found

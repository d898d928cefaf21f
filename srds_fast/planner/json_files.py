"""JSON files of plans and costs: written whole or not at all, and checked field by field when they are read."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..files import new_file

T = TypeVar("T")
# plans and curves are a few thousand bytes long
MOST_BYTES = 2**20


def write(path: Path, found: Any) -> None:
    """Write JSON; see `files.new_file`. Raises OSError, and InvalidArgument if the path is no place for a file."""
    with new_file(path) as unfinished:
        unfinished.write_text(json.dumps(found, indent=2) + "\n")


def read(path: Path) -> Any:
    """What a JSON file holds. Raises OSError, and ValueError if it is too long, too deep or no JSON."""
    with path.open() as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} characters")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists are too deep") from None


def build(cls: type[T], found: Any, **made: Any) -> T:
    """The dataclass of a JSON object that has its fields and no others, each of its type. Raises ValueError.

    made: fields that are not read from the object.
    """
    assert is_dataclass(cls)
    names = {each.name for each in fields(cls)} - set(made)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} where the fields of {cls.__name__} should be")
    if odd := sorted(names ^ set(found)):
        raise ValueError(f"{cls.__name__} has other fields: {', '.join(odd)} are missing or unknown")
    hints = get_type_hints(cls)
    return cls(**{name: converted(hints[name], value, name) for name, value in found.items()}, **made)


def converted(hint: Any, value: Any, name: str) -> Any:
    """A JSON value as the type that is asked for. Raises ValueError that names the field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        errors = []
        for each in arguments:
            try:
                return converted(each, value, name)
            except ValueError as error:
                errors.append(error)
        if isinstance(value, dict):  # which of its fields is wrong
            raise errors[0]
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(converted(arguments[0], each, name) for each in value)
    elif is_dataclass(hint):
        return build(hint, value)  # type: ignore[arg-type]
    elif hint is float and value == str(math.inf):  # JSON has no such number
        return math.inf
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
    elif type(value) is (origin or hint):  # int, str, bool, None, and objects of any content
        return value
    raise ValueError(f"{name} is {str(value)[:40]!r}")

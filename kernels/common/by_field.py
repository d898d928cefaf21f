"""Named tuples kept field by field: programs may have a million, and a tuple for each takes time and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast, overload

Kind = TypeVar("Kind", bound=NamedTuple)


class ByField(Sequence[Kind]):
    """A sequence of named tuples of one kind.

    fields: the values of each field, in the order of the tuples.
    """

    __slots__ = ("fields", "kind")

    def __init__(self, kind: type[Kind], fields: Iterable[Iterable[Any]]) -> None:
        self.kind, self.fields = kind, tuple(map(tuple, fields))

    def __len__(self) -> int:
        return len(self.fields[0])

    def __iter__(self) -> Iterator[Kind]:
        return map(self.kind._make, zip(*self.fields, strict=True))

    @overload
    def __getitem__(self, index: int) -> Kind: ...
    @overload
    def __getitem__(self, index: slice) -> ByField[Kind]: ...
    def __getitem__(self, index: int | slice) -> Kind | ByField[Kind]:
        found = [field[index] for field in self.fields]
        return ByField(self.kind, found) if isinstance(index, slice) else self.kind._make(found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByField) and (self.kind, self.fields) == (other.kind, other.fields)

    def __hash__(self) -> int:
        return hash(self.fields)

    def __repr__(self) -> str:
        return repr(list(self))


def fields_of(kind: type[Kind], found: Sequence[Kind]) -> tuple[tuple[Any, ...], ...]:
    """The values of each field of these named tuples."""
    if isinstance(found, ByField):
        return cast(tuple[tuple[Any, ...], ...], found.fields)
    return tuple(zip(*found, strict=True)) or ((),) * len(kind._fields)

"""Values that no argument, or few, can take: what a fuzz puts in the place of good ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn


class Stubborn:
    """Says nothing of itself."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Unprintable:
    """Can be neither shown nor compared, as an array can not be."""

    def __repr__(self) -> str:
        raise ValueError("cannot be shown")

    def __eq__(self, other: object) -> bool:
        raise ValueError("cannot be compared")

    def __bool__(self) -> bool:
        raise ValueError("is neither true nor false")

    __hash__ = None  # type: ignore[assignment]


def _tensors() -> list[Any]:
    return [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(2, 8),
        torch.full((2, 8), math.nan),
        torch.full((2, 8), math.inf),
        torch.zeros(2, 8, dtype=torch.float16),
        torch.zeros(2, 8, dtype=torch.complex64),
        torch.zeros(2, 8, dtype=torch.int64),
        torch.zeros(2, 8, dtype=torch.bool),
        torch.zeros(2, 8, device="meta"),
        torch.zeros(2, 8).to_sparse(),
        torch.zeros(2, 8, requires_grad=True),
        torch.tensor(3),
        torch.tensor(True),
        torch.zeros(3, 8),
        torch.zeros(1, 1, 1, 1, 1, 1, 1),
    ]


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 10**30, -(10**30), 10**400, 10**5000,
    0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-300, 1e300,
    math.nan, math.inf, -math.inf, 2j, "", "a", "srds", "auto", "none", "True", "1", "-1", "nan", "\0",
    "é\ud800", "x" * 3000,
    b"", b"bytes", [], [None], [1], ["a"], [[]], (), (1, 2), {}, {"a": 1}, {1: 2}, set(), {1}, frozenset(), range(3),
    Ellipsis, NotImplemented, object(), object, type, int, len, print, lambda: None, lambda *args, **kwargs: None,
    Exception("e"), Stubborn(), Unprintable(), iter([1]), Path("file"), Path("/"), slice(1), memoryview(b"a"),
    np.float32(1.5), np.float64("nan"), np.int64(3), np.bool_(True), np.array([1.0]), np.array("a"), np.zeros((2, 8)),
    torch.float32, torch.device("cpu"), torch.Size([2]), torch.Generator(), [torch.Generator()], torch.strided,
    nn.Identity(), nn.Identity, nn.Linear(8, 8),
    *_tensors(),
]  # fmt: skip


# what these raise is their own
CALLABLE = [each for each in ODD if callable(each)]


def changed(valid: Mapping[str, Any], names: tuple[str, ...], good: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """The arguments of `valid` with one to three of these names set to odd values, or to others that are `good`.

    good: strategies by name.
    """

    def of(name: str) -> st.SearchStrategy[tuple[str, Any]]:
        odd = st.sampled_from(ODD)
        return st.tuples(st.just(name), odd if name not in good else odd | good[name])

    edits = st.lists(st.sampled_from(names).flatmap(of), min_size=1, max_size=3, unique_by=lambda edit: edit[0])
    return edits.map(lambda edits: {**valid, **dict(edits)})

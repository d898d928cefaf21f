"""Whether a difference between two calls in float32 is rounding, and whose: measured, and not assumed.

Rounding in one step is about 1e-7 of a value. A network with random weights may enlarge it a thousand times on the way
to the sample. Three calls tell what a difference between ours and the stock pipeline's consists of:

- both in float64: what is no rounding is still there;
- the stock pipeline in float32 against itself in float64, from the same random numbers: how far stock itself is off;
- the stock pipeline with each network call made for as many rows as our widest wave has: what the network's own
  batched arithmetic changes. No code but the network's has another part in it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import srds_fast
from bench.workloads.classes import Case
from srds_fast.pipelines.networks import networks_of
from srds_fast.schedulers.reader import InFloat64

# where all is in float64, of the largest value. Coefficients that a scheduler keeps in float32 stay so
ROUNDING_64 = 1e-6
# how many times as large as stock's own rounding a difference may be: it is that of two calls, each with its own
TIMES = 4

Called = Callable[[Any, dict[str, Any], int], Tensor]


@dataclass(frozen=True)
class Rounding:
    """Differences relative to the largest value; None: such a call raises.

    Attributes:
        in_float64: ours to stock, both in float64.
        of_stock: stock in float32 to stock in float64.
        of_width: stock whose networks are called for many rows to stock, both in float32.
    """

    in_float64: float | None
    of_stock: float | None
    of_width: float | None

    def explains(self, difference: float) -> bool:
        """Whether a difference in float32 is rounding: none is left in float64, and stock itself rounds as much."""
        own = max(self.of_stock or 0.0, self.of_width or 0.0)
        return self.in_float64 is not None and self.in_float64 <= ROUNDING_64 and difference <= TIMES * own


def rounding(
    case: Case, scheduler: Any, call: dict[str, Any], steps: int, settings: dict[str, Any], rows: int, called: Called
) -> Rounding:
    """What rounding does to a call of a case with this scheduler.

    settings: of `compile`. rows: of our widest wave. called: makes a call of a pipeline, which begins with the same
    random numbers each time; returns what it gives, in float64.
    """
    made = functools.partial(_made, case, scheduler)
    expected = called(made(), call, steps)
    in_float64 = of_stock = of_width = None
    doubled = {name: _doubled(value) for name, value in call.items()}
    with suppress(Exception):  # not all classes run in float64
        with InFloat64(_shape_of_state(made().to(torch.float64), doubled, steps, called)), _DrawnInFloat32():
            true = called(made().to(torch.float64), doubled, steps)
            ours = called(srds_fast.compile(made().to(torch.float64), **settings), doubled, steps)
        in_float64, of_stock = relative(ours, true), relative(expected, true)
    with suppress(Exception):  # not all networks take more rows than the loop gives them
        of_width = relative(called(_widened(made(), rows), call, steps), expected)
    return Rounding(in_float64, of_stock, of_width)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def _made(case: Case, scheduler: Any) -> Any:
    pipe = case.build()
    pipe.scheduler = copy.deepcopy(scheduler)
    return pipe


class _DrawnInFloat32(TorchFunctionMode):
    """Normal numbers in float64 are those that are drawn in float32: the same seed gives others otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.randn and kwargs.get("dtype") is torch.float64:
            return func(*args, **{**kwargs, "dtype": torch.float32}).double()
        if func is torch.randn_like and args[0].dtype is torch.float64:
            return func(args[0].float(), *args[1:], **kwargs).double()
        return func(*args, **kwargs)


def _shape_of_state(pipe: Any, call: dict[str, Any], steps: int, called: Called) -> tuple[int, ...]:
    """The shape of what the stock loop gives to its scheduler."""
    shapes, step = list[tuple[int, ...]](), pipe.scheduler.step

    @functools.wraps(step)
    def seen(*args: Any, **kwargs: Any) -> Any:
        x: Tensor = inspect.signature(step).bind(*args, **kwargs).arguments["sample"]
        shapes.append(tuple(x.shape))
        return step(*args, **kwargs)

    pipe.scheduler.step = seen
    called(pipe, call, steps)
    return shapes[0]


def _doubled(value: Any) -> Any:
    if isinstance(value, list):
        return [_doubled(each) for each in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _widened(pipe: Any, rows: int) -> Any:
    """The pipeline, but its networks are called for so many equal rows, of which the first counts."""
    for network in networks_of(pipe).values():
        network.forward = _for_rows(network.forward, rows)
    return pipe


def _for_rows(forward: Callable[..., Any], rows: int) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wide(*args: Any, **kwargs: Any) -> Any:
        batch = next(len(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.ndim > 2)

        def repeated(value: Tensor) -> Tensor:
            return torch.cat([value] * rows) if value.ndim and len(value) == batch else value

        args, kwargs = tree_map_only(Tensor, repeated, (args, kwargs))
        return tree_map_only(Tensor, lambda value: value[:batch], forward(*args, **kwargs))

    return wide

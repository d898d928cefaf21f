"""The operations of a fixed-point sweep in plain PyTorch, where their results are known: the scan, and the mixing."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from definitions import randomly, scan_by_definition
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from srds_fast.kernels.fixed_point_wave import Scan, ScanStep
from srds_fast.kernels.fixed_point_wave.anderson import anderson_mix

torch.set_num_threads(1)
CPU = torch.device("cpu")
SHAPE = (2, 3, 5)


def scan_of(
    count: int, dtype: torch.dtype = torch.float64, clip: float | None = None, order: int | None = None
) -> Scan:
    """Coefficients of the size of a sampler's, with a clipped part."""
    values = torch.rand(count, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    steps = [ScanStep(0.9 + 0.2 * a, b - 0.5, 0.8 + 0.3 * c, e, 1 + p, -q) for a, b, c, e, p, q in values]
    return Scan(steps, dtype, CPU, len(SHAPE), clip, order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noise"])
@pytest.mark.parametrize("clip", [None, 0.7], ids=["free", "clip"])
@pytest.mark.parametrize(("first", "window"), [(0, 9), (3, 6), (2, 1), (8, 1)])
def test_the_scan_is_one_step_after_another(
    first: int, window: int, clip: float | None, noisy: bool, dtype: torch.dtype
) -> None:
    y, m, z = (randomly(count, *SHAPE, seed=count, dtype=dtype) for count in (window + 1, window, window))
    kept = [each.clone() for each in (y, m, z)]
    added = z if noisy else None
    scan = scan_of(9, dtype, clip)
    bound = 1e-5 if dtype == torch.float32 else 1e-13
    table = scan.table[first : first + window].clone()
    expected = scan_by_definition(y, m, table, added, clip)
    torch.testing.assert_close(scan.points(y, m, first, added), expected, rtol=bound, atol=bound)
    table[:, 2] = 0.0  # without a correction every step departs from the old point
    expected = scan_by_definition(y, m, table, added, clip)
    torch.testing.assert_close(scan.stepped(y, m, first, added), expected, rtol=bound, atol=bound)
    assert all(torch.equal(one, other) for one, other in zip((y, m, z), kept, strict=True))


@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 4), st.integers(0, 99))
def test_order_k_composes_k_steps(window: int, order: int, first: int, seed: int) -> None:
    """Point i + 1 is what k steps make of the old point k before, with the network's outputs at the old points."""
    generator = torch.Generator().manual_seed(seed)
    alpha, sigma = torch.rand(2, first + window + 1, dtype=torch.float64, generator=generator) + 0.2
    # x' = alpha' (x - sigma eps) / alpha + sigma' eps: the linear part is exact
    keep = alpha[1:] / alpha[:-1]
    grid = [ScanStep(*each) for each in torch.stack([keep, sigma[1:] - keep * sigma[:-1], keep], 1).tolist()]
    y, eps = randomly(window + 1, *SHAPE, seed=seed), randomly(window, *SHAPE, seed=seed + 1)
    x = Scan(grid, torch.float64, CPU, len(SHAPE), order=order).points(y, eps, first)
    for i in range(window):
        begin = max(0, i + 1 - order)
        state = y[begin]
        for j in range(begin, i + 1):
            state = alpha[first + j + 1] * (state - sigma[first + j] * eps[j]) / alpha[first + j]
            state = state + sigma[first + j + 1] * eps[j]
        torch.testing.assert_close(x[i], state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", [None, 1, 3, 20])
@pytest.mark.parametrize("clip", [None, 0.7], ids=["free", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_solution_is_returned_as_it_is(dtype: torch.dtype, clip: float | None, order: int | None) -> None:
    m, z = (randomly(20, *SHAPE, seed=seed, dtype=dtype) for seed in (5, 6))
    scan = scan_of(20, dtype, clip, order)
    y = randomly(1, *SHAPE, seed=7, dtype=dtype)
    for i in range(20):  # one step after another
        y = torch.cat([y, scan.points(torch.cat([y[i:], y[i:]]), m[i : i + 1], i, z[i : i + 1])])
    assert torch.equal(scan.points(y, m, 0, z), y[1:])
    # and up to where it is one
    moved = torch.cat([y[:12], y[12:] + 1])
    assert torch.equal(scan.points(moved, m, 0, z)[:12], y[1:13])


def mixing(window: int, shape: tuple[int, ...], history: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments; shape: [samples, ...]."""
    x, residual = randomly(2, window, *shape, seed=0, dtype=dtype)
    dx, dr = randomly(2, history, window, *shape, seed=1, dtype=dtype)
    return {"x": x, "residual": residual, "dx": dx, "dr": dr, "regularisation": 1e-3}


@pytest.mark.parametrize("history", [1, 2, 3, 4, 5])
def test_linear_problem_is_solved_at_once(history: int) -> None:
    """With as many differences as a linear problem has dimensions, the mixed point is its fixed point.

    F(x) = M x + v at every point. The sums along the window see the same differences at every point.
    """
    matrix = randomly(history, history, seed=history)
    matrix = 0.7 * matrix / torch.linalg.matrix_norm(matrix, 2)
    shift = randomly(history, seed=history + 10)
    solution = torch.linalg.solve(torch.eye(history, dtype=torch.float64) - matrix, shift)
    iterates = randomly(history + 1, history, seed=history + 20)
    residuals = iterates @ matrix.T + shift - iterates

    def windowed(tensor: Tensor) -> Tensor:
        return tensor.expand(3, 2, history).contiguous()

    dx, dr = (torch.stack([windowed(new - old) for old, new in pairwise(each)]) for each in (iterates, residuals))
    mixed = anderson_mix(windowed(iterates[-1]), windowed(residuals[-1]), dx, dr, 1e-15)
    torch.testing.assert_close(mixed[1:], windowed(solution)[1:], rtol=0, atol=1e-8)
    assert torch.equal(mixed[0], windowed(iterates[-1] + residuals[-1])[0])
    assert (mixed[0] - windowed(solution)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["x", "residual", "dx", "dr"])
def test_triangular(name: str) -> None:
    """A change at a point does not change a bit before it or in another sample, NaN and infinity included."""
    call = mixing(4, (2, 40), 2)
    before = anderson_mix(**call)
    for value in (5.0, math.nan, math.inf):
        changed = {**call, name: call[name].clone()}
        changed[name][..., 2, 0, :] = value
        after = anderson_mix(**changed)
        assert torch.equal(after[:2], before[:2])
        assert torch.equal(after[:, 1:], before[:, 1:])
        assert not torch.equal(after[2], before[2])
        if math.isnan(value):
            reached = slice(2, None) if name in ("residual", "dr") else slice(2, 3)
            assert after[reached, 0].isnan().all()


def test_nearly_parallel_differences() -> None:
    """Large and parallel to 1e-6: with inner products in float32 the second pivot would be rounding error."""
    call = mixing(2, (1, 2000), 2, torch.float32)
    call["dr"] = call["dr"] * 100
    call["dr"][1] = call["dr"][0] * (1 + 1e-6) + 1e-3 * call["dx"][0]
    exact = anderson_mix(**{name: each.double() if isinstance(each, Tensor) else each for name, each in call.items()})
    # weights of 10 to 100 multiply differences of 100, in float32
    torch.testing.assert_close(anderson_mix(**call).double(), exact, rtol=0, atol=2e-3)

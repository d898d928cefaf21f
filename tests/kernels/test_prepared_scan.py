"""The scan that is done again and again: its three forms are one recurrence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srds_fast.kernels import dispatch
from srds_fast.kernels.affine_scan import Coefficients, coefficient_table, reference
from srds_fast.kernels.affine_scan.prepared import PreparedScan

torch.set_num_threads(1)
SHAPE = (2, 3, 5)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def steps(count: int, seed: int = 0) -> list[Coefficients]:
    """Of the size of a sampler's, with a clipped part."""
    values = torch.rand(count, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    return [Coefficients(0.9 + 0.2 * a, b - 0.5, 0.8 + 0.3 * c, s, e, 1 + p, -q) for a, b, c, s, e, p, q in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noise"])
@pytest.mark.parametrize("clip", [None, 0.7], ids=["free", "clip"])
@pytest.mark.parametrize(("first", "window"), [(0, 9), (3, 6), (2, 1), (8, 1), (4, 3)])
@pytest.mark.parametrize("form", ["kernel", "dense"])
def test_equals_the_reference(
    form: str, first: int, window: int, clip: float | None, noisy: bool, dtype: torch.dtype, device: torch.device
) -> None:
    grid = steps(9)
    y = random(window + 1, *SHAPE, seed=1, dtype=dtype, device=device)
    m = random(window, *SHAPE, seed=2, dtype=dtype, device=device)
    z = random(window, *SHAPE, seed=3, dtype=dtype, device=device) if noisy else None
    # a correction that reaches along all steps is written out as well as one that reaches along a few
    scan = PreparedScan(grid, dtype, device, len(SHAPE), clip, None if form == "kernel" else len(grid))
    table = coefficient_table(grid[first : first + window], dtype, device)
    x, squared_error = scan(y, m, first, z)
    expected, expected_error = reference.affine_scan(y, m, table, noise=z, clip=clip)
    if form == "kernel":
        assert dispatch.implementation(device) != "torch"
        assert torch.equal(x, expected)
    bound = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(x, expected, rtol=bound, atol=bound)
    torch.testing.assert_close(squared_error, expected_error, rtol=10 * bound, atol=bound)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 4), st.integers(0, 99))
def test_order_k_composes_k_steps(window: int, order: int, first: int, seed: int) -> None:
    """Point i + 1 is what k steps make of the old point k before, with what the network said at the old points."""
    generator = torch.Generator().manual_seed(seed)
    alpha, sigma = torch.rand(2, first + window + 1, dtype=torch.float64, generator=generator) + 0.2
    grid = []
    for i in range(first + window):
        # x' = alpha' (x - sigma eps) / alpha + sigma' eps: the linear part is exact
        keep = float(alpha[i + 1] / alpha[i])
        grid.append(Coefficients(keep, float(sigma[i + 1]) - keep * float(sigma[i]), keep))
    y, eps = random(window + 1, *SHAPE, seed=seed), random(window, *SHAPE, seed=seed + 1)
    x, _ = PreparedScan(grid, torch.float64, torch.device("cpu"), len(SHAPE), order=order)(y, eps, first)
    for i in range(window):
        begin = max(0, i + 1 - order)
        state = y[begin]
        for j in range(begin, i + 1):
            here, there = first + j, first + j + 1
            x0 = (state - sigma[here] * eps[j]) / alpha[here]
            state = alpha[there] * x0 + sigma[there] * eps[j]
        torch.testing.assert_close(x[i], state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", [None, 1, 3, 20])
@pytest.mark.parametrize("clip", [None, 0.7], ids=["free", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_solution_is_returned_as_it_is(
    dtype: torch.dtype, clip: float | None, order: int | None, device: torch.device
) -> None:
    grid, m = steps(20, seed=4), random(20, *SHAPE, seed=5, dtype=dtype, device=device)
    z = random(20, *SHAPE, seed=6, dtype=dtype, device=device)
    scan = PreparedScan(grid, dtype, device, len(SHAPE), clip, order)
    y = random(1, *SHAPE, seed=7, dtype=dtype, device=device)
    for i in range(20):  # one step after another
        x, _ = scan(torch.cat([y[i:], y[i:]]), m[i : i + 1], i, z[i : i + 1])
        y = torch.cat([y, x])
    x, squared_error = scan(y, m, 0, z)
    assert torch.equal(x, y[1:])
    assert not squared_error.any()
    # and up to where it is one
    moved = torch.cat([y[:12], y[12:] + 1])
    x, squared_error = scan(moved, m, 0, z)
    assert torch.equal(x[:12], y[1:13])
    assert not squared_error[:11].any()
    assert bool((squared_error[11:] > 0).all())


@pytest.mark.parametrize("clip", [None, 0.7], ids=["free", "clip"])
@pytest.mark.parametrize("order", [None, 4])
def test_steps_are_taken_from_the_old_points(order: int | None, clip: float | None, device: torch.device) -> None:
    grid, (first, window) = steps(9), (3, 5)
    y = random(window + 1, *SHAPE, seed=1, device=device)
    m, z = (random(window, *SHAPE, seed=seed, device=device) for seed in (2, 3))
    scan = PreparedScan(grid, torch.float64, device, len(SHAPE), clip, order)
    found = scan.stepped(y, m, first, z)
    for i, step in enumerate(grid[first : first + window]):
        expected = step.a * y[i] + step.b * m[i] + step.s * z[i]
        if clip is not None:
            expected = expected + step.e * (step.p * y[i] + step.q * m[i]).clamp(-clip, clip)
        torch.testing.assert_close(found[i], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noise"])
def test_outputs_are_those_that_the_steps_lead_along(noisy: bool, device: torch.device) -> None:
    grid, y = steps(9), random(10, *SHAPE, seed=1, device=device)
    z = random(9, *SHAPE, seed=3, device=device) if noisy else None
    scan = PreparedScan(grid, torch.float64, device, len(SHAPE))
    m = scan.outputs(y, z)
    assert m is not None
    torch.testing.assert_close(scan.stepped(y, m, 0, z), y[1:], rtol=1e-12, atol=1e-12)
    # a clamp cannot be turned round
    assert PreparedScan(grid, torch.float64, device, len(SHAPE), 0.7).outputs(y, z) is None


@pytest.mark.parametrize("order", [None, 1, 3, 9])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_point_knows_nothing_of_those_after_it(bad: float, order: int | None, device: torch.device) -> None:
    grid, y, m = steps(9), random(10, *SHAPE, seed=1, device=device), random(9, *SHAPE, seed=2, device=device)
    scan = PreparedScan(grid, torch.float64, device, len(SHAPE), order=order)
    expected, _ = scan(y, m, 0)
    y[4], m[6] = bad, bad
    found, _ = scan(y, m, 0)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-13, atol=1e-13)


def test_arguments_are_left_as_they_are(device: torch.device) -> None:
    for order in (None, 3):
        given = [random(count, *SHAPE, seed=count, device=device) for count in (10, 9, 9)]
        kept = [each.clone() for each in given]
        scan = PreparedScan(steps(9), torch.float64, device, len(SHAPE), 0.5, order)
        y, m, z = given
        scan(y, m, 0, z)
        scan.stepped(y, m, 0, z)
        assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))


def test_a_kernel_does_the_whole_grid_where_there_is_one(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from srds_fast.kernels.affine_scan import kernel

    launches = []
    launch = kernel.affine_scan
    monkeypatch.setattr(kernel, "affine_scan", lambda *args, **kwargs: launches.append(1) or launch(*args, **kwargs))
    y, m = random(10, *SHAPE, seed=1, device=device), random(9, *SHAPE, seed=2, device=device)
    for order, expected in ((None, 1), (9, 1)):
        PreparedScan(steps(9), torch.float64, device, len(SHAPE), order=order)(y, m, 0)
        assert len(launches) == expected

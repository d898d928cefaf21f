"""The window's fixed-point sweep: against its reference, and where the answer is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from srds_fast.errors import InvalidArgument
from srds_fast.kernels import affine_scan as package
from srds_fast.kernels import dispatch
from srds_fast.kernels.affine_scan import (
    Coefficients,
    Tickets,
    affine_scan,
    bytes_per_element,
    coefficient_table,
    kernel,
    reference,
)

torch.set_num_threads(1)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def steps(window: int, *, c: float | None = None, seed: int = 0) -> list[Coefficients]:
    """Of the size of a sampler's: a near 1, b small, c = a unless it is given."""
    values = torch.rand(window, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    return [
        Coefficients(0.9 + 0.2 * v[0], v[1] - 0.5, 0.9 + 0.2 * v[0] if c is None else c, v[2], v[3], 1 + v[4], -v[5])
        for v in values
    ]


def arguments(
    window: int,
    shape: tuple[int, ...],
    *,
    device: torch.device,
    state: torch.dtype = torch.float32,
    network: torch.dtype = torch.float32,
    layout: str = "contiguous",
    branches: int = 0,
    start: bool = False,
    noise: bool = False,
    clip: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """shape: [samples, ...]."""
    leading = (branches, window) if branches else (window,)
    m_shape = (*leading, *shape)
    if layout == "first half of the channels":
        m = random(*leading, shape[0], 2 * shape[1], *shape[2:], seed=seed + 1)[..., : shape[1], :, :]
    elif layout == "channels_last":
        m = random(*leading, shape[0], *shape[2:], shape[1], seed=seed + 1).movedim(-1, -3)
    elif layout == "channels_last, first half":
        m = random(*leading, shape[0], *shape[2:], 2 * shape[1], seed=seed + 1).movedim(-1, -3)[..., : shape[1], :, :]
    else:
        m = random(*m_shape, seed=seed + 1)
    assert m.shape == m_shape
    strided = m.to(device, network)  # keeps the strides of dense tensors only
    m = torch.empty_strided(m.shape, m.stride(), dtype=network, device=device)
    m.copy_(strided)
    return {
        "y": random(window + 1, *shape, seed=seed, dtype=state, device=device),
        "m": m,
        "table": coefficient_table(steps(window, seed=seed), state, device),
        "start": random(*shape, seed=seed + 2, dtype=state, device=device) if start else None,
        "noise": random(window, *shape, seed=seed + 3, dtype=state, device=device) if noise else None,
        "clip": clip,
        "guidance": random(branches, seed=seed + 4, dtype=state, device=device) if branches else None,
    }


def in_float64(given_arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: v.double() if isinstance(v, Tensor) else v for name, v in given_arguments.items()}


def assert_right(call: dict[str, Any]) -> None:
    """Against the reference: to the bit in the state's dtype, to rounding in float64."""
    x, squared_error = affine_scan(**call)
    same, _ = reference.affine_scan(**call)
    assert torch.equal(x, same)
    exact, exact_error = reference.affine_scan(**in_float64(call))
    precision = torch.finfo(x.dtype).eps
    size = exact.abs().amax()
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=float(50 * precision * size))
    # an error of dx in x moves |x - y|^2 by 2 |x - y| dx
    elements = x[0, 0].numel()
    slack = 200 * precision * elements * float(size) ** 2
    torch.testing.assert_close(squared_error.double(), exact_error, rtol=100 * precision, atol=slack)


def test_a_kernel_runs(device: torch.device) -> None:
    """The rest of this file means nothing otherwise."""
    assert dispatch.implementation(device) != "torch"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    window=st.integers(1, 6),
    samples=st.integers(1, 3),
    trailing=st.sampled_from([(1,), (3,), (1024,), (1, 37, 29), (2, 16, 32), (1, 1, 1), (2, 25, 41)]),
    state=st.sampled_from([torch.float32, torch.float64]),
    network=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    layout=st.sampled_from(["contiguous", "first half of the channels", "channels_last", "channels_last, first half"]),
    branches=st.integers(0, 3),
    start=st.booleans(),
    noise=st.booleans(),
    clip=st.sampled_from([None, 1.0, 0.3]),
)
def test_equals_reference(
    device: torch.device, samples: int, trailing: tuple[int, ...], layout: str, **options: Any
) -> None:
    if len(trailing) == 1:
        layout = "contiguous"
    assert_right(arguments(shape=(samples, *trailing), layout=layout, device=device, **options))


def test_many_tiles(device: torch.device) -> None:
    """More tiles than the last program reduces at once, and more steps."""
    assert_right(arguments(17, (1, 259 * 1024 - 3), device=device))


def test_long_window(device: torch.device) -> None:
    assert_right(arguments(260, (2, 1100), device=device, network=torch.float16, noise=True))


def test_more_samples_than_a_grid_dimension(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """65536 and more rows: the limit of a CUDA grid's second dimension. The interpreter runs the last of them only."""
    samples = 2**16 + 3
    call = arguments(1, (samples, 1), device=device)
    if device.type == "cpu":
        from triton.runtime.interpreter import interpreter_builder

        dimensions, place = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx
        monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda x, y, z: dimensions(samples, y, z))
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: place(samples - 5 + x, y, z))

        class Shifted:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                assert grid == (samples,)
                return scan[(5,)]

        scan = kernel._scan
        monkeypatch.setattr(kernel, "_scan", Shifted())
    x, squared_error = affine_scan(**call)
    exact, exact_error = reference.affine_scan(**call)
    assert torch.equal(x[:, -5:], exact[:, -5:])
    assert torch.equal(squared_error[:, -5:], exact_error[:, -5:])


@pytest.mark.parametrize("transposed", [False, True], ids=["window first", "samples first"])
def test_in_place(device: torch.device, transposed: bool) -> None:
    call = arguments(4, (2, 1, 33, 37), device=device, noise=True, clip=1.0)
    if transposed:
        call["y"] = call["y"].transpose(0, 1).contiguous().transpose(0, 1)
    x, squared_error = affine_scan(**call)
    first = call["y"][0].clone()
    out = call["y"][1:]
    in_place, in_place_error = affine_scan(**call, out=out)
    assert in_place is out
    assert torch.equal(in_place, x)
    assert torch.equal(in_place_error, squared_error)
    assert torch.equal(call["y"][0], first)


def test_out(device: torch.device) -> None:
    call = arguments(3, (2, 5), device=device)
    out = torch.empty(2, 3, 5, device=device).transpose(0, 1)
    x, _ = affine_scan(**call, out=out)
    assert x is out
    assert torch.equal(out, affine_scan(**call)[0])


def test_strided_state(device: torch.device) -> None:
    """Window and samples in either order, and every other sample."""
    call = arguments(3, (2, 40), device=device, start=True, noise=True)
    strided = dict(call)
    for name in ("y", "noise"):
        strided[name] = call[name].transpose(0, 1).contiguous().transpose(0, 1)
    strided["start"] = call["start"].repeat_interleave(2, 0)[::2]
    for one, other in zip(affine_scan(**call), affine_scan(**strided), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("where", ["y", "m", "noise", "start"])
def test_nan_spreads_within_its_sample(device: torch.device, where: str) -> None:
    call = arguments(4, (2, 1030), device=device, start=True, noise=True, clip=0.5)
    clean, clean_error = affine_scan(**call)
    call[where][(1, 7) if where == "start" else (1, 1, 7)] = math.nan
    x, squared_error = affine_scan(**call)
    first = 0 if where in ("start", "y") else 1  # y_1 is compared with x_1
    assert x[1:, 1, 7].isnan().all()
    assert squared_error[first:, 1].isnan().all()
    x[:, 1, 7] = clean[:, 1, 7]
    assert torch.equal(x, clean)
    assert torch.equal(squared_error[:first], clean_error[:first])
    assert torch.equal(squared_error[:, 0], clean_error[:, 0])


def test_clip_alone_does_not_hide_nan(device: torch.device) -> None:
    """Only the clamped term sees y."""
    call = arguments(1, (1, 8), device=device, clip=1.0)
    call["table"] = coefficient_table([Coefficients(0, 0, 0, 0, 1, 1, 0)], device=device)
    call["y"][0, 0] = torch.tensor([math.nan, math.inf, -math.inf, 0.5, -0.5, 3, -3, 0])
    call["start"] = torch.zeros(1, 8, device=device)
    x, _ = reference.affine_scan(**call)
    got, _ = affine_scan(**call)
    torch.testing.assert_close(got, x, rtol=0, atol=0, equal_nan=True)
    assert got[0, 0, 0].isnan()


@pytest.mark.parametrize("seed", range(3))
def test_same_bits_twice_with_the_same_counters(device: torch.device, seed: int) -> None:
    """The last program must leave the counters as it found them, for fewer and more tiles alike."""
    call = arguments(3, (2, 5000), device=device, seed=seed)
    tickets = Tickets(device, 2)
    one = affine_scan(**call, tickets=tickets)
    assert not tickets.counts.any()
    affine_scan(**arguments(2, (1, 9000), device=device), tickets=tickets)
    affine_scan(**arguments(2, (2, 1025), device=device), tickets=tickets)
    for other in (affine_scan(**call, tickets=tickets), affine_scan(**call), affine_scan(**call)):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_counters_grow(device: torch.device) -> None:
    for samples in (1, 70, 3):
        assert_right(arguments(1, (samples, 1025), device=device))


def test_one_sample_does_not_depend_on_the_others(device: torch.device) -> None:
    call = arguments(3, (3, 2050), device=device)
    x, squared_error = affine_scan(**call)
    alone = {**call, "y": call["y"][:, 1:2], "m": call["m"][:, 1:2]}
    x_alone, error_alone = affine_scan(**alone)
    assert torch.equal(x[:, 1:2], x_alone)
    assert torch.equal(squared_error[:, 1:2], error_alone)


def test_picard_is_the_sum_of_the_increments(device: torch.device) -> None:
    """c = 1, a = 1: x_{i+1} = x_0 + sum of b_j m_j + s_j z_j over j <= i, whatever y is (ParaDiGMS, algorithm 1)."""
    call = arguments(9, (2, 50), device=device, state=torch.float64, network=torch.float64, start=True, noise=True)
    table = [Coefficients(1.0, step.b, 1.0, step.s) for step in steps(9)]
    call["table"] = coefficient_table(table, torch.float64, device)
    x, _ = affine_scan(**call)
    b, s = call["table"][:, 1].view(-1, 1, 1), call["table"][:, 3].view(-1, 1, 1)
    increments = b * call["m"] + s * call["noise"]
    torch.testing.assert_close(x, call["start"] + increments.cumsum(0), rtol=0, atol=1e-13)


def test_exact_linear_part(device: torch.device) -> None:
    """c = a: x_{i+1} = a_i x_i + b_i m_i, with the network's output as the only thing taken from y."""
    call = arguments(9, (2, 50), device=device, state=torch.float64, network=torch.float64)
    x, _ = affine_scan(**call)
    expected = call["y"][0]
    for i, step in enumerate(steps(9)):
        expected = step.a * expected + step.b * call["m"][i]
        torch.testing.assert_close(x[i], expected, rtol=0, atol=1e-13)


def network(x: Tensor) -> Tensor:
    return torch.sin(3 * x)


@pytest.mark.parametrize("c", [1.0, None], ids=["Picard", "linear part"])
def test_exact_prefix_grows_by_one_point_a_sweep(device: torch.device, c: float | None) -> None:
    """After k sweeps of a nonlinear problem the first k points are the sequential ones, to the bit."""
    window, samples, elements = 6, 2, 40
    noise = random(window, samples, elements, seed=1, device=device)
    table = coefficient_table(steps(window, c=c), device=device)
    start = random(samples, elements, seed=2, device=device)
    sequential = [start]
    for i in range(window):
        x = sequential[-1]
        f = (
            table[i, 0] * x
            + table[i, 1] * network(x)
            + table[i, 4] * (table[i, 5] * x + table[i, 6] * network(x)).clamp(-1, 1)
        )
        sequential.append(f + table[i, 3] * noise[i])
    expected = torch.stack(sequential)
    y = start.expand(window + 1, -1, -1).contiguous()
    for k in range(1, window + 1):
        _, squared_error = affine_scan(y, network(y[:-1]), table, noise=noise, clip=1.0, out=y[1:])
        assert torch.equal(y[: k + 1], expected[: k + 1])
        if k < window:
            assert not torch.equal(y[k + 1], expected[k + 1])
        assert torch.equal(squared_error[: k - 1], torch.zeros_like(squared_error[: k - 1]))
        assert (squared_error[k - 1 :] > 0).all()
    _, squared_error = affine_scan(y, network(y[:-1]), table, noise=noise, clip=1.0, out=y[1:])
    assert torch.equal(y, expected)
    assert not squared_error.any()


def test_squared_error_of_known_size(device: torch.device) -> None:
    """f = y + 2 with c = 0 against y_{i+1} = y_i + 1: the difference is 1 everywhere."""
    y = torch.arange(4.0, device=device).view(4, 1, 1).expand(4, 2, 3000).contiguous()
    table = coefficient_table([Coefficients(1, 2, 0)] * 3, device=device)
    _, squared_error = affine_scan(y, torch.ones_like(y[1:]), table)
    assert torch.equal(squared_error, torch.full((3, 2), 3000.0, device=device))


@pytest.mark.parametrize("layout", ["contiguous", "first half of the channels"])
@pytest.mark.parametrize(("branches", "noise"), [(0, False), (2, True), (3, False)])
def test_bytes(device: torch.device, monkeypatch: pytest.MonkeyPatch, layout: str, branches: int, noise: bool) -> None:
    """The accesses of the interpreted kernel, counted, against the figure in the docstring."""
    if device.type != "cpu":
        pytest.skip("hardware counts sectors and caches: see bench/speed/kernels.py")
    from triton.runtime.interpreter import InterpreterBuilder

    moved = 0
    for name in ("create_masked_load", "create_masked_store"):
        original = getattr(InterpreterBuilder, name)
        place_of_mask = 1 if name.endswith("load") else 2

        def counted(self: Any, pointers: Any, *rest: Any, _original: Any = original, _mask: int = place_of_mask) -> Any:
            nonlocal moved
            itemsize = pointers.get_element_ty().primitive_bitwidth // 8
            if pointers.data.size == kernel.BLOCK:  # elements of a sample, not coefficients or sums
                moved += int(rest[_mask - 1].data.sum()) * itemsize
            return _original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, counted)
    window, shape = 5, (2, 2, 25, 31)
    call = arguments(window, shape, device=device, network=torch.float16, layout=layout, branches=branches, noise=noise)
    affine_scan(**call)
    figure = bytes_per_element(torch.float32, torch.float16, branches=max(branches, 1), noise=noise)
    extra = 2 * 4  # y_0, as the first point and as the start
    assert moved == (window * figure + extra) * math.prod(shape)


@pytest.mark.parametrize(
    ("options", "figure"),
    [({}, 10), ({"noise": True}, 14), ({"branches": 2}, 12), ({"branches": 3, "noise": True}, 18)],
)
def test_bytes_in_figures(options: dict[str, Any], figure: int) -> None:
    assert bytes_per_element(torch.float32, torch.float16, **options) == figure


def test_reference_in_place(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function where there is no Triton."""
    call = arguments(3, (2, 20), device=device, noise=True, clip=1.0)
    call["y"] = call["y"].transpose(0, 1).contiguous().transpose(0, 1)
    expected, expected_error = affine_scan(**call)
    monkeypatch.setattr(package, "implementation", lambda _: "torch")
    out = call["y"][1:]
    x, squared_error = affine_scan(**call, out=out)
    assert x is out
    assert torch.equal(out, expected)
    torch.testing.assert_close(squared_error, expected_error)


def test_table() -> None:
    table = coefficient_table([Coefficients(1, 2, 3, 4, 5, 6, 7), Coefficients(0.1, 0.2, 0.3)], torch.float64)
    assert table.tolist() == [[1, 2, 3, 4, 5, 6, 7], [0.1, 0.2, 0.3, 0, 0, 0, 0]]
    assert coefficient_table([Coefficients(1, 2, 3)]).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("y", lambda t: t.half()),
        ("y", lambda t: t[:1]),
        ("y", lambda t: t[:, 0, 0, 0]),
        ("y", lambda t: t[:, :0]),
        ("y", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
        ("m", lambda t: t.int()),
        ("m", lambda t: t[:1]),
        ("m", lambda t: t.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)[:, :, ::2, ::2, ::2]),
        ("m", lambda t: t.to("meta")),
        ("table", lambda t: t.double()),
        ("table", lambda t: t[:, :6].contiguous()),
        ("table", lambda t: t.t().contiguous().t()),
        ("table", lambda t: t.to("meta")),
        ("start", lambda t: t[:1]),
        ("start", lambda t: t.double()),
        ("start", lambda t: t.to("meta")),
        ("start", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
        ("noise", lambda t: t[:1]),
        ("noise", lambda t: t.half()),
        ("noise", lambda t: t.repeat_interleave(2, -1)[..., ::2]),
        ("guidance", lambda t: t.double()),
        ("guidance", lambda t: t[0]),
        ("guidance", lambda t: t.repeat(2)),
        ("guidance", lambda t: t[:0]),
        ("guidance", lambda t: t.repeat_interleave(2)[::2]),
        ("guidance", lambda t: t[:1]),
        ("out", lambda t: t.double()),
        ("out", lambda t: t[:1]),
        ("out", lambda t: t.to("meta")),
        ("out", lambda t: t[:1].expand(2, -1, -1, -1, -1)),
        ("clip", lambda _: 0.0),
        ("clip", lambda _: -1.0),
        ("clip", lambda _: math.nan),
        ("clip", lambda _: math.inf),
        ("tickets", lambda _: Tickets("cpu", 1)),
        ("tickets", lambda _: Tickets("meta", 2)),
    ],
)
def test_errors_name_the_argument(device: torch.device, name: str, change: Any) -> None:
    shape = (2, 2, 3, 4)
    call: dict[str, Any] = arguments(2, shape, device=device, branches=2, start=True, noise=True, clip=1.0)
    if name == "m":
        call |= {"m": call["m"][0].contiguous(), "guidance": None}
    call["out"] = torch.zeros(2, *shape, device=device)
    call["tickets"] = None
    call[name] = change(call[name])
    expected = "m has shape" if name == "guidance" and call[name].shape == (1,) else f"{name} "
    with pytest.raises(InvalidArgument, match=f"^{expected}"):
        affine_scan(**call)


def test_errors_of_overlap(device: torch.device) -> None:
    call = arguments(3, (2, 8), device=device, noise=True)
    for name, out in (("y", call["y"][:-1]), ("m", call["m"]), ("noise", call["noise"])):
        with pytest.raises(InvalidArgument, match=f"^out overlaps {name} "):
            affine_scan(**call, out=out)


def test_too_many_elements() -> None:
    y = torch.empty(1, device="meta").expand(2, 1, 2**31)
    with pytest.raises(InvalidArgument, match=r"^y has 2147483648 elements"):
        affine_scan(y, y[1:], y)

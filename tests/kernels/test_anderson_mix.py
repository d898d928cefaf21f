"""Triangular Anderson acceleration: against its reference, and where the answer is known."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from srds_fast.errors import InvalidArgument
from srds_fast.kernels import anderson_mix as package
from srds_fast.kernels import dispatch
from srds_fast.kernels.anderson_mix import Tickets, anderson_mix, bytes_per_element, kernel, reference

torch.set_num_threads(1)


def arguments(
    window: int,
    shape: tuple[int, ...],
    history: int,
    *,
    device: torch.device,
    state: torch.dtype = torch.float32,
    seed: int = 0,
    frontier: bool = True,
    regularisation: float = 1e-3,
) -> dict[str, Any]:
    """shape: [samples, ...]."""
    generator = torch.Generator().manual_seed(seed)

    def random(*leading: int) -> Tensor:
        return torch.randn(*leading, window, *shape, generator=generator, dtype=torch.float64).to(device, state)

    return {
        "x": random(),
        "residual": random(),
        "dx": random(history),
        "dr": random(history),
        "frontier": frontier,
        "regularisation": regularisation,
    }


def assert_right(call: dict[str, Any]) -> None:
    """Against the reference in float64, whose tensors hold the same numbers."""
    mixed = anderson_mix(**call)
    exact = reference.anderson_mix(**{k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()})
    assert mixed.dtype == call["x"].dtype
    tolerance = 100 * torch.finfo(mixed.dtype).eps * float(exact.abs().amax())
    torch.testing.assert_close(mixed.double(), exact, rtol=0, atol=tolerance)


def test_a_kernel_runs(device: torch.device) -> None:
    """The rest of this file means nothing otherwise."""
    assert dispatch.implementation(device) != "torch"


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    window=st.integers(1, 4),
    samples=st.integers(1, 2),
    # fewer elements than differences leave only the regularisation: the answer then hangs on rounding
    trailing=st.sampled_from([(7,), (1024,), (33, 37), (2, 16, 32), (5, 5, 5)]),
    history=st.integers(1, 5),
    state=st.sampled_from([torch.float32, torch.float64]),
    frontier=st.booleans(),
    regularisation=st.sampled_from([1e-3, 1e-8, 10.0]),
    seed=st.integers(0, 100),
)
def test_equals_reference(device: torch.device, samples: int, trailing: tuple[int, ...], **options: Any) -> None:
    assert_right(arguments(shape=(samples, *trailing), device=device, **options))


@pytest.mark.parametrize("history", [1, 3])
def test_one_element(device: torch.device, history: int) -> None:
    assert_right(arguments(4, (2, 1), history, device=device, regularisation=1.0))


def test_long_window(device: torch.device) -> None:
    """More positions than the last program takes at once: the running sum is carried over."""
    assert_right(arguments(kernel.POSITIONS + 2, (1, 3), 2, device=device))


@pytest.mark.parametrize("window", [16, 17, 33])
def test_carried_sums(device: torch.device, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(kernel, "POSITIONS", 16)
    assert_right(arguments(window, (1, 40), 2, device=device))


def test_many_tiles(device: torch.device) -> None:
    """More partial sums of a position than are reduced at once."""
    assert_right(arguments(1, (1, 66 * 1024 - 5), 2, device=device))
    assert_right(arguments(1, (1, 66 * 512 - 5), 4, device=device))


def test_a_program_may_take_several_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens above PROGRAMS programs; the last of them has fewer tiles than the others."""
    monkeypatch.setattr(kernel, "PROGRAMS", 16)
    assert_right(arguments(4, (2, 5 * 1024 - 3), 1, device=device))
    assert_right(arguments(3, (1, 11 * 512 + 1), 3, device=device))


def test_more_rows_than_a_grid_dimension(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """65536 and more rows: the limit of a CUDA grid's second dimension. The interpreter runs the last of them only."""
    samples, last = 2**16 + 3, 5
    call = arguments(1, (samples, 1), 1, device=device, frontier=False)
    if device.type == "cpu":
        from triton.runtime.interpreter import interpreter_builder

        dimensions, place = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx
        monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda x, y, z: dimensions(samples, y, z))
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: place(samples - last + x, y, z))

        def ending(launch: Any) -> Any:
            class Ending:
                def __getitem__(self, grid: tuple[int, ...]) -> Any:
                    assert grid == (samples,)
                    return launch[(last,)]

            return Ending()

        for name in ("_gram", "_mix"):
            monkeypatch.setattr(kernel, name, ending(getattr(kernel, name)))
    mixed = anderson_mix(**call)
    torch.testing.assert_close(mixed[:, -last:], reference.anderson_mix(**call)[:, -last:])


@pytest.mark.parametrize("frontier", [True, False])
def test_in_place(device: torch.device, frontier: bool) -> None:
    call = arguments(4, (2, 1, 33, 37), 2, device=device, frontier=frontier)
    mixed = anderson_mix(**call)
    x = call["x"]
    assert anderson_mix(**call, out=x) is x
    assert torch.equal(x, mixed)


def test_out_and_strides(device: torch.device) -> None:
    """Window and samples in either order, every other sample, a history inside a longer ring."""
    call = arguments(3, (2, 40), 2, device=device)
    mixed = anderson_mix(**call)
    strided = dict(call)
    for name in ("x", "residual"):
        strided[name] = call[name].transpose(0, 1).contiguous().transpose(0, 1)
    strided["dx"] = call["dx"].repeat_interleave(2, 2)[:, :, ::2]
    strided["dr"] = torch.cat([call["dr"], call["dr"]])[1:3].flip(0).repeat_interleave(3, 0)[::3]
    out = torch.empty(2, 3, 40, device=device).transpose(0, 1)
    assert anderson_mix(**strided, out=out) is out
    assert torch.equal(out, mixed)


def test_order_of_the_history_does_not_matter(device: torch.device) -> None:
    call = arguments(3, (1, 500), 4, device=device, state=torch.float64)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(
        anderson_mix(**call),
        anderson_mix(**{**call, "dx": call["dx"][order], "dr": call["dr"][order]}),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("frontier", [True, False])
@pytest.mark.parametrize("history", [1, 2, 5])
def test_no_history_is_the_plain_update(device: torch.device, history: int, frontier: bool) -> None:
    call = arguments(3, (2, 1030), history, device=device, frontier=frontier)
    call["dx"].zero_()
    call["dr"].zero_()
    assert torch.equal(anderson_mix(**call), call["x"] + call["residual"])


def test_frontier_takes_the_plain_update(device: torch.device) -> None:
    """Whatever its history holds; without the safeguard it is mixed."""
    call = arguments(3, (2, 50), 2, device=device)
    plain = call["x"][0] + call["residual"][0]
    mixed = anderson_mix(**call)
    assert torch.equal(mixed[0], plain)
    everywhere = anderson_mix(**{**call, "frontier": False})
    assert not torch.equal(everywhere[0], plain)
    assert torch.equal(everywhere[1:], mixed[1:])
    call["dx"][:, 0] = math.nan
    assert torch.equal(anderson_mix(**call), mixed)


def test_weights_of_known_size(device: torch.device) -> None:
    """One difference dr = 1 everywhere, R = 3, n elements: g_i = 3 n (i + 1) / (n (i + 1) + lambda)."""
    n, window, regularisation = 1500, 4, 250.0
    ones = torch.ones(window, 1, n, dtype=torch.float64, device=device)
    mixed = anderson_mix(
        torch.zeros_like(ones), 3 * ones, 0 * ones[None], ones[None], regularisation=regularisation, frontier=False
    )
    norms = n * torch.arange(1, window + 1, dtype=torch.float64, device=device)
    expected = 3 - 3 * norms / (norms + regularisation)
    torch.testing.assert_close(mixed, expected.view(-1, 1, 1).expand_as(mixed), rtol=0, atol=1e-13)


@pytest.mark.parametrize("history", [1, 2, 3, 4, 5])
def test_linear_problem_is_solved_at_once(device: torch.device, history: int) -> None:
    """With as many differences as a linear problem has dimensions, the mixed point is its fixed point.

    F(x) = M x + v in every position; the one difference that the window's sums see is the same in all of them.
    """
    generator = torch.Generator().manual_seed(history)
    matrix = torch.randn(history, history, generator=generator, dtype=torch.float64)
    matrix = 0.7 * matrix / torch.linalg.matrix_norm(matrix, 2)
    shift = torch.randn(history, generator=generator, dtype=torch.float64)
    solution = torch.linalg.solve(torch.eye(history, dtype=torch.float64) - matrix, shift)
    iterates = [torch.randn(history, generator=generator, dtype=torch.float64) for _ in range(history + 1)]

    def residual(x: Tensor) -> Tensor:
        return matrix @ x + shift - x

    def windowed(tensor: Tensor) -> Tensor:
        return tensor.to(device).expand(3, 2, history).contiguous()

    dx = torch.stack([windowed(new - old) for old, new in pairwise(iterates)])
    dr = torch.stack([windowed(residual(new) - residual(old)) for old, new in pairwise(iterates)])
    last = iterates[-1]
    mixed = anderson_mix(windowed(last), windowed(residual(last)), dx, dr, regularisation=1e-15, frontier=False)
    torch.testing.assert_close(mixed, windowed(solution), rtol=0, atol=1e-8)
    assert (windowed(last + residual(last)) - windowed(solution)).abs().max() > 1e-2


@pytest.mark.parametrize("position", [2, 17])
@pytest.mark.parametrize("name", ["x", "residual", "dx", "dr"])
def test_triangular(device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str, position: int) -> None:
    """What changes at a position does not change a bit before it, NaN and infinity included."""
    monkeypatch.setattr(kernel, "POSITIONS", 16)
    call = arguments(19, (2, 3), 2, device=device) if position == 17 else arguments(4, (2, 40), 2, device=device)
    before = anderson_mix(**call)
    for value in (5.0, math.nan, math.inf):
        changed = {**call, name: call[name].clone()}
        changed[name][..., position, 0, :] = value
        after = anderson_mix(**changed)
        assert torch.equal(after[:position], before[:position])
        assert torch.equal(after[:, 1:], before[:, 1:])
        assert not torch.equal(after[position], before[position])
        if math.isnan(value):
            reached = slice(position, None) if name in ("residual", "dr") else slice(position, position + 1)
            assert after[reached, 0].isnan().all()


def test_nearly_parallel_differences(device: torch.device) -> None:
    """Large and parallel to 1e-6: inner products in float32 would leave rounding for the second pivot (off by 62)."""
    call = arguments(2, (1, 2000), 2, device=device)
    call["dr"] = call["dr"] * 100
    call["dr"][1] = call["dr"][0] * (1 + 1e-6) + 1e-3 * call["dx"][0]
    mixed = anderson_mix(**call)
    exact = reference.anderson_mix(**{k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()})
    # weights of 10 to 100 multiply differences of 100, in float32
    torch.testing.assert_close(mixed.double(), exact, rtol=0, atol=2e-3)


def test_same_bits_twice_with_the_same_counters(device: torch.device) -> None:
    """The last program must leave the counters as it found them, for fewer and more programs alike."""
    call = arguments(2, (2, 1500), 3, device=device)
    tickets = Tickets(device, 2)
    one = anderson_mix(**call, tickets=tickets)
    assert not tickets.counts.any()
    anderson_mix(**arguments(2, (1, 3000), 1, device=device), tickets=tickets)
    for other in (anderson_mix(**call, tickets=tickets), anderson_mix(**call), anderson_mix(**call)):
        assert torch.equal(one, other)


def test_one_sample_does_not_depend_on_the_others(device: torch.device) -> None:
    call = arguments(3, (3, 1030), 2, device=device)
    mixed = anderson_mix(**call)
    alone = {k: v[..., 1:2, :] if isinstance(v, Tensor) else v for k, v in call.items()}
    assert torch.equal(anderson_mix(**alone), mixed[:, 1:2])


@pytest.mark.parametrize("history", [1, 2, 5])
def test_bytes(device: torch.device, monkeypatch: pytest.MonkeyPatch, history: int) -> None:
    """The accesses of the interpreted kernels, counted, against the figures in the docstring."""
    if device.type != "cpu":
        return  # hardware counts sectors and caches; see bench
    from triton.runtime.interpreter import InterpreterBuilder

    moved: list[int] = []
    blocks = (kernel.BLOCK, kernel._gram_block(history))
    for name, place in (("create_masked_load", 0), ("create_masked_store", 1)):
        original = getattr(InterpreterBuilder, name)

        def counted(
            self: Any, pointers: Any, *rest: Any, _original: Any = original, _place: int = place, **named: Any
        ) -> Any:
            # elements of a state: not of the sums, which are one- and two-dimensional and in float64
            if pointers.data.shape in [(block,) for block in blocks] and "fp32" in str(pointers.get_element_ty()):
                moved[-1] += int(rest[_place].data.sum()) * 4
            return _original(self, pointers, *rest, **named)

        monkeypatch.setattr(InterpreterBuilder, name, counted)
    for name in ("_gram", "_mix"):

        def launched(kernel_of: Any) -> Any:
            class Launched:
                def __getitem__(self, grid: Any) -> Any:
                    moved.append(0)
                    return kernel_of[grid]

            return Launched()

        monkeypatch.setattr(kernel, name, launched(getattr(kernel, name)))
    window, shape = 3, (2, 1100)
    call = arguments(window, shape, history, device=device)
    elements = math.prod(shape)
    gram, mix = bytes_per_element(torch.float32, history)
    assert (gram, mix) == (4 * (history + 1), 4 * (2 * history + 3))
    anderson_mix(**{**call, "frontier": False})
    assert moved == [gram * window * elements, mix * window * elements]
    moved.clear()
    anderson_mix(**call)
    assert moved == [gram * window * elements, (mix * window - 8 * history) * elements]


def test_reference_in_place(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function where there is no Triton."""
    call = arguments(3, (2, 20), 2, device=device)
    expected = anderson_mix(**call)
    monkeypatch.setattr(package, "implementation", lambda _: "torch")
    torch.testing.assert_close(anderson_mix(**call), expected)
    assert anderson_mix(**call, out=call["x"]) is call["x"]
    torch.testing.assert_close(call["x"], expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda t: t.half()),
        ("x", lambda t: t[0, 0]),
        ("x", lambda t: t[:, :0]),
        ("x", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
        ("residual", lambda t: t[:1]),
        ("residual", lambda t: t.double()),
        ("residual", lambda t: t.to("meta")),
        ("residual", lambda t: t.repeat_interleave(2, -1)[..., ::2]),
        ("dx", lambda t: t[:1]),
        ("dx", lambda t: t.double()),
        ("dx", lambda t: t.to("meta")),
        ("dx", lambda t: t.transpose(3, 4).contiguous().transpose(3, 4)),
        ("dr", lambda t: t[:0]),
        ("dr", lambda t: t.repeat(3, 1, 1, 1, 1)),
        ("dr", lambda t: t[:, :1]),
        ("dr", lambda t: t.double()),
        ("dr", lambda t: t.to("meta")),
        ("dr", lambda t: t.transpose(3, 4).contiguous().transpose(3, 4)),
        ("regularisation", lambda _: 0.0),
        ("regularisation", lambda _: -1.0),
        ("regularisation", lambda _: math.nan),
        ("regularisation", lambda _: math.inf),
        ("out", lambda t: t[:1]),
        ("out", lambda t: t.double()),
        ("out", lambda t: t.to("meta")),
        ("out", lambda t: t[:1].expand(3, -1, -1, -1)),
        ("out", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
        ("tickets", lambda _: Tickets("cpu", 1)),
        ("tickets", lambda _: Tickets("meta", 2)),
    ],
)
def test_errors_name_the_argument(device: torch.device, name: str, change: Any) -> None:
    call = arguments(3, (2, 4, 5), 2, device=device)
    call |= {"out": torch.zeros_like(call["x"]), "tickets": None}
    call[name] = change(call[name])
    with pytest.raises(InvalidArgument, match=f"^{name} "):
        anderson_mix(**call)


def test_errors_of_overlap(device: torch.device) -> None:
    call = arguments(3, (2, 8), 2, device=device)
    for name, out in (("residual", call["residual"]), ("dx", call["dx"][1]), ("dr", call["dr"][0])):
        with pytest.raises(InvalidArgument, match=f"^out overlaps {name} "):
            anderson_mix(**call, out=out)
    longer = torch.cat([call["x"], call["x"]])
    with pytest.raises(InvalidArgument, match=r"^out overlaps x "):
        anderson_mix(**{**call, "x": longer[:3]}, out=longer[1:4])

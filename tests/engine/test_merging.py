"""Merged network calls: rules are found by trying, and networks whose rows depend on each other have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from calls import latents
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from srds_fast.engine.merging.calls import MergedCalls
from srds_fast.engine.merging.rule import Call, Layout, MergeRule, Way
from srds_fast.engine.merging.search import find_rule

BATCH, SIZE = 2, 5


class Plain(nn.Module):
    """Mixes the state of a row with its conditioning and its time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor, t: Any, condition: Tensor) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        return torch.tanh(self.mix(torch.cat((x, condition), 1))) * (1 + t[:, None])


class Branches(Plain):
    """Adds to every branch what the first one of the call is, as perturbed-attention guidance does."""

    def forward(self, x: Tensor, t: Any, condition: Tensor) -> Tensor:
        first, second = super().forward(x, t, condition).chunk(2)
        return torch.cat((first, second + first))


class InLists(Plain):
    """Takes and gives a list with a tensor per entry of the batch."""

    def forward(self, x: list[Tensor], t: Tensor, condition: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        return list(super().forward(torch.stack(x), t, torch.stack(condition)))


class BatchSecond(Plain):
    """Takes conditioning of several layers, [layers, batch, size]."""

    def forward(self, x: Tensor, t: Any, condition: Tensor) -> Tensor:
        return super().forward(x, t, condition.sum(0))


class SharedTable(Plain):
    """Takes a table of positions that has no batch, as long as the batch by chance."""

    def forward(self, x: Tensor, t: Any, condition: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
        assert len(table) == BATCH
        return super().forward(x, t, condition) + table.sum(0)


class AcrossRows(Plain):
    """Every entry also sees the mean of the batch."""

    def forward(self, x: Tensor, t: Any, condition: Tensor) -> Tensor:
        return super().forward(x + 0.1 * x.mean(0), t, condition)


class AcrossConditioning(Plain):
    """Every entry takes the conditioning of the first one."""

    def forward(self, x: Tensor, t: Any, condition: Tensor) -> Tensor:
        return super().forward(x, t, condition[:1].expand_as(condition))


def states(seed: int, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, SIZE, generator=torch.Generator().manual_seed(seed))


CONDITION = states(99)


def calls_of(network: nn.Module, time: Callable[[int], Any], condition: Any = CONDITION, **more: Any) -> list[Call]:
    """Calls of four rows, each with its state and its time."""
    in_lists = isinstance(condition, list)
    return [
        Call(network, (list(states(row)) if in_lists else states(row), time(row)), {"condition": condition, **more})
        for row in range(4)
    ]


@pytest.mark.parametrize(
    "time",
    [
        lambda row: torch.tensor(0.1 * row),
        lambda row: torch.tensor([0.1 * row]),
        lambda row: torch.full((BATCH,), 0.1 * row),
        lambda row: 0.1 * row,
        lambda row: row,
    ],
    ids=["scalar", "one entry", "one a sample", "float", "int"],
)
@pytest.mark.parametrize("network", [Plain, Branches, BatchSecond, InLists, SharedTable])
def test_merged_rows_are_those_of_single_calls(network: type[nn.Module], time: Callable[[int], Any]) -> None:
    condition: Any = CONDITION
    if network is BatchSecond:
        condition = torch.stack((CONDITION, CONDITION.flip(0), CONDITION**2))
    if network is InLists:
        condition = list(CONDITION)
    more = {"table": states(7)} if network is SharedTable else {}
    calls = calls_of(network(), time, condition, **more)
    expected = [call() for call in calls]
    merged = MergedCalls({})
    merged(calls)  # finds the rule
    before = merged.network_calls
    for found, each in zip(merged(calls), expected, strict=True):
        torch.testing.assert_close(found, each)
    assert merged.network_calls == before + 1
    assert merged.reasons() == []


@pytest.mark.parametrize("network", [AcrossRows, AcrossConditioning])
def test_a_network_that_looks_across_rows_is_called_row_by_row(network: type[nn.Module]) -> None:
    calls = calls_of(network(), lambda row: torch.tensor(0.1 * row))
    expected = [call() for call in calls]
    merged = MergedCalls({})
    for _ in range(2):
        assert all(map(torch.equal, merged(calls), expected))
    assert merged.reasons() == ["its output for a row depends on the other rows of the call"]


def test_rows_that_share_different_things_are_not_merged() -> None:
    network = SharedTable()
    calls = calls_of(network, float, table=states(7))
    merged = MergedCalls({})
    merged(calls)
    changed = [*calls[:2], *(Call(each.network, each.args, {**each.kwargs, "table": states(8)}) for each in calls[2:])]
    before = merged.network_calls
    for found, call in zip(merged(changed), changed, strict=True):
        torch.testing.assert_close(found, call())
    assert merged.network_calls == before + 2


def test_a_network_may_take_from_the_list_that_it_is_given() -> None:
    """As a UNet does with the features of an adapter; the call can be made again."""

    def network(x: Tensor, features: list[Tensor]) -> Tensor:
        return x + features.pop(0)

    call = Call(network, (torch.zeros(2),), {"features": [torch.ones(2), torch.zeros(2)]})
    assert torch.equal(call(), torch.ones(2))
    assert torch.equal(call(), torch.ones(2))
    assert torch.equal(call(lambda x, features: x + len(features)), torch.full((2,), 2.0))


def test_rows_at_the_same_point_find_no_rule() -> None:
    call = calls_of(Plain(), float)[1]
    merged = MergedCalls({})
    outputs = merged([call, call])
    assert torch.equal(*outputs)
    assert merged.search_calls == 0


def test_half_precision_allows_for_its_rounding_only() -> None:
    for network, has_rule in ((Plain(), True), (AcrossRows(), False)):
        network.to(torch.bfloat16)
        half = [
            Call(network, (call.args[0].bfloat16(), call.args[1]), {"condition": CONDITION.bfloat16()})
            for call in calls_of(network, lambda row: torch.tensor(0.1 * row))[1:3]
        ]
        found = find_rule(half, [call() for call in half])
        assert (found.rule is not None) is has_rule


@given(
    rows=st.integers(1, 4),
    batch=st.integers(1, 3),
    layout=st.sampled_from(list(Layout)),
    each=st.integers(1, 2),
    way=st.sampled_from((Way.JOIN, Way.JOIN_1)),
)
def test_splitting_undoes_merging(rows: int, batch: int, layout: Layout, each: int, way: Way) -> None:
    shape = (batch * each, 3) if way is Way.JOIN else (3, batch * each)
    given_states = [torch.randn(*shape, 2) for _ in range(rows)]
    rule = MergeRule((way,), layout, batch, (way,))
    merged = rule.merge([Call(lambda x: x, (x,), {}) for x in given_states])
    assert all(map(torch.equal, rule.split(merged(), rows), given_states))


@contextmanager
def recorded(pipe: Any, into: list[tuple[Call, Any]]) -> Iterator[None]:
    """Keep the calls of the pipe's denoising networks, and their outputs."""
    handles = []
    for name in ("unet", "transformer", "controlnet"):
        if (network := getattr(pipe, name, None)) is not None:

            def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                into.append((Call(module.forward, args, dict(kwargs)), output))

            handles.append(network.register_forward_hook(keep, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", sorted(tiny.PIPELINES))
def test_networks_of_pipelines_have_rules(name: str) -> None:
    build, call = tiny.PIPELINES[name]
    pipe = build()
    kept: list[tuple[Call, Any]] = []
    with recorded(pipe, kept):
        latents(pipe, num_inference_steps=3, **call)
    for owner in {id(call.network.__self__) for call, _ in kept}:  # type: ignore[attr-defined]
        one, *_, other = (each for each in kept if id(each[0].network.__self__) == owner)  # type: ignore[attr-defined]
        found = find_rule((one[0], other[0]), (one[1], other[1]))
        assert found.reason is None

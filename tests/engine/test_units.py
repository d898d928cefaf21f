"""Network calls in units that ranks share: what is sent is what was returned, entries are cut where they may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_merging import BATCH, CONDITION, Branches, Plain, SharedTable, calls_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from srds_fast import InvalidArgument
from srds_fast.engine.merging.search import find_rule
from srds_fast.engine.merging.units import Form, Piece, by_entries, entries_call

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)


class TwoTensors(Plain):
    """Gives the residuals of several blocks, as a ControlNet does."""

    def forward(self, x: Tensor, t: Any, condition: Tensor) -> Any:
        found = super().forward(x, t, condition)
        return {"blocks": [found, found.double().unsqueeze(1)], "middle": (found.half(), None, 3)}


@given(
    entries=st.integers(1, 3),
    each=st.integers(1, 3),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4),
    transposed=st.booleans(),
)
def test_bytes_hold_any_output(entries: int, each: int, dtypes: list[torch.dtype], transposed: bool) -> None:
    tensors = [(8 * torch.randn(entries, each, number + 1)).to(dtype) for number, dtype in enumerate(dtypes)]
    if transposed:
        tensors = [tensor.transpose(1, 2) for tensor in tensors]
    output = {"list": tensors[:-1], "one": (tensors[-1], None, 2)}
    form = Form.of(output, entries)
    assert form is not None
    room = torch.zeros(entries, form.nbytes + 16, dtype=torch.uint8)
    form.pack(output, room)
    for found, expected in zip(tree_leaves(form.unpack(list(room))), tree_leaves(output), strict=True):
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


@pytest.mark.parametrize(
    "changed",
    [lambda m: m[..., :-1], lambda m: m[:1], lambda m: m.double(), lambda m: (m, m), lambda m: None],
    ids=["narrower", "fewer entries", "dtype", "two", "none"],
)
def test_an_output_of_another_form_is_refused(changed: Any) -> None:
    """Written into the room of another one it would be taken for that."""
    output = torch.randn(2, 4)
    for entries in (1, 2):
        form = Form.of(output, entries)
        assert form is not None
        room = torch.zeros(entries, form.nbytes, dtype=torch.uint8)
        with pytest.raises(InvalidArgument, match="something else than in an earlier call"):
            form.pack(changed(output), room)


def test_an_output_that_is_no_tensor_and_no_plain_value_has_no_form() -> None:
    assert Form.of([torch.zeros(2), object()]) is None
    assert Form.of(torch.zeros(2, dtype=torch.complex64)) is None


@pytest.mark.parametrize(
    ("network", "divides"), [(Plain, True), (TwoTensors, True), (SharedTable, True), (Branches, False)]
)
@pytest.mark.parametrize("time", [float, torch.tensor], ids=["float", "scalar"])
def test_entries_are_cut_where_they_do_not_depend_on_each_other(
    network: type[nn.Module], divides: bool, time: Any
) -> None:
    more = {"table": torch.ones(BATCH, CONDITION.shape[1])} if network is SharedTable else {}
    calls = calls_of(network(), lambda row: time(0.1 * row), **more)
    outputs = [call() for call in calls]
    rule = find_rule(calls[1:3], outputs[1:3]).rule
    assert rule is not None
    assert by_entries(rule, calls[2], outputs[2], lambda call: call()) is divides
    if divides:
        pieces = [Piece(calls[1], 1, 2), Piece(calls[2], 0, 2), Piece(calls[3], 0, 1)]
        expected = [tree_leaves(outputs[row])[0][begin:end] for row, begin, end in ((1, 1, 2), (2, 0, 2), (3, 0, 1))]
        torch.testing.assert_close(tree_leaves(entries_call(rule, pieces)())[0], torch.cat(expected))

"""One secant sweep in plain PyTorch.

A sweep takes the network's output at some points and moves all of them. It goes along the grid once, and carries the
change of the point it stands on through the step from there, linearised where the last wave left the points:

    d_{i+1} = f_i(x_i, m_i) - x_{i+1} + a_i d_i + b_i dm_i + e_i 1[|x0_i| <= clip] (p_i d_i + q_i dm_i)
    dm_i    = r_i d_i + U_i (S_i' S_i + ridge_i I)^-1 S_i' d_i

dm_i is what the network's output is expected to change by. r_i is its response for Gaussian data, a number. Where the
point has moved already it is corrected by secants: S_i holds the last movements of the point, U_i what the output
changed by beyond r_i times these. This is a multisecant method in each point (Fang and Saad 2009), with the expected
response in the place of the identity, inside Newton's method for the whole grid, whose linear systems are solved by
going along it. In the next wave the network's output is compared with what was expected: the surprise of the nodes is
carried to the points between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.clamping import clamp_slope, clamped
from ..common.network_input import NetworkInput, guided, network_input
from .memory import Memory, SweepResult
from .table import SecantTable, SecantWave

ConstrainOne = Callable[[Tensor, int], Tensor]
"""(states [samples, elements], position they have arrived at) -> states that meet the constraint."""


class Secants(NamedTuple):
    """What the points have learnt of their responses. h differences.

    Attributes:
        solve: [N, samples, h, elements], (S' S + ridge)^-1 S'.
        response: [N, samples, elements, h], U.
    """

    solve: Tensor
    response: Tensor


def secant_sweep(
    table: SecantTable,
    number: int,
    memory: Memory,
    m: Tensor,
    guidance: Tensor | None,
    network: NetworkInput,
    constrain: ConstrainOne | None,
    check_stationary: bool,
) -> SweepResult:
    """See `secant_sweep` of the package."""
    wave = table.waves[number]
    update_outputs(table, wave, memory, guided(m, guidance, memory.expected.dtype).flatten(2))
    move(table, wave, memory, constrain)
    moved = memory.points(-1) - memory.points(0)
    change, doubt = (table.weight * moved.abs().mean(2)).amax(0), (table.reach * memory.doubts).sum(0)
    stationary = None
    if check_stationary:
        stationary = (moved == 0).all(2).all(0) if wave.full else change.new_zeros(len(change), dtype=torch.bool)
    memory.sweeps += 1
    states, following = memory.states(0), wave.next_positions
    next_input = None if following is None else network_input(states, following, table.input_scale, network)
    return SweepResult(states[-1].clone(), change, doubt, stationary, next_input)


def update_outputs(table: SecantTable, wave: SecantWave, memory: Memory, got: Tensor) -> None:
    """Write the network's outputs at the newest points, as far as they are known; got: at the rows of the wave.

    Where the network was asked for the first time, the difference to what was carried there so far is its own, and is
    added to the outputs of earlier waves too: no secant may take it for a response.
    """
    output = torch.add(memory.output(1), memory.expected, out=memory.output(0))
    between = wave.interpolation
    if between is not None:
        positions = wave.positions.index_select(0, between.nodes)
        surprise = (got.index_select(0, between.nodes) - output.index_select(0, positions)).flatten(1)
        differ = (between.doubt @ surprise).view_as(output[between.first :])
        memory.doubts[between.first :] += differ.abs().mean(2)
        output[between.first :] += (between.weights @ surprise).view_as(output[between.first :])
    if len(wave.new):
        own = got.index_select(0, wave.new) - output.index_select(0, wave.new_positions)
        for age in range(1, table.differences(memory.sweeps) + 1):
            memory.output(age).index_add_(0, wave.new_positions, own)
    memory.doubts.index_fill_(0, wave.positions, 0.0)
    output.index_copy_(0, wave.positions, got)


def secants(table: SecantTable, memory: Memory) -> Secants | None:
    """What the last waves tell of the responses; None in the first one."""
    count = table.differences(memory.sweeps)
    if count == 0:
        return None
    ages = range(count, -1, -1)
    moved = torch.stack([memory.points(age)[:-1] for age in ages], 2).diff(dim=2)
    changed = torch.stack([memory.output(age) for age in ages], 2).diff(dim=2)
    beyond = changed - table.response[:, None] * moved  # as moved, [N, samples, h, elements]
    norms, bounds = beyond.norm(dim=3, keepdim=True), table.largest[:, None] * moved.norm(dim=3, keepdim=True)
    beyond *= (bounds / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    gram = moved @ moved.transpose(2, 3)
    diagonal = gram.diagonal(dim1=2, dim2=3)
    ridge = table.regularisation * diagonal.amax(2) + moved.shape[3] * table.smallest[:, :, 0]
    diagonal += ridge[..., None]
    return Secants(inverse(gram) @ moved, beyond.transpose(2, 3))


def inverse(matrix: Tensor) -> Tensor:
    """Inverses of positive definite matrices [..., h, h] by elimination: a library's may refuse NaN, or wait."""
    size = matrix.shape[-1]
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    rows = torch.cat([matrix, identity.expand_as(matrix)], -1)
    for k in range(size):
        pivot = rows[..., k : k + 1, :] / rows[..., k : k + 1, k : k + 1]
        others = torch.arange(size, device=rows.device).ne(k).unsqueeze(-1)
        rows = torch.where(others, rows - rows[..., k : k + 1] * pivot, pivot)
    return rows[..., size:]


def move(table: SecantTable, wave: SecantWave, memory: Memory, constrain: ConstrainOne | None = None) -> None:
    """Write the points behind the first row into `memory.points(-1)`, and what is expected of the outputs there.

    Where a point does not move, the next one is the sequential sampler's step from it, to the bit.
    """
    first, x, m = wave.first, memory.points(0), memory.output(0)
    learnt = secants(table, memory)
    here, output = x[first:-1], m[first:]
    a, b, e, p, q, response = (
        column[first:] for column in (table.a, table.b, table.e, table.p, table.q, table.response)
    )
    x0 = p * here + q * output
    stepped = a * here + b * output
    # derivatives of the step by the state with the output as it is, and by the output
    by_state, by_output, inside = a, b, None
    if table.clip is not None:
        inside = clamp_slope(x0, table.clip)
        x0 = clamped(x0, table.clip)
        stepped = stepped + e * x0
        by_state, by_output = a + e * p * inside, b + e * q * inside
    if table.momentum is not None:
        stepped = stepped + table.momentum[first:] * _with_before(table, memory, first, x0).diff(dim=0)
    if table.spread is not None:
        assert memory.draws is not None
        stepped = stepped + table.spread[first:] * memory.draws[first:]
    if table.look_back is not None:
        stepped = stepped + table.look_back.added(x, m, memory.draws, memory.carried, table.num_steps)[first:]
    if table.look_back is not None:
        _walk_back(table, memory, first, stepped, learnt, constrain)
        _expect(table, memory, learnt, first)
        return
    slopes = by_state + by_output * response
    of_x0 = _x0_changes(table, first, inside, learnt)

    after = _begin(memory, x, first, stepped, constrain)
    # as columns [samples, elements, 1], one for each step: the loop below is all that the host does N times
    old, new, steps, slope = (
        each[..., None].unbind() for each in (x[first + 1 :], after[first + 1 :], stepped, slopes)
    )
    solve: tuple[Tensor, ...] = ()
    carried: tuple[Tensor, ...] = ()
    if learnt is not None:
        solve, carried = learnt.solve[first:].unbind(), (by_output[..., None] * learnt.response[first:]).unbind()
    change = new[0] - old[0]
    x0_before = torch.zeros_like(change)
    for index in range(1, table.num_steps - first):
        more = slope[index] * change
        if learnt is not None:
            along = torch.bmm(solve[index], change)
            more.baddbmm_(carried[index], along)
        if of_x0 is not None:
            x0_change = of_x0.slopes[index] * change
            if of_x0.carried is not None:
                x0_change.baddbmm_(of_x0.carried[index], along)
            more += of_x0.momentum[index] * (x0_change - x0_before)
            x0_before = x0_change
        torch.add(steps[index], more, out=new[index])
        if constrain is not None:
            new[index].copy_(constrain(new[index][..., 0], first + index + 1)[..., None])
        change = new[index] - old[index]
    _expect(table, memory, learnt, first)


def _begin(memory: Memory, x: Tensor, first: int, stepped: Tensor, constrain: ConstrainOne | None) -> Tensor:
    """The points that are written, up to the first that moves: it departs from a point that is exact."""
    after = memory.points(-1)
    after[: first + 1] = x[: first + 1]
    after[first + 1] = stepped[0]
    if constrain is not None:
        after[first + 1] = constrain(after[first + 1], first + 1)
    return after


def _walk_back(
    table: SecantTable,
    memory: Memory,
    first: int,
    stepped: Tensor,
    learnt: Secants | None,
    constrain: ConstrainOne | None,
) -> None:
    """`move` for steps that look back at all points before: each moves with the changes of all of them."""
    assert table.look_back is not None
    x = memory.points(0)
    after = _begin(memory, x, first, stepped, constrain)
    size = table.num_steps - first
    # of the points from the first row on, and what their outputs answer
    changes, answers = x.new_zeros(2, size, *x.shape[1:])
    for index in range(1, size):
        row = first + index
        changes[index] = change = after[row] - x[row]
        answer = torch.mul(table.response[row], change, out=answers[index])
        if learnt is not None:
            along = learnt.solve[row] @ change[..., None]
            answer += (learnt.response[row] @ along)[..., 0]
        more = table.a[row] * change + table.b[row] * answer
        for weights, earlier in ((table.look_back.of_x, changes), (table.look_back.of_m, answers)):
            more += (weights[row : row + 1, first:].to(x.dtype) @ earlier.flatten(1)).view_as(more)
        torch.add(stepped[index], more, out=after[row + 1])
        if constrain is not None:
            after[row + 1] = constrain(after[row + 1], row + 1)


class _X0Changes(NamedTuple):
    """How x0 changes with a point: by so much of its change, and of what secants learnt; by steps, see `move`."""

    slopes: tuple[Tensor, ...]
    carried: tuple[Tensor, ...] | None
    momentum: tuple[Tensor, ...]


def _x0_changes(table: SecantTable, first: int, inside: Tensor | None, learnt: Secants | None) -> _X0Changes | None:
    """None for schedulers without momentum."""
    if table.momentum is None:
        return None
    slopes = table.p[first:] + table.q[first:] * table.response[first:]
    carried = None if learnt is None else table.q[first:, ..., None] * learnt.response[first:]
    if inside is not None:
        slopes = slopes * inside
        carried = None if carried is None else inside[..., None] * carried
    momentum = table.momentum[first:, ..., None].unbind()
    return _X0Changes(slopes[..., None].unbind(), None if carried is None else carried.unbind(), momentum)


def _with_before(table: SecantTable, memory: Memory, first: int, x0: Tensor) -> Tensor:
    """x0 from step `first` on, with the one before it."""
    if first > 0:
        return torch.cat([predict_x0(table, memory, first - 1)[None], x0])
    return torch.cat([x0[:1] if memory.x0_prev is None else memory.x0_prev[None], x0])


def predict_x0(table: SecantTable, memory: Memory, step: int, age: int = 0) -> Tensor:
    """x0 at the point of this age where a step departs, [samples, elements], from the output that is known there."""
    x0 = table.p[step] * memory.points(age)[step] + table.q[step] * memory.output(age)[step]
    return clamped(x0, table.clip, leading=1)


def _expect(table: SecantTable, memory: Memory, learnt: Secants | None, first: int) -> None:
    """What the outputs are expected to change by, now that the points have moved."""
    changes = memory.points(-1)[first + 1 : -1] - memory.points(0)[first + 1 : -1]
    expected = memory.expected
    expected[: first + 1] = 0.0
    torch.mul(table.response[first + 1 :], changes, out=expected[first + 1 :])
    if learnt is not None:
        along = learnt.solve[first + 1 :] @ changes[..., None]
        expected[first + 1 :] += (learnt.response[first + 1 :] @ along)[..., 0]

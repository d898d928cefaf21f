from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srds_fast.errors import InvalidArgument
from srds_fast.solvers import program
from srds_fast.solvers.program import Program, block_bounds


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    steps = draw(st.integers(1, 60))
    blocks = draw(st.integers(1, steps))
    return steps, blocks, draw(st.integers(0, blocks))


def check(found: Program) -> None:
    """No row reads what no earlier wave wrote, and every boundary is made once, from finished parts.

    Replays the program symbolically, with the dependencies of the method, not with those that the builders know.
    """
    size = [after - before for before, after in pairwise(found.bounds)]
    written: set[tuple[object, ...]] = {("boundary", 0, 0)}

    def reads(what: str, *keys: tuple[object, ...]) -> None:
        for key in keys:
            assert key in written, f"{what} reads {key}, which no earlier wave wrote"

    for number, wave in enumerate(found):
        assert wave.rows
        outputs: set[tuple[object, ...]] = set()
        for row in wave.rows:
            where = f"wave {number}, {row}"
            assert row.coarse or row.fine
            assert row.position == found.bounds[row.block] + row.step < found.bounds[row.block + 1]
            assert not row.coarse or row.step == 0
            reads(where, ("boundary", row.iteration, row.block) if row.step == 0 else ("point", *row[:3]))
            if row.coarse:
                if row.block > 0:
                    # boundary i is exact from iteration i on
                    reads(where, ("output", min(row.iteration, row.block - 1), row.block - 1))
                outputs |= {("jump", row.iteration, row.block), ("output", row.iteration, row.block)}
            if row.fine:
                done = row.step + 1 == size[row.block]
                key = ("solve", *row[:2]) if done else ("point", *row[:2], row.step + 1)
                assert key not in written | outputs, f"{where} writes {key} a second time"
                outputs.add(key)
        written |= outputs
        for iteration, boundary in wave.boundaries:
            where = f"boundary {boundary} of iteration {iteration} after wave {number}"
            assert ("boundary", iteration, boundary) not in written, f"{where} is made twice"
            if iteration > 0:
                reads(where, ("solve", iteration - 1, boundary - 1))
            if iteration < boundary:
                reads(where, ("jump", iteration, boundary - 1))
                if iteration > 0:
                    reads(where, ("jump", iteration - 1, boundary - 1))
            written.add(("boundary", iteration, boundary))
    reads("the result", ("boundary", found.num_iterations, found.num_blocks))


def total_rows(steps: int, blocks: int, iterations: int) -> int:
    """Shared and truncated total: the solved blocks of each iteration, and the last coarse sweep."""
    bounds = block_bounds(steps, blocks)
    solved = sum(steps - bounds[iteration] for iteration in range(iterations))
    return solved + blocks - iterations


@pytest.mark.parametrize(
    ("steps", "blocks", "iterations", "waves", "rows"),
    [(100, 10, 1, 19, 109), (25, 5, 1, 9, 29), (25, 5, 2, 13, 48), (25, 5, 3, 17, 62), (100, 20, 4, 36, 386)],
)
def test_counts_of_the_paper_table(steps: int, blocks: int, iterations: int, waves: int, rows: int) -> None:
    found = program.srds(steps, blocks, iterations)
    assert (found.num_waves, found.num_rows) == (waves, rows)


@given(shapes(), st.booleans(), st.sampled_from([None, 1, 2, 3, 7]), st.sampled_from([None, 1, 2, 4]))
def test_any_program_reads_only_what_was_written(
    shape: tuple[int, int, int], pipelined: bool, max_rows: int | None, in_flight: int | None
) -> None:
    found = program.srds(*shape, pipelined, in_flight=in_flight if pipelined else None).limited_to(max_rows)
    check(found)
    assert max_rows is None or found.peak_rows <= max_rows


@given(shapes())
def test_rows_follow_the_formula_and_pipelining_moves_none(shape: tuple[int, int, int]) -> None:
    pipelined, plain = program.srds(*shape), program.srds(*shape, False)
    assert pipelined.num_rows == plain.num_rows == total_rows(*shape)
    assert pipelined.num_waves <= plain.num_waves
    assert {row for wave in pipelined for row in wave.rows} == {row for wave in plain for row in wave.rows}


@given(shapes(), st.integers(1, 6))
def test_what_is_held_back_moves_rows_and_costs_none_before_it_is_needed(
    shape: tuple[int, int, int], in_flight: int
) -> None:
    steps, blocks, iterations = shape
    eager, held = program.srds(*shape), program.srds(*shape, in_flight=in_flight)
    assert {row for wave in eager for row in wave.rows} == {row for wave in held for row in wave.rows}
    if in_flight >= iterations:
        assert held == eager
    for iteration in range(1, iterations + 1):
        # what ends here has run the rows of those in flight at most
        most = program.srds(steps, blocks, min(iterations, iteration + in_flight - 1))
        assert held.spent(iteration).rows <= most.num_rows
        assert held.spent(iteration).rows <= eager.spent(iteration).rows
        assert held.spent(iteration).waves >= eager.spent(iteration).waves
        if iteration <= in_flight:
            assert held.spent(iteration).waves == eager.spent(iteration).waves
        if in_flight == 1:
            assert held.spent(iteration).rows == program.srds(steps, blocks, iteration).num_rows


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_waves_follow_the_formula_where_blocks_are_equal(size: int, blocks: int, data: st.DataObject) -> None:
    iterations = data.draw(st.integers(0, blocks))
    assert program.srds(size * blocks, blocks, iterations).num_waves == iterations * size + blocks - iterations
    assert program.srds(size * blocks, blocks, iterations, False).num_waves <= blocks + iterations * (size + blocks)


@given(st.integers(1, 24))
def test_exact_never_takes_more_waves_than_sequential(steps: int) -> None:
    sequential = program.sequential(steps)
    check(sequential)
    assert sequential.num_waves == steps
    for blocks in range(1, steps + 1):
        assert program.srds(steps, blocks, blocks).num_waves == steps


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0, 1, 0), "num_steps"), ((4, 5, 1), "num_blocks"), ((4, 2, 3), "num_iterations"), ((4, True, 1), "num_blocks")],
)
def test_numbers_out_of_range_are_named(arguments: tuple[int, int, int], name: str) -> None:
    program.srds(4, 1, 1)  # True == 1: a cache that does not look at types would answer the last of these
    with pytest.raises(InvalidArgument, match=name):
        program.srds(*arguments)


def test_iterations_that_do_not_overlap_are_not_held_back() -> None:
    for arguments, in_flight in (((8, 4, 2), 0), ((8, 4, 2, False), 1)):
        with pytest.raises(InvalidArgument, match="in_flight"):
            program.srds(*arguments, in_flight=in_flight)


def test_programs_need_no_torch() -> None:
    code = "import sys, srds_fast; srds_fast.program.srds(100, 10, 2); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.integers(0, 3), st.booleans())
def test_lanes_hold_the_same_rows_coarse_ones_first(sizes: tuple[int, int], iterations: int, pipelined: bool) -> None:
    steps, blocks = sizes
    whole = program.srds(steps, blocks, min(iterations, blocks), pipelined)
    lanes = whole.in_lanes()
    assert [row for wave in lanes for row in wave.rows] == [row for wave in whole for row in wave.rows]
    assert all(len({row.coarse for row in wave.rows}) == 1 for wave in lanes)
    assert [each for wave in lanes for each in wave.boundaries] == [each for wave in whole for each in wave.boundaries]
    assert len(lanes) == sum(len(wave.lanes()) for wave in whole)

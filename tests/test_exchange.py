"""Every wave finds in its slots what the maths says it reads, although slots are used again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from srds_fast import program
from srds_fast.program import Program, settled
from srds_fast.solvers.exchange import Sum, exchanges


def replay(waves: Program, led: tuple[int, ...], carries_x0: bool) -> int:
    """Run the exchanges with words in place of tensors, as the maths would name them; returns the number of slots."""
    layout = exchanges(waves, led, carries_x0)
    size = [stop - start for start, stop in zip(waves.bounds, waves.bounds[1:], strict=False)]
    # a slot can hold two at once: in the coarse sweep a jump is the boundary it lands on
    memory: dict[int, set[tuple[object, ...]]] = {0: {("state", 0, 0, 0)}}
    for wave, exchange in zip(waves, layout.waves, strict=True):
        rows = [output.row for output in exchange.outputs]
        assert rows[: len(wave.rows)] == list(wave.rows), "the network's rows come first"
        assert [wave.rows[output.source] for output in exchange.outputs] == rows
        assert len({output.slot for output in exchange.outputs}) == len(rows)
        for row, slot in zip(rows, exchange.states, strict=True):
            assert ("state", *row[:3]) in memory[slot]
        for step, slot in zip(exchange.steps, exchange.behind, strict=True):
            assert (slot is None) == (step.row.position == 0 or not carries_x0)
            assert slot is None or ("behind", *step.row[:3]) in memory[slot]

        assert exchange.steps == exchange.outputs[exchange.solves]
        x0_of_steps = exchange.outputs[-len(exchange.steps) :] if carries_x0 and exchange.steps else ()
        for output in exchange.outputs:
            iteration, block, step = output.row[:3]
            what, is_last = output.kind, step + 1 == size[block]
            if output.kind == "fine":
                what, step = "solved" if is_last else "state", step + 1
            elif output in x0_of_steps:
                what, step = "solved x0" if is_last else "behind", step + 1
            elif output.kind == "x0":
                what = "jump x0"
            memory[output.slot] = {(what, iteration, block, step)}

        jumps = {
            output.slot: output.row for output in exchange.outputs if output.kind == "jump" and output.row.block in led
        }
        assert jumps.keys() == {jump for jump, _ in exchange.leads}
        for jump, lead in exchange.leads:
            assert ("lead", *settled(jumps[jump].iteration, jumps[jump].block - 1), 0) in memory[lead]

        def make(what: str, value: Sum, solved: str, jump: str, iteration: int, block: int) -> None:
            fine, coarse = (solved, iteration - 1, block, size[block]), (jump, iteration, block, 0)
            assert (fine if iteration > 0 else coarse) in memory[value.slot]
            assert (value.bracket is not None) == (0 < iteration <= block)
            if value.bracket is not None:
                new, before = value.bracket
                assert coarse in memory[new]
                assert (jump, iteration - 1, block, 0) in memory[before]
                memory[value.slot].clear()
            memory[value.slot].add((what, iteration, block + 1, 0))

        assert [birth.boundary for birth in exchange.births] == list(wave.boundaries)
        for birth in exchange.births:
            iteration, boundary = birth.boundary
            make("state", birth.state, "solved", "jump", iteration, boundary - 1)
            if birth.x0 is not None:
                make("behind", birth.x0, "solved x0", "jump x0", iteration, boundary - 1)
    return layout.num_slots


@given(st.integers(1, 30), st.data())
def test_no_slot_is_written_before_it_was_read_for_the_last_time(num_steps: int, data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, num_steps))
    iterations = data.draw(st.integers(0, num_blocks))
    pipelined, shared, carries_x0 = (data.draw(st.booleans()) for _ in range(3))
    led = tuple(sorted(data.draw(st.sets(st.integers(1, max(1, num_blocks - 1)), max_size=num_blocks - 1))))
    waves = program.srds(num_steps, num_blocks, iterations, pipelined, shared=shared)
    replay(waves.limited_to(data.draw(st.sampled_from([None, 1, 3]))), led, carries_x0)


def test_the_memory_does_not_grow_with_the_iterations() -> None:
    def slots(num_iterations: int) -> int:
        return replay(program.srds(100, 20, num_iterations), tuple(range(1, 20)), carries_x0=False)

    # 20 rows in the widest wave, and what they and the corrections leave for later waves
    assert slots(20) <= 3.5 * 20
    assert slots(20) <= slots(10) + 5

"""Every wave finds in its slots what the maths says it reads, although slots are used again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from srds_fast.solvers import program
from srds_fast.solvers.dataflow import Sum, exchanges
from srds_fast.solvers.program import Program, settled


def replay(
    waves: Program, led: tuple[int, ...], carries_x0: bool, x0_given: bool = False, watched: bool = False
) -> int:
    """Run the exchanges with words in place of tensors, as the maths would name them; returns the number of slots."""
    layout = exchanges(waves, led, carries_x0, x0_given, watched)
    size = [stop - start for start, stop in zip(waves.bounds, waves.bounds[1:], strict=False)]
    lead = "jump x0" if carries_x0 else "lead"
    # a slot can hold two at once: in the coarse sweep a jump is the boundary it lands on
    memory: dict[int, set[tuple[object, ...]]] = {0: {("state", 0, 0, 0)}}
    if x0_given:
        memory[1] = {("behind", 0, 0, 0)}
    for wave, exchange in zip(waves, layout.waves, strict=True):
        for row, slot in zip(wave.rows, exchange.states, strict=True):
            assert ("state", *row[:3]) in memory[slot]
        assert len({output.slot for output in exchange.outputs}) == len(exchange.outputs)
        jumps = {output.row for output in exchange.outputs if output.kind == "jump"}
        fine = {output.row for output in exchange.outputs if output.kind == "fine"}
        assert jumps == {row for row in wave.rows if row.coarse}
        assert fine == {row for row in wave.rows if row.fine}
        written: dict[int, set[tuple[object, ...]]] = {}
        for output in exchange.outputs:
            row = output.row
            assert row == wave.rows[output.source]
            assert ("state", *row[:3]) in memory[output.state]
            looks_back = None
            if output.kind == "jump" and row.block in led:
                looks_back = (lead, *settled(row.iteration, row.block - 1), 0)
            elif output.kind == "fine" and carries_x0 and (row.position > 0 or x0_given):
                looks_back = ("behind", *row[:3])
            assert (output.before is None) == (looks_back is None)
            assert output.before is None or looks_back in memory[output.before]
            iteration, block, step = row[:3]
            is_last = step + 1 == size[block]
            what = {
                "jump": "jump",
                "lead": lead,
                "fine": "solved" if is_last else "state",
                "x0": "solved x0" if is_last else "behind",
            }[output.kind]
            written[output.slot] = {(what, iteration, block, step + 1 if output.kind in ("fine", "x0") else 0)}
        # nothing is overwritten that another value of the wave is made from
        assert not written.keys() & {*exchange.states, *(output.before for output in exchange.outputs)}
        memory.update(written)

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
            if what == "state":
                memory[value.slot].add(("born", iteration, block + 1))

        assert [birth.boundary for birth in exchange.births] == list(wave.boundaries)
        for birth in exchange.births:
            iteration, boundary = birth.boundary
            make("state", birth.state, "solved", "jump", iteration, boundary - 1)
            if birth.x0 is not None:
                make("behind", birth.x0, "solved x0", "jump x0", iteration, boundary - 1)
            compared = iteration > 0 and (watched or boundary == waves.num_blocks)
            assert (birth.compare is not None) == compared
            assert birth.compare is None or ("born", iteration - 1, boundary) in memory[birth.compare]
    return layout.num_slots


@given(st.integers(1, 30), st.data())
def test_no_slot_is_written_before_it_was_read_for_the_last_time(num_steps: int, data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, num_steps))
    iterations = data.draw(st.integers(0, num_blocks))
    pipelined, shared, carries_x0, watched = (data.draw(st.booleans()) for _ in range(4))
    x0_given = carries_x0 and data.draw(st.booleans())
    led = tuple(sorted(data.draw(st.sets(st.integers(1, max(1, num_blocks - 1)), max_size=num_blocks - 1))))
    in_flight = data.draw(st.sampled_from([None, 1, 2])) if pipelined else None
    waves = program.srds(num_steps, num_blocks, iterations, pipelined, shared=shared, in_flight=in_flight)
    replay(waves.limited_to(data.draw(st.sampled_from([None, 1, 3]))), led, carries_x0, x0_given, watched)


def test_the_memory_does_not_grow_with_the_iterations() -> None:
    def slots(num_iterations: int) -> int:
        return replay(program.srds(100, 20, num_iterations), tuple(range(1, 20)), carries_x0=False)

    # 20 rows in the widest wave, and what they and the corrections leave for later waves
    assert slots(20) <= 3.5 * 20
    assert slots(20) <= slots(10) + 5

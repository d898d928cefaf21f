"""What a driven loop does on the host, in counts: times jitter, bench/speed/host_time.py reports them."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.regression.dispatched import Dispatched
from bench.speed import host_time
from bench.speed.host_time import PIPELINES, Case
from srds_fast.solvers.ahead import Tells


def counts(case: Case, loop: str) -> list[Counter[str]]:
    """What each turn of a call dispatches but the first, in which a run begins."""
    with Dispatched() as dispatched:
        case.turns.clock = dispatched.counts.copy
        return [stop - start for start, stop in case.call(loop)[1:]]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_wave_dispatches_little_and_never_waits(name: str) -> None:
    case = Case(name)
    most = max(turn["operations"] for turn in counts(case, "sequential"))
    # weights of guidance need not sum to one, as those of a pipeline's own formula do: their sum, and one product more
    assert most <= min(turn["operations"] for turn in counts(case, "stock")) + 3
    for method in ("srds", "srds plain"):
        waves = counts(case, method)
        program = case.loops[method].plan_for(**case.arguments).program()
        tells = Tells(program)
        assert len(waves) == len(program) - 2
        # the first two repeat the conditioning; the end of an iteration is judged by the host
        for turn, wave in list(zip(waves, program.waves[1:], strict=False))[2:]:
            if program.num_blocks not in [completed.boundary for completed in wave.boundaries]:
                jumps = sum(row.coarse for row in wave.rows)
                # whatever the number of rows; a boundary that tells of a sample is compared
                told = sum(each in tells for each in wave.boundaries)
                assert turn["operations"] <= most + 8 + jumps + 2 * len(wave.boundaries) + 4 * told
                assert not turn["host_waits"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    host_time.main(["--repeat", "1", "--steps", "9", "--only", "SD DDIM", "DDIM pixels"])
    printed = capsys.readouterr().out.splitlines()
    loops = 2 * len(host_time.METHODS) + 1  # one of the two takes a callback
    assert len(printed) == 2 * 3 + loops, "an empty line, the pipeline, headings and loops"
    assert printed[1] == "SD DDIM"
    assert (printed[3].split()[0], printed[3].split()[-1]) == ("sequential", "1.00"), "rows a wave"

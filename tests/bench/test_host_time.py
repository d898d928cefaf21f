"""What a driven loop does on the host, in counts: times jitter, bench/speed/host_time.py reports them."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from bench.speed import host_time
from bench.speed.host_time import PIPELINES, Case

# how an index, or a number for the host, shows: on a GPU the host would wait for the device
WAITS = {"lift_fresh", "_to_copy", "index", "_local_scalar_dense"}


class Operations(TorchDispatchMode):
    """Names of all operations that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(case: Case, loop: str) -> list[list[str]]:
    """What each turn of a call dispatches but the first, in which a run begins."""
    with Operations() as dispatched:
        case.turns.clock = lambda: len(dispatched.names)
        return [dispatched.names[start:stop] for start, stop in case.call(loop)[1:]]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_wave_dispatches_little_and_never_waits(name: str) -> None:
    case = Case(name)
    most = max(len(names) for names in operations(case, "sequential"))
    assert most <= min(len(names) for names in operations(case, "stock"))
    for method in ("srds", "srds plain"):
        waves = operations(case, method)
        program = case.loops[method].plan_for(**case.arguments).program()
        assert len(waves) == len(program) - 2
        # the first two repeat the conditioning; the end of an iteration is judged by the host
        for names, wave in list(zip(waves, program.waves[1:], strict=False))[2:]:
            if program.num_blocks not in [completed.boundary for completed in wave.boundaries]:
                jumps = sum(row.coarse for row in wave.rows)
                # whatever the number of rows
                assert len(names) <= most + 8 + jumps + 2 * len(wave.boundaries)
                assert not WAITS & set(names)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    host_time.main(["--repeat", "1", "--steps", "9", "--only", "SD DDIM", "DDIM pixels"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 2 * len(host_time.METHODS)
    assert printed[1].startswith("SD DDIM       sequential")
    assert printed[1].split()[-1] == "1.00", "rows a wave"

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_scheduler import READ, made
from thinned import thinned

from srds_fast.schedulers.memory import minimal_memory
from srds_fast.schedulers.reader import Triangles, read

# vectors that a scheduler of this class carries, where it is not one
CARRIED = {
    "CogVideoXDPM": 2, "CosineDPMSolverMultistep": 2, "DPMSolverSDE": 2,
    "DEISMultistep": 2, "DPMSolverMultistep": 2, "DPMSolverMultistepInverse": 2, "DPMSolverSinglestep": 2,
    "EDMDPMSolverMultistep": 2, "FlowMatchHeunDiscrete": 2, "HeunDiscrete": 2, "IPNDM": 4, "KDPM2AncestralDiscrete": 2,
    "KDPM2Discrete": 2, "LMSDiscrete": 4, "PNDM": 6, "SASolver": 3, "UniPCMultistep": 3,
}  # fmt: skip


@pytest.mark.parametrize(("name", "config"), thinned(READ), ids=str)
def test_the_memory_walks_as_the_triangles_do(name: str, config: dict[str, Any]) -> None:
    triangles = read(made(name, config))
    memory = minimal_memory(triangles)
    generator = torch.Generator().manual_seed(0)
    x, outputs, draws = (
        torch.randn(*shape, 4, dtype=torch.float64, generator=generator)
        for shape in ((), (triangles.turns,), (len(triangles.draw_turns),))
    )
    expected = triangles.walk(x, outputs, draws)
    state, drawn = x[None], 0
    for turn, (keep, of_m, of_z) in enumerate(zip(memory.keep, memory.of_m, memory.of_z, strict=True)):
        z = draws[drawn : drawn + of_z.shape[1]]
        state, drawn = keep @ state + of_m[:, None] * outputs[turn] + of_z @ z, drawn + len(z)
        torch.testing.assert_close(state[0], expected[turn + 1], rtol=0, atol=1e-12 * float(expected.abs().max()))
    assert len(state) == 1, "a sample carries nothing more"


def test_known_schedulers_carry_what_is_known_of_them() -> None:
    for name, config in READ:
        if config == {}:
            assert minimal_memory(read(made(name, config)).with_one_draw()).vectors == CARRIED.get(name, 1), name
    orders = {name: [minimal_memory(read(made(name, {"solver_order": order}))).vectors for order in (1, 2, 3)]
              for name in ("UniPCMultistep", "DEISMultistep", "DPMSolverMultistep")}  # fmt: skip
    assert orders == {"UniPCMultistep": [2, 3, 4], "DEISMultistep": [1, 2, 3], "DPMSolverMultistep": [1, 2, 3]}
    assert minimal_memory(read(made("PNDM", {"skip_prk_steps": True}))).vectors == 4


def test_what_is_used_too_late_is_an_error() -> None:
    """Noise of turn 0 that only the last of 40 turns uses: no window of turns shows that it must be passed on."""
    zeros = torch.zeros(40, 40, dtype=torch.float64)
    of_m = torch.eye(40, dtype=torch.float64)
    of_m[-1, 0] = 1.0
    late = Triangles(zeros + torch.eye(40).double(), of_m, zeros[:, :0], (), True, zeros[0], zeros[0], zeros[0])
    with pytest.raises(ValueError, match="was not passed on"):
        minimal_memory(late)

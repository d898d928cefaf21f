"""How the kernel of `wave_update` is compiled ahead of time."""

from __future__ import annotations

import torch

from ..wave_update.kernel import LARGE_BLOCK, NUM_WARPS, REGISTERS, SMALL_BLOCK, wave_update_kernel
from .resources import Specimen


def _specimen(name: str, *, m: str = "fp16", state: str = "fp32", **features: bool | int) -> Specimen:
    pointers = {"memory": state, "m": m, "noise": state, "guidance": "fp32", "input": m, "numbers": state}
    pointers |= {"change": state, "moved": "i8", "partial": state}
    integers = ("words", "starts", "first", "measured", "ticket")
    constants: dict[str, bool | int] = {
        "HAS_M": True, "BRANCHES": 1, "GUIDED": False, "CLIPS": False, "LOOKS_BACK": False,
        "HAS_NOISE": False, "RECORDS_MOVED": False, "GATHERS": True, "INPUTS": 1, "M_DENSE": True, "INPUT_DENSE": True,
        "BLOCK": LARGE_BLOCK, "PARTS": 16,
    }  # fmt: skip
    constants |= features
    types = {f"{name}_ptr": f"*{dtype}" for name, dtype in pointers.items()}
    types |= {f"{name}_ptr": "*i32" for name in integers}
    # accesses of 16 bytes by a thread to its elements of one state, and of one row
    each = int(constants["BLOCK"]) // (32 * NUM_WARPS)
    of_state, of_row = (each * int(dtype[-2:]) // 128 for dtype in (state, m))
    # x, two jumps, the boundary an iteration before
    states = 4 + bool(constants["LOOKS_BACK"]) + bool(constants["HAS_NOISE"])
    wide = (states * of_state + constants["BRANCHES"] * of_row, of_state + constants["INPUTS"] * of_row)
    registers = REGISTERS[torch.float64 if state == "fp64" else torch.float32]
    return Specimen(name, wave_update_kernel, types, constants, NUM_WARPS, registers, wide, registers=registers)


SPECIMENS = [
    _specimen("plain"),
    _specimen("plain, small states", BLOCK=SMALL_BLOCK),
    _specimen("bfloat16, 2 branches", m="bf16", BRANCHES=2, GUIDED=True, INPUTS=2),
    _specimen("3 branches, clipped, look back", BRANCHES=3, GUIDED=True, INPUTS=3, CLIPS=True, LOOKS_BACK=True),
    _specimen("noise, clipped, float32 network", m="fp32", HAS_NOISE=True, CLIPS=True),
    _specimen("float64", m="fp64", state="fp64", BLOCK=SMALL_BLOCK, CLIPS=True, LOOKS_BACK=True, HAS_NOISE=True),
    _specimen("everything", BRANCHES=3, GUIDED=True, INPUTS=3, CLIPS=True, LOOKS_BACK=True,
              HAS_NOISE=True, RECORDS_MOVED=True),
]  # fmt: skip

"""How the kernels of `fixed_point_wave` are compiled ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from ..fixed_point_wave.mix_kernel import BLOCK, NUM_WARPS, POINTS, REDUCED, _gram, _mix, gram_block
from ..fixed_point_wave.sweep_kernel import STAGES, SWEEP_BLOCK, SWEEP_WARPS, _sweep
from .resources import Specimen


def _of_sweep(
    name: str, state: str, network: str, branches: int, most_registers: int, *, extras: bool = False
) -> Specimen:
    block = SWEEP_BLOCK[torch.float32 if state == "fp32" else torch.float64]
    constants: dict[str, Any] = {
        "ITERATES": 4, "BRANCHES": branches, "GUIDED": branches > 1, "CLIPPED": extras,
        "NOISY": extras, "MOMENTUM": extras, "GIVEN": False, "DENSE": True, "STAGES": STAGES, "BLOCK": block,
    }  # fmt: skip
    absent = {"guidance": branches == 1, "draws": not extras, "x0_prev": True}
    constants |= dict.fromkeys(name for name, is_absent in absent.items() if is_absent)
    types = dict.fromkeys(("iterates", "outputs", "guidance", "draws", "numbers"), f"*{state}")
    types |= {"m": f"*{network}", "clip": "fp64"}
    # accesses of 16 bytes by a thread to its elements of one state, and of one row
    each = block // (32 * SWEEP_WARPS)
    of_state, of_row = (each * int(dtype[2:]) // 128 for dtype in (state, network))
    # first and next point; noise
    states = 2 + 3 * extras
    wide = (states * of_state + branches * of_row, 3 * of_state)
    return Specimen(f"sweep, {name}", _sweep, types, constants, SWEEP_WARPS, most_registers, wide)


def _of_gram(history: int, most_registers: int) -> Specimen:
    block = gram_block(history)
    constants = {
        "ITERATES": history + 2, "RESIDUALS": history + 1, "H": history, "POINTS": POINTS, "COLUMNS": REDUCED // POINTS,
        "BLOCK": block,
    }  # fmt: skip
    types = dict.fromkeys(("iterates", "residuals", "weights"), "*fp32") | {"tickets": "*i32"}
    types |= {"partials": "*fp64", "prefixes": "*fp64", "regularisation": "fp64"}
    wide = ((history + 2) * block // (32 * NUM_WARPS) * 32 // 128, 0)
    # the inner products may fuse products and sums: no test compares them bit by bit
    name = f"products, {history} differences"
    return Specimen(name, _gram, types, constants, NUM_WARPS, most_registers, wide, fuses=True)


def _of_mix(history: int, network: str, inputs: int, most_registers: int) -> Specimen:
    constants: dict[str, Any] = {
        "ITERATES": max(history, 1) + 2, "RESIDUALS": history + 1, "H": history, "SCALED": True,
        "INPUTS": inputs, "INPUT_DENSE": True, "POINTS": 32, "COLUMNS": 16, "BLOCK": BLOCK,
    }  # fmt: skip
    constants |= dict.fromkeys(() if history else ("residuals", "weights"))
    tensors = ("iterates", "residuals", "weights", "level", "scale", "sample_out", "partials", "change")
    types = dict.fromkeys(tensors, "*fp32") | {"given": f"*{network}", "next_rows": "*i32", "stationary": "*i8"}
    types |= {"tickets": "*i32"}
    each = BLOCK // (32 * NUM_WARPS)
    of_state, of_row = each * 32 // 128, each * int(network[2:]) // 128
    wide = ((2 + 2 * history) * of_state, (1 + 2 * (history > 0)) * of_state + inputs * of_row)
    name = f"mixing, {history} differences, {network}"
    return Specimen(name, _mix, types, constants, NUM_WARPS, most_registers, wide)


SPECIMENS = [
    _of_sweep("2 branches", "fp32", "fp32", 2, 80),
    _of_sweep("fp16, noise, clip", "fp32", "fp16", 1, 100, extras=True),
    _of_sweep("everything, 3 branches", "fp32", "fp32", 3, 120, extras=True),
    _of_sweep("everything, float64", "fp64", "fp64", 1, 120, extras=True),
    *(_of_gram(*each) for each in ((2, 100), (5, 176))),
    *(_of_mix(*each) for each in ((0, "fp16", 1, 56), (2, "fp16", 2, 80), (5, "fp32", 1, 112))),
]

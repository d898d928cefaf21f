"""How the kernels of `secant_sweep` are compiled ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from ..secant_sweep.learn_kernel import _learn, _solve
from ..secant_sweep.sizes import MOST_PARTS, REGISTERS, sharing
from ..secant_sweep.table import LOCAL
from ..secant_sweep.walk_kernel import POINTS, STAGES, _end, _step, _walk
from .resources import Specimen

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
# of samples that several programs share
LARGE = 2**16


def _options(state: str, history: int, elements: int) -> tuple[dict[str, Any], int, bool]:
    how = sharing(elements, DTYPES[state], history)
    return (
        {"ITERATES": history + 2, "OUTPUTS": max(history, 1) + 1, "H": history, "BLOCK": how.block},
        how.warps,
        how.whole,
    )


def _largest(state: str, history: int) -> int:
    """Elements of the largest sample that one program holds."""
    elements = 64
    while sharing(2 * elements, DTYPES[state], history).whole:
        elements *= 2
    return elements


def _accesses(block: int, warps: int, state: str, network: str) -> tuple[int, int]:
    """Accesses of 16 bytes by a thread to its elements of a state, and of a row."""
    of_state, of_row = (block // (32 * warps) * int(dtype[2:]) // 128 for dtype in (state, network))
    return of_state, of_row


def _of_learn(
    name: str, state: str, network: str, history: int, branches: int, *, elements: int = 0,
    sparse: bool = True,
) -> Specimen:  # fmt: skip
    options, warps, whole = _options(state, history, elements or _largest(state, history))
    constants = options | {
        "BRANCHES": branches, "GUIDED": branches > 1, "SPARSE": sparse, "DENSE": True, "WHOLE": whole,
    }  # fmt: skip
    absent = {"guidance": branches == 1, "solved": not history or not whole, "partials": whole}
    constants |= dict.fromkeys(name for name, is_absent in absent.items() if is_absent)
    tensors = (
        "iterates",
        "outputs",
        "expected",
        "guidance",
        "numbers",
        "weights",
        "doubts",
        "solved",
        "partials",
    )
    types = dict.fromkeys(tensors, f"*{state}") | {"m": f"*{network}", "places": "*i32", "regularisation": "fp64"}
    of_state, of_row = _accesses(options["BLOCK"], warps, state, network)
    # the output before and its expected change, of the point and of four nodes; points and outputs of H waves
    states = 2 * (1 + LOCAL * sparse) + (2 * history + 1 if history else 0)
    wide = (states * of_state + branches * (1 + LOCAL * sparse) * of_row, (1 + history) * of_state)
    return Specimen(f"learning, {name}", _learn, types, constants, warps, REGISTERS, wide, registers=REGISTERS)


def _of_walk(
    name: str, state: str, network: str, history: int, inputs: int, *, extras: bool = False,
    elements: int = 0,
) -> Specimen:  # fmt: skip
    options, warps, whole = _options(state, history, elements or _largest(state, history))
    constants = options | {
        "CLIPPED": extras, "NOISY": extras, "MOMENTUM": extras, "GIVEN": False, "SCALED": True, "INPUTS": inputs,
        "INPUT_DENSE": True,
    }  # fmt: skip
    constants |= {"POINTS": POINTS, "STAGES": STAGES} if whole else {"PARTS": MOST_PARTS}
    absent = {
        "draws": not extras, "x0_prev": True, "solved": not history,
        "along_sums": not whole and not history, "x0s": not whole and not extras,
    }  # fmt: skip
    constants |= dict.fromkeys(name for name, is_absent in absent.items() if is_absent)
    tensors = (
        "iterates", "outputs", "expected", "numbers", "draws", "x0_prev", "solved", "doubts",
        "level", "scale", "sample_out", "change", "doubt", "along_sums", "moved_sums", "x0s",
    )  # fmt: skip
    types = dict.fromkeys(tensors, f"*{state}") | {"given": f"*{network}", "next_rows": "*i32", "stationary": "*i8"}
    types["clip"] = "fp64"
    of_state, of_row = _accesses(options["BLOCK"], warps, state, network)
    # the point, its output, the next point, those of H waves and noise; in a step of its own also the point as it has
    # moved, the next point in H waves, and x0 before and its change
    states = 3 + 2 * history + extras + (not whole) * (1 + history + 2 * extras)
    # the first point, the next one, what its output is expected to change by, the sample
    written = 4 + 2 * extras * (not whole)
    wide = (states * of_state, written * of_state + inputs * of_row)
    name = f"{'walk' if whole else 'step'}, {name}"
    return Specimen(name, _walk if whole else _step, types, constants, warps, REGISTERS, wide, registers=REGISTERS)


def _of_sums(kernel: Any, history: int) -> Specimen:
    """Of the launches that add up what programs have summed that share a sample."""
    constants = {"H": history, "PARTS": MOST_PARTS} if kernel is _solve else {"POINTS": POINTS, "PARTS": MOST_PARTS}
    tensors = ("numbers", "doubts", "solved", "partials", "level", "moved_sums", "change", "doubt")
    types = dict.fromkeys(tensors, "*fp32") | {"places": "*i32", "stationary": "*i8"}
    types["regularisation"] = "fp64"
    name = f"sums of points, {history} differences" if kernel is _solve else "end"
    return Specimen(name, kernel, types, constants, 1, 96, (0, 0))


SPECIMENS = [
    _of_learn("2 differences", "fp32", "fp16", 2, 1),
    _of_learn("no differences", "fp32", "fp16", 0, 2),
    _of_learn("2 differences, large", "fp32", "fp16", 2, 2, elements=LARGE),
    _of_learn("float64", "fp64", "fp64", 2, 1),
    _of_learn("5 differences, large", "fp32", "fp32", 5, 3, elements=LARGE),
    _of_learn("5 differences", "fp32", "fp32", 5, 3),
    _of_sums(_solve, 5),
    _of_walk("2 differences", "fp32", "fp16", 2, 1),
    _of_walk("no differences", "fp32", "fp16", 0, 2),
    _of_walk("float64, everything", "fp64", "fp64", 2, 1, extras=True),
    _of_walk("5 differences, everything", "fp32", "fp16", 5, 2, extras=True),
    _of_walk("2 differences", "fp32", "fp16", 2, 1, elements=LARGE),
    _of_walk("5 differences, everything", "fp32", "fp32", 5, 2, extras=True, elements=LARGE),
    _of_sums(_end, 0),
]

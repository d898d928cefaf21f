"""The kernels against eager PyTorch and against torch.compile of their references.

    python -m bench.speed.kernels --json kernels.json

Every row is checked against its reference before it is timed. Sizes go from one latent of Stable Diffusion, with so
many rows a call as the table says, to 256 MB moved by a call. On a CUDA device times are medians of graph replays,
without the host (with it: `pytest bench --benchmark-only -k kernel`); "of copy" is against a copy of as many bytes, as
caches hold a part of the smaller ones. torch.compile comes last, since it takes longest. On a CPU the functions are
their references, only the smallest size runs, and the figures mean nothing.

Bytes are the fewest that the operation can move. Aims on a GPU: 0.9 of a copy's bandwidth from 64 MB on, 6
microseconds at the latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from bench.command import parser, write
from bench.workloads.networks import DEVICE, SMALL
from srds_fast.cli.output import show_table
from srds_fast.kernels import fixed_point_wave, secant_sweep, wave_update
from srds_fast.kernels.fixed_point_wave import reference as fixed_point_wave_reference
from srds_fast.kernels.secant_sweep import reference as secant_sweep_reference
from srds_fast.kernels.wave_update import reference as wave_update_reference
from srds_fast.kernels.wave_update.traffic import traffic
from srds_fast.schedulers.steps import TensorSpec
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers import program
from srds_fast.solvers.collocation.nodes import secant_sweeps
from srds_fast.solvers.collocation.options import Collocation
from srds_fast.solvers.collocation.table import secant_table
from srds_fast.solvers.fixed_point import program as sweeps
from srds_fast.solvers.fixed_point.grid import grid_of
from srds_fast.solvers.fixed_point.options import ParaTAA
from srds_fast.solvers.wave_table import wave_table

from .timing import copy_bandwidth, device_seconds, reason

SIZES = {"SD latent": None, "16 MB": 2**24, "64 MB": 2**26, "256 MB": 2**28}
WINDOW = 10
NETWORK = wave_update.NetworkInput(torch.float16)


class Subject(NamedTuple):
    """An operation at a size.

    Attributes:
        run: as the solvers call it; returns the next input of the network.
        reference: the same with PyTorch's operations.
        memory: that both write.
        bytes: the fewest that a call moves.
        rows: of the network that it takes.
    """

    run: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    memory: Tensor
    bytes: int
    rows: int = WINDOW


def of_wave_update(moved: int | None, device: torch.device) -> Subject:
    """A steady wave of the default program at N = 100: float32 states, one half-precision row each in and out."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(100)
    waves = program.srds(100, 20, 2)
    table = wave_table(noise_table(scheduler), waves, "2m", torch.empty(1, 1, device=device))
    number = max(range(len(waves)), key=lambda wave: len(waves.waves[wave].rows)) + 1
    rows, each = table.num_rows[number], traffic(table, number, network_bytes=2).fewest
    elements = _elements(moved, each)
    m = torch.randn(rows, 1, elements, device=device).half()
    buffers = wave_update.Buffers(table, torch.empty(1, elements, device=device))
    buffers.memory.normal_()
    run = partial(wave_update.wave_update, table, number, buffers, m, network=NETWORK)
    reference = partial(wave_update_reference.wave_update, table, number, buffers, m, None, NETWORK)
    return Subject(run, reference, buffers.memory, elements * each, rows)


def of_fixed_point_wave(moved: int | None, device: torch.device) -> Subject:
    """ParaTAA's wave in the middle of a run: 10 points, two differences, one half-precision row each in and out."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(WINDOW)
    waves, spec = sweeps.fixed_point(WINDOW, WINDOW), TensorSpec(torch.float32, device, 2)
    table = grid_of(noise_table(scheduler), waves, ParaTAA(), spec, scaled=False)[0]
    each = fixed_point_wave.bytes_per_element(torch.float32, torch.float16, table.history) * WINDOW
    elements = _elements(moved, each)
    memory = fixed_point_wave.Memory(table, torch.empty(1, elements, device=device))
    for written in (memory.iterates, memory.residuals):
        written.normal_()
    m = torch.randn(WINDOW, 1, elements, device=device).half()
    wave = table.sweeps[0]

    def run() -> Tensor:
        memory.lasts[:] = [WINDOW] * table.history
        return fixed_point_wave.fixed_point_wave(table, 0, memory, m, network=NETWORK).next_input

    def reference() -> Tensor:
        memory.lasts[:] = [WINDOW] * table.history
        fixed_point_wave_reference.sweep(table, wave, memory, m, None)
        return fixed_point_wave_reference.mix(table, wave, memory, NETWORK, False).next_input

    return Subject(run, reference, memory.iterates, each * elements)


def of_secant_sweep(moved: int | None, device: torch.device) -> Subject:
    """Collocation's sweep in the middle of a run: 10 points, all rows, one half-precision row each in and out."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(WINDOW)
    options, spec = Collocation(), TensorSpec(torch.float32, device, 2)
    how = options.data_std, options.history, options.regularisation
    waves = secant_sweeps(WINDOW, WINDOW)
    table = secant_table(noise_table(scheduler), waves, *how, spec, scaled=False)
    each = secant_sweep.bytes_per_element(torch.float32, torch.float16, table.history) * WINDOW
    elements = _elements(moved, each)
    memory = secant_sweep.Memory(table, torch.empty(1, elements, device=device), None, None)
    for written in (memory.iterates, memory.outputs):
        written.normal_()
    m = torch.randn(WINDOW, 1, elements, device=device).half()

    def run() -> Tensor:
        memory.sweeps = table.history
        return secant_sweep.secant_sweep(table, 0, memory, m, network=NETWORK).next_input

    def reference() -> Tensor:
        memory.sweeps = table.history
        return secant_sweep_reference.secant_sweep(table, 0, memory, m, None, NETWORK, None, False).next_input

    return Subject(run, reference, memory.iterates, each * elements)


def _elements(moved: int | None, each: int) -> int:
    """Of a state: a latent's, or whole blocks of 1024, so that a call moves so many bytes."""
    return 4 * 64 * 64 if moved is None else math.ceil(moved / each / 1024) * 1024


SUBJECTS = {
    "wave_update": of_wave_update,
    "fixed_point_wave": of_fixed_point_wave,
    "secant_sweep": of_secant_sweep,
}


def checked(subject: Subject) -> None:
    """Raise AssertionError where the operation differs from its reference: what is wrong is not timed."""
    start, written = subject.memory.clone(), []
    for call in (subject.reference, subject.run):
        subject.memory.copy_(start)
        entering = call()
        written.append((subject.memory.clone(), entering.float()))
    subject.memory.copy_(start)
    torch.testing.assert_close(written[1], written[0], rtol=2e-3, atol=2e-3)


def measured(name: str, size: str) -> dict[str, Any]:
    """One row of the table; times in seconds. "compiled" is not known yet."""
    subject = SUBJECTS[name](SIZES[size], DEVICE)
    checked(subject)
    seconds, moved = device_seconds(subject.run), subject.bytes
    row = {"operation": name, "size": size, "bytes": moved, "rows": subject.rows, "seconds": seconds}
    row |= {"eager": device_seconds(subject.reference), "compiled": None, "bytes_per_second": moved / seconds}
    return {**row, "of_copy": moved / seconds / copy_bandwidth(moved // 2)}


def cells(row: dict[str, Any]) -> dict[str, object]:
    seconds, compiled = row["seconds"], row["compiled"]
    return {
        **{name: row[name] for name in ("operation", "size", "rows")},
        "us": f"{1e6 * seconds:.1f}",
        "GB/s": f"{row['bytes_per_second'] / 1e9:.0f}",
        "of copy": row["of_copy"],
        "x eager": row["eager"] / seconds,
        "x compiled": None if compiled is None else compiled / seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.speed.kernels", __doc__)
    found.add_argument("--sizes", nargs="*", choices=list(SIZES), default=["SD latent"] if SMALL else list(SIZES))
    options = found.parse_args(arguments)
    ceiling = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for name in SUBJECTS:
        for size in options.sizes:
            rows.append(measured(name, size))
            write(options.json, copy_bytes_per_second=ceiling, rows=rows)
    if not SMALL:
        for row in sorted(rows, key=lambda row: -row["bytes"]):
            subject = SUBJECTS[row["operation"]](SIZES[row["size"]], DEVICE)
            try:
                row["compiled"] = device_seconds(torch.compile(subject.reference, dynamic=False))
            except Exception as why:  # whatever a compiler raises
                print(f"torch.compile of {row['operation']}, {row['size']} failed: {reason(why)}")
            write(options.json, copy_bytes_per_second=ceiling, rows=rows)
    where = "a CPU, whose figures mean nothing" if SMALL else torch.cuda.get_device_name()
    title = f"{where}, a copy of 256 MB: {ceiling / 1e9:.0f} GB/s"
    show_table([cells(row) for row in rows], text=["operation"], title=title)


if __name__ == "__main__":
    main()

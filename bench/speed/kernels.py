"""The kernels against eager PyTorch and against torch.compile of their references.

    python -m bench.speed.kernels --json kernels.json

Every row is checked against its reference before it is timed. Sizes go from one latent of Stable Diffusion, with so
many rows a call as the table says, to 256 MB moved by a call. On a CUDA device times are medians of graph replays,
without the host; "called" is a call from Python, host included; "of copy" is against a copy of as many bytes, as caches
hold a part of the smaller ones. torch.compile comes last, since it takes longest. On a CPU the functions are their
references, only the smallest size runs, and the figures mean nothing.

Bytes are the fewest that the operation can move. Aims on a GPU: 0.9 of a copy's bandwidth from 64 MB on, 6
microseconds at the latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from bench.command import Table, parser, writable, write
from bench.workloads.networks import DEVICE
from srds_fast.kernels import fixed_point_wave, wave_update
from srds_fast.kernels.fixed_point_wave import reference as fixed_point_wave_reference
from srds_fast.kernels.wave_update import reference as wave_update_reference
from srds_fast.kernels.wave_update.traffic import traffic
from srds_fast.schedulers.steps import TensorSpec
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers import program
from srds_fast.solvers.fixed_point import program as sweeps
from srds_fast.solvers.fixed_point.grid import grid_of
from srds_fast.solvers.fixed_point.options import ParaTAA
from srds_fast.solvers.wave_table import wave_table

from . import timing
from .timing import reason

LATENT = 4 * 64 * 64
SIZES = {"SD latent": None, "16 MB": 2**24, "64 MB": 2**26, "256 MB": 2**28}
# the order in which they are compiled: what the aims are about comes first
COMPILED = ("SD latent", "256 MB", "64 MB", "16 MB")
WINDOW = 10


class Subject(NamedTuple):
    """An operation at a size.

    Attributes:
        run: as the solvers call it.
        reference: the same with PyTorch's operations.
        results: tensors written, to compare the two.
        bytes: the fewest that a call moves.
        rows: of the network that it takes.
        reset: puts back what calls read and write.
    """

    run: Callable[[], object]
    reference: Callable[[], object]
    results: Callable[[], list[Tensor]]
    bytes: int
    rows: int = WINDOW
    reset: Callable[[], object] = lambda: None


def of_wave_update(moved: int | None, device: torch.device) -> Subject:
    """A steady wave of the default program at N = 100: float32 states, one half-precision row each in and out."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(100)
    waves = program.srds(100, 20, 2)
    state = torch.empty(1, 1, device=device)
    table = wave_table(noise_table(scheduler), waves, "2m", state)
    number = max(range(len(waves)), key=lambda wave: len(waves.waves[wave].rows)) + 1
    rows = table.num_rows[number]
    elements = _elements(moved, traffic(table, number, network_bytes=2).fewest)
    network = wave_update.NetworkInput(torch.float16)
    m = torch.randn(rows, 1, elements, device=device).half()
    start = torch.randn(table.num_slots, 1, elements, device=device)
    buffers = wave_update.Buffers(table, start[0])
    given: list[Tensor] = []

    def results() -> list[Tensor]:
        return [buffers.memory.clone(), given[-1].float()]

    def run() -> None:
        given[:] = [wave_update.wave_update(table, number, buffers, m, network=network)]

    def reference() -> None:
        given[:] = [wave_update_reference.wave_update(table, number, buffers, m, None, network)]

    def reset() -> None:
        buffers.memory.copy_(start)

    return Subject(run, reference, results, elements * traffic(table, number, network_bytes=2).fewest, rows, reset)


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
    network, wave = wave_update.NetworkInput(torch.float16), table.sweeps[0]
    given: list[Tensor] = []

    def results() -> list[Tensor]:
        return [memory.iterates.clone(), given[0].float()]

    def run() -> None:
        memory.lasts[:] = [WINDOW] * table.history
        given[:] = [fixed_point_wave.fixed_point_wave(table, 0, memory, m, network=network).next_input]

    def reference() -> None:
        memory.lasts[:] = [WINDOW] * table.history
        fixed_point_wave_reference.sweep(table, wave, memory, m, None)
        given[:] = [fixed_point_wave_reference.mix(table, wave, memory, network, False).next_input]

    return Subject(run, reference, results, each * elements)


def _elements(moved: int | None, each: int) -> int:
    """Of a state, so that a call moves so many bytes; whole blocks of 1024."""
    return LATENT if moved is None else math.ceil(moved / each / 1024) * 1024


SUBJECTS = {
    "wave_update": of_wave_update,
    "fixed_point_wave": of_fixed_point_wave,
}


def checked(subject: Subject) -> None:
    """Refuse to time what is wrong."""
    written = []
    for call in (subject.reference, subject.run):
        subject.reset()
        call()
        written.append(subject.results())
    for expected, found in zip(*written, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


TABLE = Table(
    ("operation", -16), ("size", 9), ("rows", 0), ("us", 7), ("GB/s", 5), ("of copy", 0), ("x eager", 0),
    ("x compiled", 0), ("called us", 9), ("x eager", 0),
)  # fmt: skip


def measured(name: str, size: str) -> dict[str, Any]:
    """One row of the table; times in seconds, None where there is no GPU. "compiled" is not known yet."""
    subject = SUBJECTS[name](SIZES[size], DEVICE)
    checked(subject)
    on_gpu = DEVICE.type == "cuda"
    calls = 200 if on_gpu else 3
    row: dict[str, Any] = {
        "operation": name,
        "size": size,
        "bytes": subject.bytes,
        "rows": subject.rows,
        "called": timing.called_seconds(subject.run, DEVICE, calls),
        "eager_called": timing.called_seconds(subject.reference, DEVICE, calls),
    }
    row |= dict.fromkeys(("seconds", "eager", "compiled", "bytes_per_second", "of_copy"))
    if on_gpu:
        row["seconds"] = timing.gpu_seconds(subject.run)
        row["eager"] = timing.gpu_seconds(subject.reference)
        row["bytes_per_second"] = subject.bytes / row["seconds"]
        row["of_copy"] = row["bytes_per_second"] / timing.copy_bandwidth(subject.bytes // 2)
    return row


def compiled_seconds(name: str, size: str) -> float:
    """Of the reference, compiled for this size alone."""
    return timing.gpu_seconds(torch.compile(SUBJECTS[name](SIZES[size], DEVICE).reference, dynamic=False))


def line(row: dict[str, Any]) -> str:
    on_device: list[Any] = [None] * 5
    if row["seconds"] is not None:
        compiled = None if row["compiled"] is None else row["compiled"] / row["seconds"]
        times = f"{1e6 * row['seconds']:.1f}", f"{row['bytes_per_second'] / 1e9:.0f}", row["of_copy"]
        on_device = [*times, row["eager"] / row["seconds"], compiled]
    called = f"{1e6 * row['called']:.1f}", row["eager_called"] / row["called"]
    return TABLE.line(row["operation"], row["size"], row["rows"], *on_device, *called)


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    on_gpu = DEVICE.type == "cuda"
    found = parser("bench.speed.kernels", __doc__)
    found.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES) if on_gpu else ["SD latent"])
    found.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the references")
    found.add_argument("--json", type=writable)
    options = found.parse_args(arguments)
    ceiling = timing.copy_bandwidth() if on_gpu else None
    rows: list[dict[str, Any]] = []
    for name in SUBJECTS:
        for size in options.sizes:
            rows.append(measured(name, size))
            write(options.json, copy_bytes_per_second=ceiling, rows=rows)
    if on_gpu and not options.no_compile:
        for row in sorted(rows, key=lambda row: COMPILED.index(row["size"])):
            try:
                row["compiled"] = compiled_seconds(row["operation"], row["size"])
            except Exception as why:  # whatever a compiler raises
                print(f"torch.compile of {row['operation']}, {row['size']} failed: {reason(why)}")
            write(options.json, copy_bytes_per_second=ceiling, rows=rows)
    if ceiling is not None:
        print(f"{torch.cuda.get_device_name()}, a copy of 256 MB: {ceiling / 1e9:.0f} GB/s")
    print(TABLE.heading, *map(line, rows), sep="\n")


if __name__ == "__main__":
    main()

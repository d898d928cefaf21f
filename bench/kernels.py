"""The kernels against eager PyTorch and against torch.compile of their references.

    python -m bench.kernels                        # the table: bandwidth, fraction of a copy's, ratios
    python -m bench.kernels --json kernels.json
    pytest bench --benchmark-only -k kernels       # one benchmark for each way to do it, see README.md

Every row is checked against its reference before it is timed. Sizes go from one SD latent, of which a call has so many
rows as the table says, to 256 MB moved by a call. On a CUDA device times are medians of graph replays, without the
host; "called" is a call from Python, host included; "of copy" is against a copy that moves as many bytes, as caches
hold a part of the smaller ones. On the CPU the functions are their references, and only the smallest size runs: what is
measured there means nothing, but that it runs. torch.compile comes last, after all rows, since it takes longest.

Bytes are the fewest that the operation can move. Aims on a GPU: 0.9 of a copy's bandwidth from 64 MB on, 6
microseconds at the latent.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from srds_fast.kernels import wave_update
from srds_fast.kernels.wave_update import reference as wave_update_reference
from srds_fast.kernels.wave_update.traffic import traffic
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers import program
from srds_fast.solvers.fixed_point import program as sweeps
from srds_fast.solvers.wave_table import wave_table
from srds_fast.telemetry.environment import environment

from . import timing

LATENT = 4 * 64 * 64
SIZES = {"SD latent": None, "16 MB": 2**24, "64 MB": 2**26, "256 MB": 2**28}
# in which they are compiled: what the aims are about first
COMPILED = ("SD latent", "256 MB", "64 MB", "16 MB")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        given[:] = [wave_update_reference.wave_update(table, number, buffers, m, None, network, None)]

    def reset() -> None:
        buffers.memory.copy_(start)

    return Subject(run, reference, results, elements * traffic(table, number, network_bytes=2).fewest, rows, reset)


def of_fixed_point_wave(moved: int | None, device: torch.device) -> Subject:
    """ParaTAA's wave in the middle of a run: 10 points, two differences, one half-precision row each in and out."""
    # here: a commit that lacks it can still be compared in the others
    from srds_fast.kernels import fixed_point_wave
    from srds_fast.kernels.fixed_point_wave import reference as wave_reference
    from srds_fast.schedulers.steps import Like
    from srds_fast.solvers.fixed_point.grid import grid_of
    from srds_fast.solvers.fixed_point.options import ParaTAA

    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(WINDOW)
    waves, like = sweeps.fixed_point(WINDOW, WINDOW), Like(torch.float32, device, 2)
    table = grid_of(noise_table(scheduler), waves, ParaTAA(), like, scaled=False).table
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
        wave_reference.sweep(table, wave, memory, m, None)
        given[:] = [wave_reference.mix(table, wave, memory, network, False).next_input]

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


def measured(name: str, size: str, device: torch.device) -> dict[str, Any]:
    """One row of the table; times in seconds, None where there is no GPU. "compiled" is not known yet."""
    subject = SUBJECTS[name](SIZES[size], device)
    checked(subject)
    calls = 200 if device.type == "cuda" else 3
    row: dict[str, Any] = {
        "operation": name,
        "size": size,
        "bytes": subject.bytes,
        "rows": subject.rows,
        "called": timing.called_seconds(subject.run, device, calls),
        "eager_called": timing.called_seconds(subject.reference, device, calls),
    }
    row |= dict.fromkeys(("seconds", "eager", "compiled", "bytes_per_second", "of_copy"))
    if device.type == "cuda":
        row["seconds"] = timing.gpu_seconds(subject.run)
        row["eager"] = timing.gpu_seconds(subject.reference)
        row["bytes_per_second"] = subject.bytes / row["seconds"]
        row["of_copy"] = row["bytes_per_second"] / timing.copy_bandwidth(subject.bytes // 2)
    return row


def compiled_seconds(name: str, size: str, device: torch.device) -> float:
    """Of the reference, compiled for this size alone."""
    return timing.gpu_seconds(torch.compile(SUBJECTS[name](SIZES[size], device).reference, dynamic=False))


def _line(row: dict[str, Any]) -> str:
    on_device = "        -      -        -       -"
    if row["seconds"] is not None:
        on_device = (
            f"{1e6 * row['seconds']:9.1f}{row['bytes_per_second'] / 1e9:7.0f}"
            f"{row['of_copy']:9.2f}{row['eager'] / row['seconds']:7.2f}x"
        )
    called = f"{1e6 * row['called']:11.1f}{row['eager_called'] / row['called']:7.2f}x"
    return f"{row['operation']:17}{row['size']:>10}{row['rows']:6}{on_device}{called}"


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = DEVICE.type == "cuda"
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES) if on_gpu else ["SD latent"])
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the references")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    ceiling = timing.copy_bandwidth() if on_gpu else None
    if ceiling is not None:
        print(f"{torch.cuda.get_device_name()}, a copy of 256 MB: {ceiling / 1e9:.0f} GB/s\n")
    rows: list[dict[str, Any]] = []

    def write() -> None:
        if options.json is not None:  # after each row, so that a run cut short leaves what it has
            found = {"environment": environment(), "copy_bytes_per_second": ceiling, "rows": rows}
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    titles = {"": 17, "size": 10, "rows": 6, "us": 9, "GB/s": 7, "of copy": 9, "eager": 8, "called us": 11}
    print("".join(f"{title:>{width}}" for title, width in titles.items()) + f"{'eager':>8}")
    for name in SUBJECTS:
        for size in options.sizes:
            rows.append(measured(name, size, DEVICE))
            print(_line(rows[-1]), flush=True)
            write()
    if options.no_compile or not on_gpu:
        return
    print("\ntorch.compile of the reference, times what the kernel takes")
    for row in sorted(rows, key=lambda row: COMPILED.index(row["size"])):
        try:
            row["compiled"] = compiled_seconds(row["operation"], row["size"], DEVICE)
            told = f"{row['compiled'] / row['seconds']:.2f}x"
        except Exception as why:  # whatever a compiler raises
            told = f"failed: {type(why).__name__}: {' '.join(str(why).split())[:200]}"
        print(f"{row['operation']:17}{row['size']:>10}  {told}", flush=True)
        write()


if __name__ == "__main__":
    main()

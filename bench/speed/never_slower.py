"""What method="auto" costs where no parallel method can win: a compute-bound UNet, against the sequential loop.

    python -m bench.speed.never_slower --steps 25 --json never.json

A pixel UNet whose calls keep the device busy on their own, batch 1. Both are called in turn, medians count. The first
call of "auto", which measures c(rows), is told apart.
"""

from __future__ import annotations

import statistics

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

import srds_fast
from bench.command import parser, writable, write
from bench.workloads.networks import DEVICE

from .timing import Stopwatch


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    found = parser("bench.speed.never_slower", __doc__)
    found.add_argument("--steps", type=int, default=25)
    found.add_argument("--size", type=int, default=64, help="of the image")
    found.add_argument("--rounds", type=int, default=9)
    found.add_argument("--json", type=writable)
    options = found.parse_args(arguments)
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=options.size, block_out_channels=(64, 128, 128), layers_per_block=2,
                       down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3).to(DEVICE)  # fmt: skip
    scheduler, x = DDIMScheduler(), torch.randn(1, 3, options.size, options.size, device=DEVICE)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = unet(x, t).sample
        return output

    def timed(method: str) -> tuple[float, srds_fast.Report]:
        with Stopwatch() as watch:
            report = srds_fast.sample(denoiser, x, scheduler, options.steps, method=method).report
        return watch.seconds, report

    first, report = timed("auto")
    timed("sequential")
    times: dict[str, list[float]] = {"sequential": [], "auto": []}
    for _ in range(options.rounds):
        for method, each in times.items():
            each.append(timed(method)[0])
    sequential, auto = (statistics.median(each) for each in times.values())
    print(f"auto over sequential: {auto / sequential:.4f} (medians {1e3 * auto:.1f} and {1e3 * sequential:.1f} ms)")
    print(f"first call of auto: {first:.2f} s, of which {report.planning_seconds:.2f} s to measure and choose")
    print(f"ran: {report.method}; {report.plan_reason}")
    write(options.json, steps=options.steps, first=first, times=times, report=report.to_dict())


if __name__ == "__main__":
    main()

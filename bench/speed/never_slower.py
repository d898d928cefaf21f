"""What method="auto" costs where no parallel method can win: a compute-bound UNet, against the sequential loop.

    python -m bench.speed.never_slower --steps 25 --json never.json

A pixel UNet whose calls keep the device busy on their own, batch 1. Both are called in turn, medians count. The first
two calls of "auto", which measure c(rows), are told apart.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

from bench.command import parser, write
from bench.runner import AUTO, SEQUENTIAL, measured, table, told
from bench.workloads.networks import placed
from bench.workloads.pipelines import random
from bench.workloads.problems import Problem
from bench.workloads.samplers import SAMPLES, SampledWorkload


class Pixels(UNet2DModel):
    """It returns a tensor."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = super().forward(x, t).sample
        return output


def main(arguments: list[str] | None = None) -> None:
    found = parser("bench.speed.never_slower", __doc__)
    found.add_argument("--steps", type=int, default=25)
    found.add_argument("--size", type=int, default=64, help="of the image")
    found.add_argument("--rounds", type=int, default=9, help=f"calls of each, at most {SAMPLES}")
    options = found.parse_args(arguments)
    torch.manual_seed(0)
    x = random((SAMPLES, 3, options.size, options.size))
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    network = Pixels(sample_size=options.size, block_out_channels=(64, 128, 128), **blocks)
    samples = Problem("pixels", placed(network, torch.float32), x, {}, DDIMScheduler())
    workload = SampledWorkload(samples, trained=False)
    every = [told(workload, options.steps, name, method=name) for name in (SEQUENTIAL, AUTO)]
    *_, rows = measured("pixels", workload, options.steps, options.rounds, every)
    print(*table(rows), sep="\n")
    sequential, auto = every
    if auto.loop is not None and sequential.loop is not None:
        print(f"auto over sequential: {auto.median / sequential.median:.4f}; {auto.loop.report().plan_reason}")
        print(f"the first two calls: {auto.first_calls:.2f} s of auto, {sequential.first_calls:.2f} s of sequential")
    write(options.json, results=rows, first_calls=auto.first_calls, reports=[each.to_dict() for each in auto.reports])


if __name__ == "__main__":
    main()

"""What method="auto" costs where no parallel method can win: a compute-bound UNet, against the sequential loop.

    python -m bench.speed.never_slower --steps 25 --json never.json

A pixel UNet whose calls keep the device busy on their own, batch 1. Both are called in turn, medians count. The first
two calls of "auto", which measure c(rows), are told apart.
"""

from __future__ import annotations

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from bench.command import parser, write
from bench.runner import AUTO, SEQUENTIAL, measured, show, told
from bench.workloads.samplers import PipelineWorkload


def main(arguments: list[str] | None = None) -> None:
    found = parser("bench.speed.never_slower", __doc__)
    found.add_argument("--steps", type=int, default=25)
    found.add_argument("--size", type=int, default=64, help="of the image")
    found.add_argument("--rounds", type=int, default=9, help="calls of each")
    options = found.parse_args(arguments)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    network = UNet2DModel(sample_size=options.size, block_out_channels=(64, 128, 128), **blocks)
    workload = PipelineWorkload(DDIMPipeline(network, DDIMScheduler()), lambda _: {"output_type": "pt"})
    every = [told(workload, options.steps, name, method=name) for name in (SEQUENTIAL, AUTO)]
    *_, rows = measured("pixels", workload, options.steps, options.rounds, every)
    show(rows)
    sequential, auto = every
    if auto.loop is not None and sequential.loop is not None:
        print(f"auto over sequential: {auto.median / sequential.median:.4f}; {auto.loop.report().plan_reason}")
        print(f"the first two calls: {auto.first_calls:.2f} s of auto, {sequential.first_calls:.2f} s of sequential")
    write(options.json, results=rows, first_calls=auto.first_calls, reports=[each.to_dict() for each in auto.reports])


if __name__ == "__main__":
    main()

"""What method="auto" costs where no parallel method can win: a compute-bound UNet, against the sequential loop.

    python -m bench.never_slower                    # 25 steps, batch 1
    python -m bench.never_slower --json never.json

A pixel UNet of the real class whose calls keep the device busy on their own. Loops take turns; of their times the
median counts. The first call of "auto", which measures c(rows), is apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel

import srds_fast
from srds_fast.telemetry.environment import environment

ROUNDS = 9


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--size", type=int, default=64, help="of the image")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = UNet2DModel(sample_size=options.size, block_out_channels=(64, 128, 128), layers_per_block=2,
                       down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3).to(device)  # fmt: skip
    scheduler, x = DDIMScheduler(), torch.randn(1, 3, options.size, options.size, device=device)

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = unet(x, t).sample
        return output

    def timed(method: str) -> tuple[float, srds_fast.Report]:
        started = time.perf_counter()
        report = srds_fast.sample(denoiser, x, scheduler, options.steps, method=method).report
        return time.perf_counter() - started, report

    first, report = timed("auto")
    timed("sequential")
    times: dict[str, list[float]] = {"sequential": [], "auto": []}
    for _ in range(options.rounds):
        for method, each in times.items():
            each.append(timed(method)[0])
    sequential, auto = (statistics.median(each) for each in times.values())
    print(f"auto over sequential: {auto / sequential:.4f} (medians {1e3 * auto:.1f} and {1e3 * sequential:.1f} ms)")
    print(f"fastest calls: {min(times['auto']) / min(times['sequential']):.4f}")
    print(f"first call of auto: {first:.2f} s, {report.planning_seconds:.2f} of them to measure and choose")
    print(f"ran: {report.method}; {report.plan_reason}")
    if options.json is not None:
        found = {"environment": environment(), "steps": options.steps, "first": first, "times": times}
        options.json.write_text(json.dumps({**found, "report": report.to_dict()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

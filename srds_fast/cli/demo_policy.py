"""The part of `srds-fast demo` with the bundled robot policy: its own loop against `method="auto"`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .. import zoo
from ..planner.exploration import STOCK
from ..sampling.sample import sample
from ..solvers.registry import AUTO
from ..telemetry.report import Report
from ..words import counted

# untimed calls of "auto", which time its plans; a choice that is still open after the first is asked for again
FEWEST_WARM_UPS, MOST_WARM_UPS = 2, 6
PAIRS = 3
# a ratio between these is no difference
EQUAL = 1.05


@dataclass(frozen=True)
class PolicyDemo:
    """What the demo measured.

    Attributes:
        steps: of the scheduler.
        stock_seconds, auto_seconds: of each pair of calls, made one after the other on the same state and noise.
        ratio: the median over the pairs of stock_seconds / auto_seconds; over 1, "auto" is faster.
        max_difference: of an action of the two; actions are points of a plane that is 2 wide.
        warm_up_seconds: of the untimed calls of "auto" beyond what as many stock calls take.
        pays_back_after: calls after which the time saved exceeds `warm_up_seconds`; None if none is saved.
        report: of the last call of "auto".
    """

    steps: int
    stock_seconds: list[float]
    auto_seconds: list[float]
    ratio: float
    max_difference: float
    warm_up_seconds: float
    pays_back_after: int | None
    report: Report

    @property
    def wins(self) -> bool:
        """Whether "auto" is faster by more than the times vary."""
        return self.ratio > EQUAL

    def __str__(self) -> str:
        stock, auto = (statistics.median(each) for each in (self.stock_seconds, self.auto_seconds))
        head = f"Robot policy, {self.steps} DDIM steps, one robot, medians of {counted(len(self.auto_seconds), 'call')}"
        own = self.report.method == STOCK
        work = "the same loop" if own else f"{self.report.method}, {counted(self.report.waves, 'wave')}"
        lines = [f"own loop {stock:.3f} s, auto {auto:.3f} s ({work}), actions differ by {self.max_difference:.1g}"]
        if own:
            lines.append("nothing gained here: auto runs the own loop, as it found nothing faster")
        elif self.wins and self.pays_back_after is not None:
            after = counted(self.pays_back_after, "call")
            cost = f"choosing the plan took {self.warm_up_seconds:.2f} s more and pays back after {after}"
            lines.append(f"{self.ratio:.1f} times faster; {cost}")
        else:
            lines.append(f"nothing gained here: auto takes {1 / self.ratio:.2f} times as long as the own loop")
        return "\n".join((f"{head}:", *(f"  {line}" for line in lines)))


def policy_demo(steps: int = 100, device: str | torch.device = "cpu") -> PolicyDemo:
    """Let the bundled policy decide by its own loop and by `method="auto"`, in turn.

    Args:
        steps: of DDIM, 1 to 100.
        device: of the policy.
    """
    policy = zoo.load("policy").to(device)
    policy.noise_scheduler = scheduler = DDIMScheduler.from_config(policy.noise_scheduler.config)
    policy.num_inference_steps = steps
    observation = torch.tensor([policy.task(seed=0).observation()], device=device)
    shape = 1, policy.config.horizon, policy.config.action_dim
    reports: list[Report] = []

    def stock(noise: Tensor) -> Tensor:
        return policy.chunk(policy.conditional_sample(1, observation.flatten(1), noise=noise)).cpu()

    def auto(noise: Tensor) -> Tensor:
        cond = {"observation": observation}
        found = sample(policy.denoiser, noise, scheduler, steps, cond=cond, method=AUTO, parallel="auto")
        reports.append(found.report)
        return policy.chunk(found.sample).cpu()  # the copy waits for the device

    def timed(call: Callable[[Tensor], Tensor], seed: int) -> tuple[float, Tensor]:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        begun = time.perf_counter()
        found = call(noise)
        return time.perf_counter() - begun, found

    timed(stock, 0)
    warm_ups: list[float] = []
    while len(warm_ups) < FEWEST_WARM_UPS or (reports[-1].plan_state == "exploring" and len(warm_ups) < MOST_WARM_UPS):
        warm_ups.append(timed(auto, len(warm_ups))[0])
    theirs: list[float] = []
    ours: list[float] = []
    differences: list[float] = []
    for seed in range(PAIRS):
        (one, expected), (other, found) = timed(stock, seed), timed(auto, seed)
        theirs.append(one)
        ours.append(other)
        differences.append(float((found - expected).abs().max()))
    usual, saved = statistics.median(theirs), statistics.median(a - b for a, b in zip(theirs, ours, strict=True))
    cost = max(0.0, sum(warm_ups) - len(warm_ups) * usual)
    return PolicyDemo(
        steps,
        theirs,
        ours,
        statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
        max(differences),
        cost,
        math.ceil(cost / saved) if saved > 0 else None,
        reports[-1],
    )

"""What the training recipes share: the optimiser with its learning rates, averaged weights, checkpoints, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .. import progress
from ..files import new_file

CHECKPOINT_EVERY = 250  # steps


def averaged(trained: nn.Module, decay: float) -> AveragedModel:
    """A moving average of the weights; it forgets faster at the beginning."""

    def mean_of(mean: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
        done = int(count) + 1
        return mean.lerp(new, 1 - min(decay, done / (done + 10)))

    return AveragedModel(trained, avg_fn=mean_of)


def optimise(
    trained: nn.Module,
    loss_of_step: Callable[[], Tensor],
    steps: int,
    horizon: int,
    rate: float,
    label: str,
    average: AveragedModel | None = None,
    checkpoint: Path | None = None,
) -> float:
    """Minimise a loss by AdamW with a short warm-up and a cosine decay; returns the running mean of the loss.

    Shows steps, loss and the time left.

    Args:
        loss_of_step: may draw from torch's global generator.
        steps: taken; the learning rate would reach zero after `horizon` steps.
        average: of the weights, updated after every step.
        checkpoint: a file that is written every 250 steps. If it is there at the start, training goes on from it, and
            ends with the same weights as without the interruption.
    """
    parameters = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    warm_up = min(200, horizon // 10 + 1)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(step / horizon, 1.0)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    parts: dict[str, Any] = {"trained": trained, "optimizer": optimizer, "schedule": schedule}
    if average is not None:
        parts["average"] = average
    begin, mean = 0, math.nan
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        begin, mean = saved["step"], saved["mean"]
        torch.set_rng_state(saved["random"])
    started = time.perf_counter()
    with progress.bar(label, steps, unit="step") as bar:
        bar.update(begin)
        for done in range(begin + 1, steps + 1):
            loss = loss_of_step()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            mean = loss.item() if math.isnan(mean) else 0.99 * mean + 0.01 * loss.item()
            if average is not None:
                average.update_parameters(trained)
            bar.update()
            if done % 100 == 0 or done == steps:
                bar.set_postfix(loss=f"{mean:.5f}")
                if bar.disable:  # for a log file
                    print(f"{label} {done}/{steps}  loss {mean:.5f}  {time.perf_counter() - started:.0f} s", flush=True)
            if checkpoint is not None and done % CHECKPOINT_EVERY == 0:
                states = {name: part.state_dict() for name, part in parts.items()}
                with new_file(checkpoint) as unfinished:
                    torch.save({**states, "step": done, "mean": mean, "random": torch.get_rng_state()}, unfinished)
    return mean

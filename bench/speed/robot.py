"""A robot policy, one decision at a time: LeRobot's own loop side by side with the compiled policy.

    python -m bench.speed.robot --decisions 20

The network is the bundled one, trained for the push task. Where LeRobot can be imported its own DiffusionModel holds
the weights, and its own loop is compared with; elsewhere the bundled policy takes its place, whose loop is the same. An
episode runs, and for every observation all ways decide in turn, with the same noise. The first decisions are not
counted: "auto" times plans in them. "ratio" is the median over the decisions of the loop's time over that of the way.
"""

from __future__ import annotations

import statistics
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import srds_fast
from bench.command import parser, revision, write
from bench.quality.policy import SCHEDULERS
from bench.speed.timing import timed
from srds_fast import zoo
from srds_fast.cli.output import show_table
from srds_fast.methods import METHODS
from srds_fast.zoo.push_policy import PushPolicy

ROOT = Path(__file__).parents[2]
WARM_UP = 5
LOOP = "own loop"
TIMED = "auto", "srds", "collocation", "parataa", "speculative"
WAYS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS if method in TIMED},
    "collocation, from the last chunk": {"method": "collocation", "warm_start": "previous"},
}


def model_of(policy: PushPolicy) -> tuple[str, Any]:
    """LeRobot's DiffusionModel with the weights of the policy, or the policy itself; and which of the two."""
    try:
        from lerobot.configs import FeatureType, PolicyFeature
        from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionModel
    except ImportError:
        return "the bundled policy", policy
    ours = policy.config
    same = "n_obs_steps", "horizon", "n_action_steps", "down_dims", "kernel_size", "n_groups", "clip_sample"
    also = "diffusion_step_embed_dim", "use_film_scale_modulation", "num_train_timesteps", "beta_schedule"
    config = DiffusionConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (ours.state_dim - 2,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ours.action_dim,))},
        device="cpu",
        **{name: getattr(ours, name) for name in (*same, *also)},
    )
    model = DiffusionModel(config).eval()
    model.unet.load_state_dict(policy.unet.state_dict())
    return "LeRobot's DiffusionModel", model


def decisions(policy: PushPolicy, count: int) -> Generator[Tensor, Tensor, None]:
    """Conditions [1, n_obs_steps * state_dim] of episodes; is sent the chunk that is carried out."""
    seed = 0
    task = policy.task(seed)
    for _ in range(count):
        if task.done:
            seed += 1
            task = policy.task(seed)
        chunk = yield torch.tensor([task.observation()]).flatten(1)
        task.run(policy.chunk(chunk)[0].tolist())


def measured(name: str, steps: int, count: int) -> tuple[str, list[dict[str, Any]]]:
    """One row for each way. name: of the scheduler."""
    policy = zoo.load("policy")
    whose, model = model_of(policy)
    model.noise_scheduler = SCHEDULERS[name].from_config(policy.noise_scheduler.config)
    model.num_inference_steps = steps
    ways = {LOOP: model, **{way: srds_fast.compile(model, **settings) for way, settings in WAYS.items()}}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    differences: dict[str, list[float]] = {way: [] for way in ways}
    reports: dict[str, list[Any]] = {way: [] for way in ways}
    episodes = decisions(policy, WARM_UP + count)
    condition = next(episodes)
    for number in range(WARM_UP + count):
        chunks = {}
        for way, each in ways.items():
            torch.manual_seed(number)
            with torch.no_grad():
                taken, chunks[way] = timed(lambda each=each, given=condition: each.conditional_sample(1, given))
            if number >= WARM_UP:
                seconds[way].append(taken)
                differences[way].append(float((chunks[way] - chunks[LOOP]).abs().mean()))
                reports[way].append(getattr(each, "report", None))
        if number + 1 < WARM_UP + count:
            condition = episodes.send(chunks[LOOP])
    rows = []
    for way in ways:
        told = [report for report in reports[way] if report is not None]
        ratios = [loop / own for loop, own in zip(seconds[LOOP], seconds[way], strict=True)]
        rows.append(
            {
                "scheduler": name,
                "way": way,
                "ran": told[-1].method if told else LOOP,
                "waves": statistics.mean(report.waves for report in told) if told else steps,
                "rows": statistics.mean(report.rows for report in told) if told else steps,
                "seconds": statistics.median(seconds[way]),
                "ratio": statistics.median(ratios),
                "largest difference": max(differences[way]),
            }
        )
    return whose, rows


def main() -> None:
    """The command."""
    found = parser("bench.speed.robot", __doc__)
    found.add_argument("--decisions", type=int, default=20, help="timed decisions of each way (default 20)")
    found.add_argument("--steps", type=int, default=100, help="of a decision (default 100)")
    options = found.parse_args()
    rows: list[dict[str, Any]] = []
    for name in SCHEDULERS:
        whose, some = measured(name, options.steps, options.decisions)
        rows += some
        about = {"whose": whose, "steps": options.steps, "decisions": options.decisions}
        write(options.json, **about, revision=revision(ROOT), threads=torch.get_num_threads(), rows=rows)
    shown = [
        {**row, "seconds": f"{row['seconds']:.3f}", "largest difference": f"{row['largest difference']:.1e}"}
        for row in rows
    ]
    title = f"{whose}, {options.steps} steps, batch 1, {options.decisions} decisions, {torch.get_num_threads()} threads"
    show_table(shown, ("scheduler", "way", "ran"), title)


if __name__ == "__main__":
    main()

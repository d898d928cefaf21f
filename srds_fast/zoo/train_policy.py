"""Train the bundled robot policy "policy" from nothing, on one processor core.

    python -m srds_fast.zoo.train_policy --out policy

policy/README.md describes task, data, network and training, and has the two tables that are printed at the end. Step
counts, not minutes, are fixed, so that two runs on one machine do the same work.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import HfArgumentParser

from .push_expert import demonstration
from .push_policy import PushPolicy
from .push_task import LIMIT
from .training import averaged, optimise
from .unet1d import PolicyConfig

CONFIG = PolicyConfig(state_dim=6, action_dim=2, down_dims=(32, 64), diffusion_step_embed_dim=64)
# demonstrations have seeds from here on; episodes of tests and evaluations have smaller ones
FIRST_DEMONSTRATION = 1_000_000


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run.

    The learning rate would reach zero after `horizon` steps. Each round begins with the full rate again, from the
    weights and the averages of the one before: a run may be made longer by rounds.
    """

    seed: int = 0
    demonstrations: int = 1500
    rounds: int = 2
    steps: int = 2000
    horizon: int = 2100
    batch: int = 64
    rate: float = 1.5e-3
    ema_decay: float = 0.995


def windows(config: PolicyConfig, demonstrations: range) -> tuple[Tensor, Tensor]:
    """Every piece of the demonstrations with these seeds that the policy could meet.

    Returns:
        Observations [n, n_obs_steps, 6] and the actions [n, horizon, 2] from the first observed step on, float32. An
        action is the way from where the pusher is at the last observed step.
        Before the first and after the last step of a demonstration that step is repeated.
    """
    observed, done = [], []
    for seed in demonstrations:
        states, targets = (torch.tensor(each) for each in demonstration(seed))
        now, last = torch.arange(len(states))[:, None], len(states) - 1
        first = 1 - config.n_obs_steps
        observed.append(states[(now + torch.arange(first, 1)).clamp(0, last)])
        planned = targets[(now + torch.arange(first, first + config.horizon)).clamp(0, last)]
        done.append(planned - states[:, None, :2])
    return torch.cat(observed), torch.cat(done)


def train(recipe: Recipe, config: PolicyConfig, checkpoint: Path | None = None) -> tuple[PushPolicy, float]:
    """The policy in evaluation mode, and its final loss (mean square of the noise)."""
    torch.manual_seed(recipe.seed)
    policy = PushPolicy(config)
    first = FIRST_DEMONSTRATION + recipe.seed * recipe.demonstrations
    observations, actions = windows(config, range(first, first + recipe.demonstrations))
    average = averaged(policy.unet, recipe.ema_decay)

    def loss_of_step() -> Tensor:
        chosen = torch.randint(len(actions), (recipe.batch,))
        times = torch.randint(config.num_train_timesteps, (recipe.batch,))
        noise = torch.randn(recipe.batch, *actions.shape[1:])
        noisy = policy.noise_scheduler.add_noise(actions[chosen], noise, times)
        return F.mse_loss(policy.denoiser(noisy, times, observations[chosen]), noise)

    loss, plan = math.nan, (recipe.steps, recipe.horizon, recipe.rate)
    for number in range(recipe.rounds):
        saved = None if checkpoint is None else checkpoint.with_suffix(f".{number}.pt")
        loss = optimise(policy.unet, loss_of_step, *plan, f"policy, round {number + 1}", average, saved)
    policy.unet.load_state_dict(average.module.state_dict())
    return policy.eval(), loss


def main() -> None:
    """Train, save, run what was saved, and print what was measured."""
    parser = HfArgumentParser(Recipe, description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the policy to")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--checkpoint", type=Path, help="to continue from, written every 250 steps, one file a round")
    recipe, arguments = parser.parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    trained, loss = train(recipe, CONFIG, arguments.checkpoint)
    seconds, processor = time.perf_counter() - started, time.process_time()
    trained.half().save_pretrained(arguments.out)

    policy = PushPolicy.from_pretrained(arguments.out)
    tasks = policy.episodes(range(100))
    arrived = [task.steps for task in tasks if task.succeeded]
    measured = {
        "parameters": f"{sum(each.numel() for each in policy.parameters()):,}",
        "training time": f"{seconds:.0f} s",
        "processor time": f"{processor:.0f} s",
        "final loss": f"{loss:.4f}",
        "success": f"{len(arrived)} of {len(tasks)} episodes of at most {LIMIT} steps",
        "steps of an episode that succeeds": f"{sum(arrived) / max(1, len(arrived)):.1f}",
    }
    for table in (asdict(recipe), measured):
        print("", *(f"| {name} | {value} |" for name, value in table.items()), sep="\n")


if __name__ == "__main__":
    main()

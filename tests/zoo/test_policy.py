"""The bundled robot policy: it does its task, `sample` is its loop, and its network is LeRobot's."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

import srds_fast
from srds_fast import InvalidArgument, zoo
from srds_fast.zoo import training
from srds_fast.zoo.push_policy import PushPolicy
from srds_fast.zoo.push_task import PushTask
from srds_fast.zoo.train_policy import CONFIG, FIRST_DEMONSTRATION, Recipe, train, windows
from srds_fast.zoo.unet1d import ConditionalUnet1d, PolicyConfig

FOLDER = Path(zoo.__file__).parent / "policy"


@pytest.fixture
def policy() -> PushPolicy:
    return zoo.load("policy")


def test_it_is_small_and_has_a_card() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000
    text = (FOLDER / "README.md").read_text()
    assert all(heading in text for heading in ("## Recipe", "## Measured", "## Licence"))
    found = zoo.load("policy", dtype=torch.float64)
    assert {each.dtype for each in found.parameters()} == {torch.float64}
    assert not any(module.training for module in found.modules())
    assert found.config == CONFIG


def test_actions_of_one_robot_and_of_several(policy: PushPolicy) -> None:
    policy.num_inference_steps = 4
    observation = policy.task(seed=1).observation()
    noise = torch.randn(3, 16, 2, generator=torch.Generator().manual_seed(0))
    several = policy([observation] * 3, torch.Generator().manual_seed(1), noise)
    assert several.shape == (3, 8, 2)
    assert policy(observation).shape == (8, 2)
    assert float(several.abs().max()) <= 1, "the scheduler clips"
    whole = policy.conditional_sample(3, torch.tensor([observation] * 3).flatten(1), None, noise)
    assert torch.equal(policy.chunk(whole), whole[:, 1:9]), "from the last observed step on"
    for wrong in (torch.zeros(2, 5), torch.zeros(1, 1, 2, 6), torch.zeros(6)):
        with pytest.raises(InvalidArgument, match="sees 2 steps of 6 numbers"):
            policy(wrong)


def test_it_pushes_the_disc_to_the_goal(policy: PushPolicy) -> None:
    policy.noise_scheduler = DDIMScheduler.from_config(policy.noise_scheduler.config)
    policy.num_inference_steps = 10
    tasks = policy.episodes(range(10))
    assert sum(task.succeeded for task in tasks) >= 6
    still = policy.episodes(range(10), lambda noise, observation, generators: torch.zeros_like(noise))
    assert not any(task.succeeded for task in still)


def test_episodes_do_not_depend_on_each_other(policy: PushPolicy) -> None:
    policy.num_inference_steps = 3
    (alone,), (_, beside) = policy.episodes([5]), policy.episodes([4, 5])
    assert (alone.steps, alone.pusher) == (beside.steps, pytest.approx(beside.pusher, abs=1e-4))


@pytest.mark.parametrize("scheduler", ["DDPM", "DDIM"])
def test_sample_is_the_loop_of_the_policy(policy: PushPolicy, scheduler: str) -> None:
    if scheduler == "DDIM":
        policy.noise_scheduler = DDIMScheduler.from_config(policy.noise_scheduler.config)
    observation = torch.tensor([policy.task(seed=2).observation()])
    noise = torch.randn(1, 16, 2, generator=torch.Generator().manual_seed(0))
    expected = policy(observation, torch.Generator().manual_seed(1), noise)
    for method, most in (("sequential", 1e-4), ("srds", 4e-3)):
        found = srds_fast.sample(
            policy.denoiser, noise, policy.noise_scheduler, 100, cond={"observation": observation}, method=method,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        assert float((policy.chunk(found.sample) - expected).abs().mean()) <= most
        assert found.report.method == method


@pytest.mark.parametrize(
    ("changed", "parameters", "names"),
    [
        ({}, 248_071_298, "03a57e4779e97755"),
        (
            {"down_dims": (16, 32), "use_film_scale_modulation": False, "kernel_size": 3, "n_groups": 4},
            195_058,
            "6c4cfcf3e680cd6d",
        ),
    ],
    ids=["defaults", "small"],
)
def test_names_and_shapes_are_those_of_lerobots_network(changed: dict[str, Any], parameters: int, names: str) -> None:
    """As its DiffusionConditionalUnet1d has them with these settings and 12 numbers observed, in order."""
    with torch.device("meta"):
        network = ConditionalUnet1d(PolicyConfig(6, 2, **changed))
    listed = "\n".join(f"{name} {tuple(value.shape)}" for name, value in network.state_dict().items())
    assert sum(each.numel() for each in network.parameters()) == parameters
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == names


def test_the_network_answers_as_lerobots_does(policy: PushPolicy) -> None:
    """The numbers are those of its DiffusionConditionalUnet1d with the bundled weights (lerobot at 7427f31)."""
    x, observation = torch.linspace(-1, 1, 32).reshape(1, 16, 2), torch.linspace(-0.5, 0.5, 12).reshape(1, 2, 6)
    with torch.no_grad():
        found = policy.denoiser(x, torch.tensor([40]), observation)
    expected = torch.tensor([[-1.5921, -1.4907], [-0.5479, -0.4648], [0.4115, 0.5133], [1.4976, 1.4855]])
    assert torch.allclose(found[0, ::5], expected, atol=2e-4)


def test_demonstrations_become_windows() -> None:
    demonstrations = range(FIRST_DEMONSTRATION, FIRST_DEMONSTRATION + 2)
    observations, actions = windows(CONFIG, demonstrations)
    assert (observations.shape[1:], actions.shape[1:], len(actions)) == ((2, 6), (16, 2), len(observations))
    assert all(map(torch.equal, windows(CONFIG, demonstrations), (observations, actions)))
    assert torch.allclose(observations[0], torch.tensor(PushTask(FIRST_DEMONSTRATION).observation()))
    assert torch.equal(actions[0, 0], actions[0, 1]), "before the first step that step is repeated"
    assert torch.equal(observations[1, 0], observations[0, 1])
    targets = actions + observations[:, -1:, :2]
    assert torch.allclose(targets[0, 2:], targets[1, 1:-1]), "actions are ways from where the pusher is"
    assert float(actions.abs().max()) < 1, "the scheduler clips to this"


def test_training_is_decided_by_its_seed_and_goes_on_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    config, recipe = replace(CONFIG, down_dims=(8, 16)), Recipe(demonstrations=1, steps=3, horizon=4, batch=4, rounds=1)
    expected, loss = train(recipe, config)
    interrupted = tmp_path / "checkpoint.pt"
    train(replace(recipe, steps=2), config, interrupted)
    resumed, again = train(recipe, config, interrupted)
    assert loss == again
    assert all(map(torch.equal, expected.state_dict().values(), resumed.state_dict().values()))
    resumed.save_pretrained(tmp_path / "saved")
    saved = PushPolicy.from_pretrained(tmp_path / "saved")
    assert saved.config == config
    assert all(map(torch.equal, saved.state_dict().values(), resumed.state_dict().values()))

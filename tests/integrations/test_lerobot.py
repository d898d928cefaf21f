"""Robot policies: the compiled one gives the actions of its own loop, and stays a policy in everything else."""

from __future__ import annotations

import copy
import pickle
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, RePaintScheduler
from promises import SAME_SAMPLE, same_law
from torch import Tensor, nn

import srds_fast
from srds_fast import InvalidArgument, UnknownArgument, UnsupportedPipeline, UnsupportedScheduler, zoo
from srds_fast.integrations.lerobot import Chunk
from srds_fast.solvers.registry import BY_NAME

STEPS = 20


class Holding(nn.Module):
    """A policy that holds a model and queues, as LeRobot's does, around the bundled one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.diffusion = model
        self.reset()

    def reset(self) -> None:
        self._queues: dict[str, deque[Tensor]] = {"action": deque(maxlen=8)}

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        if not self._queues["action"]:
            chunk = self.diffusion.conditional_sample(len(batch["state"]), batch["state"], noise=noise)[:, 1:9]
            self._queues["action"].extend(chunk.transpose(0, 1))
        return self._queues["action"].popleft()


def bundled(ddim: bool = False) -> Any:
    policy = zoo.load("policy")
    if ddim:
        policy.noise_scheduler = DDIMScheduler.from_config(policy.noise_scheduler.config)
    policy.num_inference_steps = STEPS
    return policy


def condition(batch: int = 1, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(batch, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("ddim", "method"),
    [(False, method) for method in BY_NAME] + [(True, method) for method in SAME_SAMPLE],
)
def test_actions_and_random_states_are_those_of_the_own_loop(ddim: bool, method: str) -> None:
    policy, batch = bundled(ddim), 2
    fast = srds_fast.compile(policy, method=method, tolerance=1e-3)
    for given in ({}, {"generator": torch.Generator()}, {"noise": torch.randn(batch, 16, 2)}):
        found = []
        for each in (policy, fast):
            torch.manual_seed(5)
            if "generator" in given:
                given["generator"].manual_seed(6)
            sample = each.conditional_sample(batch, condition(batch), **given)
            found.append((sample, torch.get_rng_state(), given.get("generator", torch.Generator()).get_state()))
        (expected, *states), (sample, *found_states) = found
        if not same_law(method):
            assert float((sample - expected).abs().mean()) <= 4e-3
            assert all(map(torch.equal, states, found_states))
    assert fast.report is not None
    assert fast.report.num_inference_steps == STEPS
    assert fast.report.fallback_reason is None


def test_it_is_the_policy_in_everything_else(tmp_path: Path) -> None:
    policy = bundled()
    fast = srds_fast.compile(policy, method="srds", exact=True)
    assert isinstance(fast, type(policy))
    assert type(fast).__name__ == "PushPolicy"
    assert fast.original is policy
    assert fast.report is None
    assert list(fast.state_dict()) == list(policy.state_dict())
    assert next(fast.parameters()) is next(policy.parameters())
    assert fast.train() is fast
    assert policy.training
    fast.eval()
    assert policy([[0.1] * 6] * 2).shape == fast([[0.1] * 6] * 2).shape
    fast.save_pretrained(tmp_path)
    loaded = type(fast).from_pretrained(tmp_path)
    assert type(loaded) is type(policy), "what is loaded is not compiled"
    noise = torch.randn(1, 16, 2)
    torch.manual_seed(0)
    expected = policy.conditional_sample(1, condition(), noise=noise)
    again = srds_fast.compile(fast, method="srds", exact=True)
    for other in (copy.deepcopy(fast), copy.copy(fast), pickle.loads(pickle.dumps(fast)), again):
        torch.manual_seed(0)
        torch.testing.assert_close(other.conditional_sample(1, condition(), noise=noise), expected, rtol=0, atol=1e-5)
        assert other.report is not None
    assert copy.deepcopy(fast).original is not policy
    assert fast.report.stopped_by, "calls of copies are their own"


def test_a_policy_that_holds_a_model() -> None:
    policy, batch = Holding(bundled()), {"state": condition(2)}
    fast = srds_fast.compile(policy, method="srds", exact=True)
    noise = torch.randn(2, 16, 2)
    found = []
    for each in (policy, fast):
        torch.manual_seed(1)
        each.reset()
        found.append(torch.stack([each.select_action(batch, noise) for _ in range(8)]))
        assert not each._queues["action"]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    assert fast.report is fast.diffusion.report
    assert fast._queues is policy._queues
    policy.diffusion.num_inference_steps = 5
    fast.select_action(batch, noise)
    assert fast.report.num_inference_steps == 5, "settings are read in each call"
    assert isinstance(copy.deepcopy(fast).diffusion, type(policy.diffusion))


def test_a_warm_up_chooses_and_leaves_everything_alone() -> None:
    fast = srds_fast.compile(Holding(bundled()), method="auto")
    batch = {"state": condition()}
    fast.select_action(batch, torch.randn(1, 16, 2))
    queue, state = fast._queues, torch.get_rng_state()
    kept = list(queue["action"])
    report = fast.warmup(batch)
    assert report.plan_state == "frozen"
    assert torch.equal(torch.get_rng_state(), state)
    assert fast._queues is queue
    assert all(map(torch.equal, queue["action"], kept))
    fast.reset()
    fast.select_action(batch, torch.randn(1, 16, 2))
    assert fast.report.plan_state == "frozen"
    assert fast.report.exploring_seconds == 0
    assert fast.diffusion.warmup(1, condition()).plan_state == "frozen"


def test_it_begins_with_the_last_chunk() -> None:
    actions = torch.arange(5.0)[None, :, None]
    assert Chunk(actions, 2).guess().flatten().tolist() == [2, 3, 4, 4, 4]
    policy = Holding(bundled(ddim=True))
    warm = srds_fast.compile(policy, method="collocation", warm_start="previous")
    batch, noise = {"state": condition()}, torch.randn(1, 16, 2)
    warm.select_action(batch, torch.randn(1, 16, 2))
    warm._queues["action"].clear()
    found = warm.select_action(batch, noise)
    policy._queues["action"].clear()
    torch.testing.assert_close(found, policy.select_action(batch, noise), rtol=0, atol=4e-3)
    assert warm._srds.last.chunk is not None
    warm.reset()
    assert warm._srds.last.chunk is None
    for method in ("auto", "srds"):
        with pytest.raises(InvalidArgument, match="cannot start from a trajectory"):
            srds_fast.compile(policy, method=method, warm_start="previous")
    with pytest.raises(InvalidArgument, match="warm_start is 'last'"):
        srds_fast.compile(policy, method="collocation", warm_start="last")


def test_the_last_chunk_saves_waves_where_the_robot_stands_still() -> None:
    """Of the same observation and noise, the chunk that was just sampled is the next one, but for its shift."""
    found = {}
    for start in (None, "previous"):
        fast = srds_fast.compile(bundled(ddim=True), method="collocation", warm_start=start)
        fast.config = replace(fast.config, n_action_steps=0)  # nothing was carried out, so nothing is shifted
        for _ in range(2):
            sample = fast.conditional_sample(1, condition(), noise=torch.ones(1, 16, 2))
        found[start] = fast.report.waves, sample
    assert found["previous"][0] < found[None][0]
    torch.testing.assert_close(found["previous"][1], found[None][1], rtol=0, atol=4e-3)


@pytest.mark.parametrize(("ddim", "method"), [(False, "srds"), (True, "srds"), (True, "collocation")])
def test_a_constant_latency_takes_the_same_waves_for_every_observation(ddim: bool, method: str) -> None:
    waves: dict[str, list[int]] = {}
    for latency in ("adaptive", "constant"):
        fast = srds_fast.compile(Holding(bundled(ddim)), method=method, latency=latency, tolerance=1e-3)
        waves[latency] = []
        for number in range(6):
            torch.manual_seed(number)
            fast.reset()
            fast.select_action({"state": (1 + 3 * number) * condition(seed=number)})
            assert len(fast._queues["action"]) == 7
            waves[latency].append(fast.report.waves)
    assert len(set(waves["constant"])) == 1
    assert len(set(waves["adaptive"])) > 1, "observations that take as many waves show nothing"


def test_what_cannot_run_parallel_runs_on_the_own_loop() -> None:
    policy = bundled()
    fast, strict = srds_fast.compile(policy), srds_fast.compile(policy, strict=True)
    kept = policy.unet
    policy.unet = nn.Module()
    policy.unet._orig_mod = kept  # as torch.compile wraps it
    with pytest.raises(UnsupportedPipeline, match="compiled by torch"):
        strict.conditional_sample(1, condition())
    policy.unet = kept
    with torch.autocast("cpu"):
        fast.conditional_sample(1, condition())
        assert "autocast is on" in fast.report.fallback_reason
        assert fast.report.method == "stock"
    policy.noise_scheduler = RePaintScheduler()
    with pytest.raises(UnsupportedScheduler):
        strict.conditional_sample(1, condition())
    with pytest.raises(UnsupportedScheduler):
        srds_fast.compile(policy)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(UnknownArgument, match="attention is no setting for a policy"):
        srds_fast.compile(bundled(), attention="sdpa")
    with pytest.raises(InvalidArgument, match="tolerance"):
        srds_fast.compile(bundled(), tolerance=-1.0)
    with pytest.raises(UnsupportedPipeline):
        srds_fast.compile(nn.Linear(2, 2))


# LeRobot's own classes


def lerobot_policy(**config: Any) -> Any:
    """LeRobot's policy with a small network and random weights that answer."""
    reason = "lerobot is not installed here (it needs Python 3.12)"
    modeling = pytest.importorskip("lerobot.policies.diffusion.modeling_diffusion", reason=reason, exc_type=ImportError)
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    features = {
        "observation.state": PolicyFeature(FeatureType.STATE, (3,)),
        "observation.environment_state": PolicyFeature(FeatureType.ENV, (4,)),
    }
    given = {
        "input_features": features,
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (2,))},
        "horizon": 16,
        "n_action_steps": 8,
        "down_dims": (16, 32),
        "diffusion_step_embed_dim": 16,
        "n_groups": 4,
        "device": "cpu",
        "num_inference_steps": STEPS,
        **config,
    }
    torch.manual_seed(0)
    return modeling.DiffusionPolicy(DiffusionConfig(**given)).eval()


def observation(batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "observation.state": torch.randn(batch, 3, generator=draw),
        "observation.environment_state": torch.randn(batch, 4, generator=draw),
    }


def history() -> dict[str, Tensor]:
    return {name: each[:, None].repeat(1, 2, 1) for name, each in observation().items()}


@pytest.mark.parametrize("scheduler", ["DDPM", "DDIM"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_lerobot_selects_the_same_actions(scheduler: str, prediction: str) -> None:
    policy = lerobot_policy(noise_scheduler_type=scheduler, prediction_type=prediction)
    for settings, bound in (({"method": "srds", "exact": True}, 1e-5), ({"method": "collocation"}, 4e-3), ({}, 4e-3)):
        fast = srds_fast.compile(policy, **settings)
        assert isinstance(fast, type(policy))
        found = []
        for each in (policy, fast):
            torch.manual_seed(1)
            each.reset()
            with torch.inference_mode():
                actions = [each.select_action(observation(seed=number)) for number in range(10)]
            found.append((torch.stack(actions), torch.get_rng_state()))
        assert float((found[1][0] - found[0][0]).abs().mean()) <= bound
        assert torch.equal(found[1][1], found[0][1])
    noise = torch.randn(2, 16, 2)
    fast.reset()
    chunk = fast.predict_action_chunk(history(), noise)
    assert chunk.shape == (2, 8, 2)


@pytest.mark.parametrize("scheduler", ["DDPM", "DDIM"])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "collocation", "warm_start": "previous"},
        {"method": "srds", "latency": "constant"},
        {"method": "parataa", "warm_start": "previous", "latency": "constant"},
    ],
    ids=str,
)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_lerobot_keeps_its_queues(scheduler: str, settings: dict[str, Any], clip: float | None) -> None:
    """Over two chunks with noise that is given: the same actions, and queues as long as LeRobot's own in every step."""
    more = {"clip_sample": False} if clip is None else {"clip_sample_range": clip}
    policy, other = (lerobot_policy(noise_scheduler_type=scheduler, **more) for _ in range(2))
    fast = srds_fast.compile(other, **settings)
    waves = set()
    for number in range(12):
        noise = torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(number // 8))
        found = []
        for each in (policy, fast):
            torch.manual_seed(number)
            found.append(each.select_action(observation(seed=number), noise=noise))
        if clip is not None:
            assert float(found[0].abs().max()) <= clip + 1e-6
        if "latency" not in settings or not fast.report.missed:  # so many waves may be too few for random weights
            assert float((found[1] - found[0]).abs().mean()) <= 2e-2  # 4e-3 in the mean over the chunk
        assert {name: len(each) for name, each in fast._queues.items()} == {
            name: len(each) for name, each in policy._queues.items()
        }
        waves.add(fast.report.waves)
    if "latency" in settings:
        assert len(waves) == 1


def test_lerobot_saves_and_copies(tmp_path: Path) -> None:
    policy = lerobot_policy()
    fast = srds_fast.compile(policy, method="srds")
    fast.save_pretrained(tmp_path)
    loaded = type(fast).from_pretrained(tmp_path)
    assert type(loaded) is type(policy)
    torch.testing.assert_close(list(loaded.parameters()), list(policy.parameters()), rtol=0, atol=0)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), srds_fast.compile(loaded, method="srds")):
        other.reset()
        fast.reset()
        torch.manual_seed(0)
        found = other.select_action(observation())
        torch.manual_seed(0)
        torch.testing.assert_close(found, fast.select_action(observation()), rtol=0, atol=1e-5)
    loss, _ = fast.forward(
        {
            **history(),
            "action": torch.randn(2, 16, 2),
            "action_is_pad": torch.zeros(2, 16, dtype=torch.bool),
        }
    )
    loss.backward()
    assert next(policy.parameters()).grad is not None
    assert fast.warmup(observation()).method == "srds"

"""What benchmarks call: networks of the sizes they are named after, and loops that have one answer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bench.quality.peers import MOST_STEPS
from bench.speed import robot
from bench.workloads import networks
from bench.workloads.own_loops import Written, every_loop
from bench.workloads.samplers import WORKLOADS, PipelineWorkload

STEPS = 4


def parameters(network: Any) -> int:
    return sum(each.numel() for each in network.parameters())


def test_real_sizes() -> None:
    """What a GPU runs, counted without making it: Stable Diffusion 1.5 and XL to a parameter."""
    builders = (networks.sd15_unet, networks.sdxl_unet, networks.dit_transformer)
    with torch.device("meta"):
        sd15, sdxl, dit = (build(small=False) for build in builders)
    assert parameters(sd15) == 859_520_964
    assert parameters(sdxl) == 2_567_463_684
    # diffusers embeds label and timestep in every layer anew, the published DiT-XL/2 of 675 M once
    embeddings = [parameters(block.norm1.emb) for block in dit.transformer_blocks]
    assert len(embeddings) == 28
    assert parameters(dit) - sum(embeddings[1:]) == pytest.approx(675e6, rel=1e-3)
    assert [each.config.sample_size for each in (sd15, sdxl, dit)] == [64, 128, 32]


@pytest.mark.parametrize("name", WORKLOADS)
def test_all_loops_have_one_answer_for_a_sample(name: str) -> None:
    torch.manual_seed(0)
    workload = WORKLOADS[name]()
    # the comparison of peers refuses more steps than this
    assert (
        not isinstance(workload, PipelineWorkload) or workload.pipe.scheduler.config.num_train_timesteps == MOST_STEPS
    )
    stock = workload.stock(STEPS)
    twin = copy.deepcopy(workload.network)
    calls: list[object] = []
    twin.register_forward_pre_hook(lambda *_: calls.append(None))
    again = workload.stock(STEPS, twin)
    sequential = workload.ours(STEPS, {"method": "sequential", "engine": "eager"})
    exact = workload.ours(STEPS, {"method": "srds", "exact": True, "engine": "graph"})
    answers = []
    for sample in (0, 3):
        answers.append(stock.call(sample).clone())
        for loop in (again, sequential, exact):
            found = loop.call(sample)
            assert found.shape == answers[-1].shape
            assert float((found - answers[-1]).abs().max()) <= 1e-4 * float(answers[-1].abs().max())
    assert not torch.equal(*answers)
    assert len(calls) == 2 * STEPS
    assert (sequential.report().method, sequential.report().left_out) == ("sequential", [])
    assert sequential.widths() == stock.widths() == [1] * STEPS
    for loop in (stock, sequential, exact):
        ran, widths = loop.report(), loop.widths()
        assert (ran.waves, ran.rows, ran.peak_rows) == (len(widths), sum(widths), max(widths))
    given: dict[str, Any] = {}
    call = workload.network_call(rows=3)
    workload.network.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    call()
    assert {len(each) for each in given.values() if isinstance(each, torch.Tensor)} == {3 * workload.entries}
    assert len(given["timestep"].unique()) == 3 * workload.entries


@pytest.mark.parametrize("written", every_loop(), ids=lambda written: written.name)
def test_loops_of_other_people(written: Written) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        expected = written.own()
    state, size = torch.get_rng_state(), float(expected.abs().mean())
    for settings, bound in (({"method": "sequential"}, 1e-5), ({"method": "srds"}, 4e-3)):
        torch.manual_seed(0)
        found = written.ours(**settings)
        assert float((found.sample - expected).abs().flatten(1).mean(1).max()) <= bound * max(1.0, size)
        assert torch.equal(torch.get_rng_state(), state)


def test_all_ways_decide_alike_for_a_robot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robot, "WARM_UP", 0)
    _, rows = robot.measured("DDIM", 8, 1)
    assert {row["way"] for row in rows} == {robot.LOOP, *robot.WAYS}
    for row in rows:
        if row["ran"] != "speculative":  # it keeps the law, not the sample
            assert row["largest difference"] <= 4e-3

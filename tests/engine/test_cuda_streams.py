"""Coarse rows in a network call of their own, beside the others."""

from __future__ import annotations

import pytest
import tiny
from calls import by_turns
from twins import Twins

import srds_fast
from srds_fast.engine.graphs import cache


@pytest.mark.parametrize("name", ["flux", "ddpm", "stable_diffusion_controlnet"])
def test_coarse_rows_in_a_call_of_their_own(name: str) -> None:
    """To rounding what one batch gives; replay equals eager; the report tells."""
    both = Twins(name, method="srds", exact=True, num_blocks=3, overlap="streams")
    both.base |= {"num_inference_steps": 6, **({"height": 16, "width": 16} if "diffusion" in name else {})}
    both.first(0)
    found = both.replayed(1)
    assert both.report.overlap == "streams"
    assert both.eager.report.overlap == "streams"
    batch = srds_fast.compile(both.pipe, engine="eager", method="srds", exact=True, num_blocks=3)
    expected, *_ = both.alone(batch, 1)
    assert batch.report.overlap == "batch"
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_two_calls_of_the_network_where_a_wave_has_both_kinds() -> None:
    pipe = tiny.flux()
    call = {**tiny.PIPELINES["flux"][1], "num_inference_steps": 6, "true_cfg_scale": 2.0, "negative_prompt": "dog"}
    fast = srds_fast.compile(pipe, engine="eager", method="srds", exact=True, num_blocks=3, overlap="streams")
    fast(**call)  # checks the network
    widths: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    fast(**call)
    program = fast.plan_for(**call).program()
    assert widths == [len(positions) for positions in program.in_lanes().positions for _ in range(2)]
    assert len(program.in_lanes()) > len(program)


def test_where_there_is_but_one_batch_it_is_told() -> None:
    waves = Twins("flux", engine="network-graphs", method="srds", exact=True, num_blocks=3, overlap="streams")
    waves.base["num_inference_steps"] = 6
    waves.same(0, 1e-5)
    waves.same(1, 1e-5)
    assert waves.report.engine == "network graphs"
    assert waves.report.left_out == ["overlap='streams' was left out: a graph of the network holds all rows of a wave"]
    driven = srds_fast.compile(waves.pipe, method="srds", exact=True, num_blocks=3, overlap="streams")
    driven(**waves.base, **by_turns(driven))
    assert driven.report.left_out == ["overlap='streams' was left out: the loop is driven"]
    alone = srds_fast.compile(waves.pipe, method="sequential", overlap="streams")
    alone(**waves.base)
    assert alone.report.left_out == [], "there are no coarse rows"
    with pytest.raises(srds_fast.InvalidArgument, match="overlap"):
        srds_fast.compile(waves.pipe, overlap="stream", method="srds")


def test_the_faster_way_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the times say."""
    monkeypatch.setattr("srds_fast.pipelines.call._graphs_on", lambda device: True)
    for slow in ("streams", "batch"):
        monkeypatch.setattr(cache, "_seconds", lambda captured, call, slow=slow: captured.overlap == slow)
        twins = Twins("flux", method="srds", exact=True, num_blocks=3, graphs={"overlap": "auto"})
        twins.base["num_inference_steps"] = 6
        twins.first(0, 1e-5)
        twins.same(1, 1e-5)
        assert twins.report.engine == "loop graph"
        assert twins.report.overlap != slow

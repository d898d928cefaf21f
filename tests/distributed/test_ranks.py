"""Several processes make one sample, started by torchrun: the answers, mismatches, failures, lost ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launched, written
from torch import nn

from bench.scaling import never_slower, real
from bench.scaling.models import ALONE, RANKS, gather_of, measured
from bench.scaling.predict import Way, seconds
from bench.scaling.probes import UNITS
from srds_fast.engine.distributed.call import shares_of
from srds_fast.engine.distributed.digests import digest_of_weights
from srds_fast.engine.run import UNHEARD_WAVES
from srds_fast.planner.choose import choose
from srds_fast.planner.settings import Settings
from srds_fast.solvers.registry import BY_NAME

# of faults that one process ends in too
OWN_ERRORS = {"interrupt": "KeyboardInterrupt", "nan": "DivergenceError", "memory": "OutOfMemoryError"}
Found = list[dict[str, Any]]  # what checks found, by rank


@pytest.fixture(
    scope="module", params=[2, *(pytest.param(ranks, marks=pytest.mark.exhaustive) for ranks in (3, 4))], ids=str
)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    if request.param == 2:
        by_rank = written(request.getfixturevalue("two_ranks"))
    else:
        by_rank = launched(request.param, tmp_path_factory.mktemp("ranks"))
    assert sorted(by_rank) == list(range(request.param))
    return [by_rank[rank] for rank in sorted(by_rank)]


def test_every_method_gives_the_sample_of_one_process(found: Found) -> None:
    size = len(found)
    for of_rank in found:
        assert of_rank["every_method"].keys() == BY_NAME.keys()
        for name, each in of_rank["every_method"].items():
            assert each["apart"] <= 1e-12, name
            assert each["waves"][0] == each["waves"][1]
            assert each["ranks"] == size
    for name in BY_NAME:
        units = [of_rank["every_method"][name]["units"] for of_rank in found]
        assert sum(own for own, _, _ in units) == units[0][1], "no unit is evaluated twice"
        waves = found[0]["every_method"][name]["waves"][0]
        assert units[0][2] <= units[0][1] / size + waves, "shares differ by one unit at most"


def test_with_as_many_rows_a_call_one_process_gives_the_same_bits(found: Found) -> None:
    for of_rank in found:
        alike = of_rank["to_the_bit"]
        assert len(alike) == 2 * len(BY_NAME) + 2
        assert all(alike.values()), [name for name, same in alike.items() if not same]


def test_ranks_that_evaluate_all_rows_themselves_stop_alike_and_have_the_sample_of_rank_0(found: Found) -> None:
    for of_rank in found:
        replicated = of_rank["replicated"]
        assert replicated.keys() >= {"sequential", "srds", "collocation", "parataa"}
        for name, (same_bits, stops, units) in replicated.items():
            assert same_bits, name
            assert stops == found[0]["replicated"][name][1], name
            assert stops[-1] == len(found)
            assert units == [0, 0, 0], "no rows are shared"


def test_noise_is_that_of_one_process_and_generators_end_where_they_do(found: Found) -> None:
    for of_rank in found:
        for name, (apart, same_state) in of_rank["noisy_steps"].items():
            assert apart <= 1e-12, name
            assert same_state, name
        assert of_rank["conditions"] <= 1e-12


def test_ranks_plan_alike_whatever_their_clocks_say(found: Found) -> None:
    assert all(of_rank["the_planner"] == found[0]["the_planner"] for of_rank in found)
    assert found[0]["the_planner"][-1][1] == "frozen"


def test_pipelines_are_stock_and_their_guidance_branches_are_shared(found: Found) -> None:
    for of_rank in found:
        for name, (apart, path, units, waves) in of_rank["pipelines"].items():
            assert apart <= 1e-6, name  # schedulers keep some numbers in float32
            assert path == ("drive" if "driven" in name else "takeover")
            assert units[1] > units[2] >= units[0], name
            if name.endswith(", sequential"):
                calls = 2 if "controlnet" in name and "driven" in name else 1  # shared one by one
                shown = "driven" in name  # the first turn shows the calls of the loop
                expected = calls * (waves - shown)
                assert units[1:] == [2 * expected, expected], f"{name}: each of two ranks has a branch"


def test_unseeded_ranks_draw_what_rank_0_draws(found: Found) -> None:
    for of_rank in found:
        sample, apart, same_state = of_rank["unseeded"]
        assert sample == found[0]["unseeded"][0]
        assert apart <= 2e-3
        assert same_state


def test_networks_are_called_on_every_rank_as_without_draws_of_rank_0(found: Found) -> None:
    for of_rank in found:
        for path, (ran, under, stays) in of_rank["draws_around_networks"].items():
            assert ran == path
            assert not under, "torch asks such a context about every function: the rank would be slower than rank 0"
            assert stays, "the global generator of a rank that would draw otherwise stays where it is"


def test_a_loop_that_draws_draws_what_rank_0_draws_and_goes_on_as_stock_does(found: Found) -> None:
    for of_rank in found:
        (apart, _, ranks), alike = of_rank["unseeded_loops"]
        assert apart <= 1e-6
        assert alike == [0.0, True, ranks]
        assert ranks == len(found)


def test_a_callback_draws_what_it_draws_on_rank_0(found: Found) -> None:
    for of_rank in found:
        assert max(of_rank["draws_of_callbacks"]) <= 1e-6


def test_an_interrupt_of_one_rank_ends_own_loops_on_all_at_the_same_step(found: Found) -> None:
    for of_rank in found:
        assert len(of_rank["interrupted"]) == 5
        for name, (steps, apart, sample, ranks, after) in of_rank["interrupted"].items():
            assert (steps, sample) == (found[0]["interrupted"][name][0], found[0]["interrupted"][name][2]), name
            assert steps == [0, 1, 2, 3]
            assert ranks == len(found)
            assert after <= 2e-3
            if name not in ("recorded calls", "own turns"):  # which has come further, or less far
                assert apart <= 1e-6, name


def test_rank_0_decides_where_compiled_code_is_called(found: Found) -> None:
    for of_rank in found:
        before, after = of_rank["compiled_code"]
        assert after > 0
        assert before == 0 or of_rank is found[0], "rank 0 alone times it"


def test_ranks_at_different_places_are_told_where(found: Found) -> None:
    for of_rank in found:
        same, (error, message), after = of_rank["at_another_place"]
        assert same == 0.0
        assert error == "RankMismatch"
        assert "Rank 0 is about to agree on number 0, rank 1 to agree on number 1." in message
        assert after == []


def test_what_fails_on_one_rank_beside_the_waves_fails_no_call(found: Found) -> None:
    for of_rank in found:
        for name, reports in of_rank["stumbles"].items():
            assert reports == found[0]["stumbles"][name], name
            assert all(report[-1] <= 4e-3 for report in reports), name
        narrow = of_rank["stumbles"]["a wave, memory"]
        assert all("did not fit" in report[-2] for report in narrow)


def test_calls_of_turns_that_do_not_fit_on_one_rank_are_narrower_on_all(found: Found) -> None:
    for of_rank in found:
        assert of_rank["narrow_turns"] == found[0]["narrow_turns"]
        assert all(apart <= 1e-6 for apart, *_ in of_rank["narrow_turns"].values())
        if len(found) > 2:  # less of a wave falls on the rank without memory
            continue
        _, path, left_out, *_ = of_rank["narrow_turns"]["4"]
        assert path == "drive"
        assert any("evaluated in parts" in each for each in left_out)
        _, path, _, reason, _ = of_rank["narrow_turns"]["3"]
        assert path == "stock"
        assert "a wave of up to 2 rows did not fit" in reason


def test_each_rank_replays_graphs_of_its_share_and_none_holds_the_exchange(found: Found) -> None:
    for of_rank in found:
        for name, calls in of_rank["graphs_of_the_network"].items():
            assert all(apart <= 1e-12 for apart, *_ in calls), name
            assert calls[-1][1] == "network graphs", name
            reason = calls[-1][2]
            by_turns, by_name = "own loop runs" in reason, name.startswith("network-graphs")
            assert by_turns or (reason == "") == by_name or "ranks tell each other how they fare" in reason, name
            assert calls[-1][3] > 0, name
    names = found[0]["graphs_of_the_network"]
    assert {name.partition(",")[0] for name in names} == {"graph", "network-graphs"}


def test_a_rank_without_a_share_says_that_it_recorded_nothing(found: Found) -> None:
    for number, of_rank in enumerate(found):
        engine, reason = of_rank["graphs_without_a_share"]
        assert engine == ("network graphs" if number == 0 else "eager")
        assert ("recorded nothing" in reason) == (number > 0)


def test_every_method_is_timed_in_each_way_beside_its_predictions(found: Found) -> None:
    document = found[0]["real_speeds"]
    if len(found) > 2:
        return
    assert all(of_rank["real_speeds"] is None for of_rank in found[1:])
    rows = document["results"]
    assert {row["method"] for row in rows} == set(real.METHODS)
    for row in rows:
        for how in real.HOWS:
            assert len(row[how]["loop_seconds"]) == 1
            loop, predicted = row[how]["loop_seconds"][0], row[how]["predicted_seconds"]
            assert row[how]["error"] == pytest.approx(predicted / loop - 1)
        for how in (ALONE, RANKS):
            each = row[how]
            assert each["error_of_simulator"] == pytest.approx(each["simulated_seconds"] / each["loop_seconds"][0] - 1)
        assert row[f"loop_over_{ALONE}"] == pytest.approx(row[ALONE]["loop_seconds"][0] / row[RANKS]["loop_seconds"][0])
    assert document["exchange_seconds"] > 0


def test_the_simulator_is_given_a_network_a_gather_and_a_host_that_were_measured_in_loops(found: Found) -> None:
    if len(found) > 2:
        return
    document = found[0]["real_speeds"]
    (costs,) = document["networks"].values()
    of_two, of_one = costs[RANKS], costs[ALONE]
    assert of_two["units"] == of_one["units"] == list(UNITS)
    assert {int(rows) for rows in of_two["gather_by_rows"]} == {1, *(2 * units for units in UNITS)}
    assert all(each > 0 for each in (*of_two["seconds"], *of_one["seconds"], *of_two["gather_by_rows"].values()))
    assert set(of_one["gather_by_rows"].values()) == {0.0}, "one process waits for nobody"
    sequential = next(row for row in document["results"] if row["method"] == "sequential")
    way = Way("sequential", "", choose(sequential["steps"], Settings(method="sequential")), 1)
    predicted = seconds(way, measured(costs), 2, gather_of(costs))
    assert sequential[RANKS]["simulated_seconds"] == pytest.approx(predicted)
    assert of_two["host_by_method"].keys() == {"sequential", "srds", "collocation"}


def test_calls_that_choose_their_plan_are_timed_in_pairs(found: Found) -> None:
    row = found[0]["pairs_of_auto"]
    assert all(of_rank["pairs_of_auto"] is None for of_rank in found[1:])
    one, two = (row["seconds"][how] for how in (ALONE, RANKS))
    assert len(one) == len(two) == 6
    assert row["total"] == pytest.approx(sum(two[never_slower.EXPLORED :]) / sum(one[never_slower.EXPLORED :]))
    assert set(row["states"].values()) == {"frozen"}


def test_a_difference_between_ranks_is_told_on_each_by_its_name(found: Found) -> None:
    named = {"generator of a pipeline": "generator"}
    for of_rank in found:
        *different, (_, after) = of_rank["mismatches"].items()
        assert after == []
        for name, (error, message) in different:
            assert error == "RankMismatch", name
            assert f"another {named.get(name, name)} than rank 0" in message
            assert message == found[0]["mismatches"][name][1]


def test_a_failure_on_one_rank_ends_the_call_on_all_and_the_next_call_works(found: Found) -> None:
    for of_rank in found:
        for name, cases in of_rank["faults"].items():
            for ends, right, after in cases:
                assert after <= 1e-9, name
                assert all(apart <= (1e-6 if name == "dtype" else 1e-9) for apart in right), name
                assert ends or right
                if ends:
                    assert ends[0] in ("RankFailed", OWN_ERRORS.get(name)), (name, ends)
    for name in found[0]["faults"].keys() - {"interrupt"}:  # which stays what it is where it comes
        ends = [[case[0] for case in of_rank["faults"][name]] for of_rank in found]
        assert all(each == ends[0] for each in ends), "the same error on every rank"
    assert all("ValueError: broken" in case[0][1] for case in found[0]["faults"]["exception"])
    assert any(not case[0] for case in found[0]["faults"]["memory"]), "a wave of several rows is not the only way"


def test_what_one_rank_does_in_a_callback_or_a_stream_is_told_to_all(found: Found) -> None:
    for of_rank in found:
        ends = of_rank["callbacks"]
        assert ends.pop("after them") == []
        stream = ends.pop("stream")
        assert not stream or stream[0] == "Cancelled" or "Rank 1" in stream[1]
        for name, (error, message) in ends.items():
            assert error == "RankFailed", name
            assert "Rank 1 left the call: ValueError: broken" in message


def test_a_cancelled_rank_ends_the_call_on_all_within_a_wave(found: Found) -> None:
    for of_rank in found:
        (error, _), begun, interrupted, waves, sample = of_rank["cancelled"]
        assert error == "Cancelled"
        own = found[1]["cancelled"][1]
        assert own <= begun <= own + 1, "the others learn of it after their share of the next wave"
        assert interrupted
        assert (waves, sample) == (found[0]["cancelled"][3], found[0]["cancelled"][4])


def test_ranks_that_share_no_rows_hear_of_a_cancelled_one_within_some_waves(found: Found) -> None:
    for of_rank in found:
        (error, _), calls, apart = of_rank["cancelled_where_no_rows_are_shared"]
        assert error == "Cancelled"
        assert 4 <= calls <= 4 + UNHEARD_WAVES
        assert apart <= 1e-12


def test_a_rank_that_is_cancelled_before_the_call_leaves_no_other_waiting(found: Found) -> None:
    for of_rank in found:
        (error, _), apart = of_rank["cancelled_before"]
        assert error == "Cancelled"
        assert apart <= 1e-12


def test_threads_of_one_rank_take_turns(found: Found) -> None:
    for of_rank in found:
        (error, message), apart = of_rank["one_call_at_a_time"]
        assert error == "InvalidArgument"
        assert "Another thread" in message
        assert apart <= 1e-12


def test_ranks_are_named_by_a_group_or_a_mesh(found: Found) -> None:
    for of_rank in found:
        ways = of_rank["groups"]
        assert (ways["group"], ways["mesh"], ways["none"]) == (len(found), len(found), 1)
        assert ways["other"][0] == ways["unnamed"][0] == "InvalidArgument"


@pytest.mark.exhaustive
@pytest.mark.parametrize("check", ["killed", "asleep"])
def test_a_lost_rank_ends_the_call_of_the_others(check: str, tmp_path: Path) -> None:
    found = launched(2, tmp_path, check)
    first, after = found[0][check]
    assert first[0] == after[0] == "RankLost"
    assert "did not answer" in first[1]


@pytest.mark.exhaustive
def test_rows_are_shared_over_time_and_the_calls_of_a_transformer_over_the_rest_of_a_mesh(tmp_path: Path) -> None:
    by_rank = launched(4, tmp_path, "composed")
    assert sorted(by_rank) == [0, 1, 2, 3]
    for number in sorted(by_rank):
        found = by_rank[number]["composed"]
        for name, (apart, path, ranks, units, reason) in found["samples"].items():
            assert apart <= 1e-6, name
            if name == "auto":  # the clock decides how it is run
                continue
            assert (path, ranks) == ("takeover", 2), name
            assert units == found["samples"][name][3]
            assert units[0] <= units[2] < units[1], "two ranks share the units, and two others evaluate the same ones"
            assert reason is None
        assert found["samples"].keys() == {"sequential", "srds", "collocation", "auto"}
        assert found["plans"] == by_rank[0]["composed"]["plans"]
        assert "splits its calls over several processes" in found["without a mesh"]
        for name, says in (("all ranks share rows", "would mix the rows"), ("no call is split", "no network of this")):
            error, message = found[name]
            assert error == "InvalidArgument"
            assert says in message
        assert found["fails on one rank"][0] == "RankFailed"
        assert "Rank 3 left the call: ValueError: broken" in found["fails on one rank"][1]
        assert found["after it"] <= 1e-6


def test_shares_are_whole_even_and_in_order() -> None:
    for lengths in ([1], [2], [7], [3, 3], [4, 0, 5], [1, 1, 1]):
        for size in range(1, 6):
            shares = shares_of(lengths, size)
            for number, length in enumerate(lengths):
                entries = [entry for share in shares for entry in range(length)[share[number]]]
                assert entries == list(range(length))
            counts = [sum(part.stop - part.start for part in share) for share in shares]
            assert max(counts) - min(counts) <= 1


def test_weights_of_the_inference_mode_have_a_digest_that_follows_their_values() -> None:
    with torch.inference_mode():
        network = nn.Linear(3, 3)
        before = digest_of_weights([network])
        assert digest_of_weights([network]) == before
        network.weight.add_(1)
    assert digest_of_weights([network]) != before


def test_other_memory_in_the_place_of_weights_is_seen() -> None:
    """`.data = ...` and `load_state_dict(assign=True)`: of the first torch counts no version."""
    network = nn.Linear(3, 3)
    before = digest_of_weights([network])
    network.weight.data = network.weight.data + 1
    after = digest_of_weights([network])
    assert after != before
    network.load_state_dict({name: each - 1 for name, each in network.state_dict().items()}, assign=True)
    assert digest_of_weights([network]) not in (before, after)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_the_sample_of_one(tmp_path: Path) -> None:
    found = launched(2, tmp_path, "every_method_on_gpus", "graphs_on_gpus")
    for of_rank in found.values():
        assert all(apart <= 1e-5 for apart in of_rank["every_method_on_gpus"].values())
        for first, *others in of_rank["graphs_on_gpus"].values():
            assert all(apart <= 1e-5 for apart, *_ in (first, *others))
            assert all(engine == "network graphs" for _, engine, *_ in others)

"""The benches: the registry hangs together, each kind runs, and none reports what it must not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import fixed, green, host_time, kernels, measures, registry, workloads
from bench.registry import REGISTRY, Bench

ROOT = Path(__file__).parents[1]
SMALL = {"steps": 9, "moved": 2**14, "samples": 2}
# the first of its group with this contestant that a CPU can do
KINDS = {(bench.group, bench.contestant): bench for bench in reversed(REGISTRY.values()) if not bench.marks}
KERNELS = [REGISTRY[f"kernels/{name}/kernel"] for name in registry.KERNELS[1:]]
LAUNCHES = {"wave_update": 1, "fixed_point_wave": 3}
ONE = "samplers/mixture/srds"


def test_names_are_those_of_what_they_name() -> None:
    assert tuple(kernels.SUBJECTS) == registry.KERNELS
    assert tuple(host_time.PIPELINES) == registry.PIPELINES
    assert ("stock", *host_time.METHODS) == registry.LOOPS
    assert tuple(fixed.methods(12)) == registry.METHODS
    assert tuple(workloads.WORKLOADS) == registry.WORKLOADS


def test_every_bench_has_tests_peers_and_known_marks() -> None:
    names = [bench.name for benches in registry.GROUPS for bench in benches()]
    assert sorted(REGISTRY) == sorted(names), "two of one name would be one bench"
    for bench in REGISTRY.values():
        assert bench.tests
        assert all((ROOT / file).is_file() for file in bench.tests)
        assert set(bench.marks) <= {"gpu", "slow"}
        assert any(bench.peers == other.peers and bench != other for other in REGISTRY.values())
        assert not bench.compared or not bench.marks


def test_sizes_are_parameters() -> None:
    bench = REGISTRY["end-to-end/digits/srds"]
    assert bench.sizes_on("cpu", {}) != bench.sizes_on("cuda", {})
    assert bench.sizes_on("cpu", {"steps": 5, "unknown": 1}) == {"steps": 5}


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU")
@pytest.mark.parametrize("bench", [*KINDS.values(), *KERNELS], ids=lambda bench: bench.name)
def test_each_kind_runs_and_says_what_it_took(bench: Bench) -> None:
    prepared = bench.prepare("cpu", SMALL)
    prepared.call()
    found = measures.around(prepared)
    assert all(isinstance(number, int) for number in found.values())
    assert found["launches"] > 0
    # kernels write where they are told
    assert found["bytes_allocated"] > 0 or bench.group == "kernels"
    if bench.contestant == "kernel":
        eager = REGISTRY[f"{bench.peers}/eager"].prepare("cpu", SMALL)
        assert measures.around(eager)["launches"] > found["launches"] == LAUNCHES[bench.subject]
    if bench.group in ("end-to-end", "samplers") or bench.peers == "host/SD DDIM":
        assert found["waves"] <= found["rows"] <= found["waves"] * found["peak_rows"]
        sequential = bench.contestant in ("stock", "sequential")
        assert (found["waves"] == found["rows"] == SMALL["steps"]) == sequential


def test_of_graphs_only_what_can_be_seen_is_said() -> None:
    prepared = REGISTRY["end-to-end/digits/srds, graph"].prepare("cpu", SMALL)
    prepared.call()
    found = measures.around(prepared)
    assert found.keys() == {"waves", "rows", "peak_rows"}
    assert SMALL["steps"] < found["rows"]


def files(folder: Path, test: str) -> None:
    (folder / "tests").mkdir(parents=True, exist_ok=True)
    (folder / "srds_fast").mkdir(exist_ok=True)
    (folder / "tests" / "test_it.py").write_text(test)


def test_red_tests_are_refused_and_green_ones_remembered(tmp_path: Path) -> None:
    log, cache = tmp_path / "log", tmp_path / ".benchmarks" / "green.json"
    noted = f"def test_it():\n    open({str(log)!r}, 'a').write('.')\n    "

    def require() -> int:
        green.require(["tests/test_it.py"], tmp_path, cache)
        return len(log.read_text())

    files(tmp_path, noted + "assert 1 + 1 == 3")
    for _ in range(2):
        with pytest.raises(green.Red, match=r"not green \(exit status 1\).*Run `python -m pytest") as red:
            require()
        assert "assert (1 + 1) == 3" in str(red.value)
    assert len(log.read_text()) == 2, "red is not remembered"
    files(tmp_path, noted + "assert 1 + 1 == 2")
    assert require() == 3
    assert require() == 3, "green is"
    (tmp_path / "srds_fast" / "more.py").write_text("")
    assert require() == 4, "but not when the library has changed"
    files(tmp_path, "")
    with pytest.raises(green.Red, match="exit status 5"):
        require()


def test_tests_that_are_all_skipped_are_not_green(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "green.json"
    skipped = "import pytest\n\n\n@pytest.mark.skip\ndef test_it():\n    pass\n"
    files(tmp_path, skipped)
    with pytest.raises(green.Red, match=r"none of its tests ran here \(1 skipped in .*test_it.py -rs` to see why"):
        green.require(["tests/test_it.py"], tmp_path, cache)
    assert not cache.exists()
    files(tmp_path, f"{skipped}\n\ndef test_more():\n    pass\n")
    # a session's options are not those of the tests that it asks for
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    # half of a file, as a session that was ended leaves it
    cache.write_text('{"tests/test_it.py": "')
    green.require(["tests/test_it.py"], tmp_path, cache)
    assert json.loads(cache.read_text()).keys() == {"tests/test_it.py"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"green.json"}


def test_green_is_of_the_benches_and_of_versions_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, "")

    def fingerprint() -> str:
        return green._fingerprint("tests/test_it.py", tmp_path)

    before = fingerprint()
    (tmp_path / "tests" / "test_other.py").write_text("")
    assert fingerprint() == before
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "fixed.py").write_text("")
    of_benches = fingerprint()
    assert of_benches != before
    other = tmp_path / "other"
    (other / "diffusers-0.1.dist-info").mkdir(parents=True)
    (other / "diffusers-0.1.dist-info" / "METADATA").write_text("Name: diffusers\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(other)
    assert fingerprint() != of_benches


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    command += [f"--rootdir={folder}", "--benchmark-only", *arguments]
    # a process of tests in parallel, as this one may be, times nothing
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benches with a library and one test file of their own."""
    folder = tmp_path_factory.mktemp("benches") / "checkout"
    shutil.copytree(ROOT / "bench", folder / "bench", ignore=shutil.ignore_patterns("__pycache__", "results"))
    (folder / "tests").mkdir()
    return folder


@pytest.mark.slow
def test_a_bench_reports_if_its_tests_are_green(checkout: Path) -> None:
    (file,) = (checkout / each for each in REGISTRY[ONE].tests)
    one = [f"bench/test_benchmarks.py::test_bench[{ONE}]", "--benchmark-json=found.json"]
    brief = ["--benchmark-min-rounds=2", "--benchmark-max-time=0.01"]
    file.write_text("def test_it():\n    assert False\n")
    refused = pytest_in(checkout, *one, *brief)
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "1 error" in refused.stdout
    assert f"{REGISTRY[ONE].tests[0]} is not green" in refused.stdout
    assert not (checkout / "found.json").exists()

    file.write_text("def test_it():\n    pass\n")
    saved = pytest_in(checkout, *one, *brief, "--benchmark-autosave")
    assert saved.returncode == 0, saved.stdout + saved.stderr
    (found,) = json.loads((checkout / "found.json").read_text())["benchmarks"]
    assert found["group"] == "samplers/mixture"
    info = found["extra_info"]
    assert 1 < info["waves"] < info["rows"]
    assert info["versions"]["torch"] == version("torch")
    assert {"launches", "gpu", "commit", "dirty", "sizes"} <= info.keys()
    assert {"peak_memory", "bytes_allocated"} & info.keys()

    # and the next time it is held against what was saved: here, against a time that was never reached
    (baseline,) = checkout.glob(".benchmarks/*/*.json")
    held_against: dict[str, Any] = json.loads(baseline.read_text())
    for name in ("min", "median"):
        held_against["benchmarks"][0]["stats"][name] /= 1e4
    baseline.write_text(json.dumps(held_against))
    slower = pytest_in(checkout, *one, *brief, "--benchmark-compare", "--benchmark-compare-fail=median:10%")
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stdout + slower.stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--benchmark-compare"], "asks for a baseline, and none is saved for this machine"),
        (["--benchmark-compare=0007", "--benchmark-compare-fail=median:10%"], "none that '0007' fits is saved"),
        (["--benchmark-compare-fail=median:10%"], "There is nothing to hold times against"),
        (["--size", "steps"], "--size 'steps' is not a size"),
        (["--size", "step=25"], "no bench has a size 'step'. Sizes are moved, samples, steps."),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(
    options: list[str], why: str, checkout: Path, tmp_path: Path
) -> None:
    done = pytest_in(checkout, "bench", f"--benchmark-storage={tmp_path}", *options)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert why in done.stderr
    assert "collected" not in done.stdout
    if "=0007" in options[0]:
        assert "pytest bench --benchmark-only --benchmark-autosave" in done.stderr


@pytest.mark.gpu
def test_the_clock_reads_what_the_device_took() -> None:
    clock, x = measures.EventClock(), torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    started, before = time.perf_counter(), clock()  # in this order: the wall has both readings in it
    for _ in range(20):
        x @ x
    taken, wall = clock() - before, time.perf_counter() - started
    assert 0 < taken <= wall

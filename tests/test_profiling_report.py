"""Recordings by Nsight Systems, read and drawn.

tests/data/nsys-*.sqlite were recorded by the profiler itself, on a CPU (profiling/make_fixture.sh). What GPUs do is put
into its tables by hand: every figure is then known by counting.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.intervals import at_once, covered, union
from profiling import report, run
from profiling.calls import Call, calls_of
from profiling.nsys import read

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
EAGER, GRAPH = DATA / "nsys-eager.sqlite", DATA / "nsys-graph.sqlite"
# of push/pop ranges in NVTX_EVENTS, with names: straight from the file, without the code under test
RANGES = """
    SELECT value, start, "end", globalTid, int64Value FROM NVTX_EVENTS JOIN StringIds ON textId = id
    WHERE eventType = 59 ORDER BY start
"""
MICRO = 1000
# ns of the network calls of the last call of nsys-eager
NETWORK = [
    11_543_780,
    12_615_587,
    14_137_458,
    16_719_021,
    18_884_215,
    20_098_504,
    22_123_137,
    24_853_906,
    26_498_261,
    28_970_856,
    31_273_507,
    33_144_992,
    32_350_966,
    32_108_738,
]


class Seen(NamedTuple):
    """A row of RANGES; ns."""

    name: str
    start: int
    end: int
    thread: int
    payload: int | None

    def has(self, other: Seen) -> bool:
        """It is around another one."""
        return self.start <= other.start and other.end <= self.end and self is not other


def seen_in(path: Path) -> list[Seen]:
    with closing(sqlite3.connect(path)) as database:
        return [Seen(*row) for row in database.execute(RANGES)]


def inside(outer: Seen, ranges: list[Seen], name: str) -> list[Seen]:
    return [each for each in ranges if outer.has(each) and each.name.split(" ")[0] == name]


def ran(path: Path) -> dict[str, Any]:
    """What the last call of a recording reported of itself when it was made."""
    return json.loads(path.with_suffix(".json").read_text())


def last(path: Path) -> Call:
    return calls_of(read(path))[-1]


class Gpu:
    """A copy of a recording with GPU tables, to be filled."""

    def __init__(self, source: Path, path: Path) -> None:
        path.write_bytes(source.read_bytes())
        self.path = path
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.executescript((DATA / "nsys-gpu.sql").read_text())
        self._next = 1

    def _insert(self, table: str, **values: Any) -> None:
        columns = self.database.execute(f"PRAGMA table_info({table})").fetchall()
        # the others that must not be NULL
        row = {name: 0 for _, name, _, required, *_ in columns if required} | values
        names, marks = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
        self.database.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(row.values()))

    def string(self, value: str) -> int:
        found = self.database.execute("SELECT id FROM StringIds WHERE value = ?", (value,)).fetchone()
        if found is None:
            self.database.execute("INSERT INTO StringIds SELECT max(id) + 1, ? FROM StringIds", (value,))
            return self.string(value)
        return int(found[0])

    def launch(self, time: int, thread: int) -> int:
        """A call of the CUDA runtime; what it is correlated by."""
        self._next += 1
        name = self.string("cudaLaunchKernel")
        call = {"globalTid": thread, "correlationId": self._next, "nameId": name}
        self._insert("CUPTI_ACTIVITY_KIND_RUNTIME", start=time, end=time + 1, **call)
        return self._next

    def work(
        self, launch: int, thread: int, start: int, end: int, name: str = "gemm", stream: int = 7, **values: Any
    ) -> None:
        """Something that the GPU did: a copy if that is its name, a kernel otherwise."""
        values |= {"correlationId": launch, "globalPid": thread & ~0xFFFFFF, "streamId": stream}
        if name == "copy":
            self._insert("CUPTI_ACTIVITY_KIND_MEMCPY", start=start, end=end, **values)
        else:
            names = {"shortName": self.string(name), "demangledName": self.string(f"{name}(float*)")}
            self._insert("CUPTI_ACTIVITY_KIND_KERNEL", start=start, end=end, **names, **values)

    def node(self, node: int, time: int, thread: int, original: int | None = None) -> None:
        values = {"globalTid": thread, "graphNodeId": node, "originalGraphNodeId": original}
        self._insert("CUDA_GRAPH_EVENTS", start=time, end=time + 1, **values)

    def call(self, number: int) -> Call:
        return calls_of(read(self.path))[number]


def new_gpu(source: Path, folder: Path) -> Iterator[Gpu]:
    gpu = Gpu(source, folder / "gpu.sqlite")
    yield gpu
    gpu.database.close()


def test_intervals() -> None:
    assert union([(5, 7), (0, 2), (1, 3), (7, 8)]) == [(0, 3), (5, 8)]
    assert covered([(5, 7), (0, 2), (1, 3), (7, 8)]) == 6
    # 2-3 and 6-7; a group that meets itself does not count
    assert at_once([[(0, 3), (1, 2), (6, 8)], [(2, 5), (5, 7)]]) == 2


@pytest.mark.parametrize("path", [EAGER, GRAPH], ids=lambda path: path.stem)
def test_ranges_are_nested_as_they_were_pushed(path: Path) -> None:
    around = {
        "call": {None},
        "encode": {"call"},
        "plan": {"call"},
        "trace": {"call"},
        "iteration": {"call", "record"},
        "decode": {"call"},
        "record": {"call"},
        "wave": {"iteration"},
        "replay": {"iteration", "record"},
        "network": {"wave", "coarse", "fine"},
        "coarse": {"wave"},
        "fine": {"wave"},
        "wave_update": {"wave", "iteration"},
        "checkpoint": {"wave", "iteration"},
    }
    recording = read(path)
    assert not recording.gpu
    assert len(recording.ranges) == len(seen_in(path))
    for each in recording.ranges:
        assert (each.parent.kind if each.parent else None) in around[each.kind], each
        assert each.parent is None or each.parent.start <= each.start <= each.end <= each.parent.end
    assert {each.category for each in recording.ranges if each.kind == "wave"} <= {"coarse", "fine", "mixed"}
    assert [each.payload for each in recording.ranges if each.kind == "iteration"][:2] == [0, 1]


def test_waves_are_those_that_ran() -> None:
    calls, expected = calls_of(read(EAGER)), ran(EAGER)
    assert len(calls) == 3
    for call in calls:
        assert len(call.waves) == expected["waves"] == call.table["wave, mixed"].count
        assert [wave.rows for wave in call.waves] == expected["widths"][: expected["waves"]]
        assert sum(wave.rows or 0 for wave in call.waves) == expected["rows"]
        assert [wave.iteration for wave in call.waves] == sorted(wave.iteration for wave in call.waves)
        assert {wave.kind for wave in call.waves} == {"mixed"}


def test_waves_that_are_replayed_are_counted_by_launch() -> None:
    call, expected = last(GRAPH), ran(GRAPH)
    launched = [each.payload for each in call.ranges if each.kind == "replay"]
    assert sum(each or 0 for each in launched) == expected["waves"]
    assert call.waves == []
    assert call.overhead is None
    assert f"{expected['waves']} waves were replayed" in " ".join(call.notes)


def test_figures_by_hand() -> None:
    call, ranges = last(EAGER), seen_in(EAGER)
    outer = [each for each in ranges if each.name == "call"][-1]
    networks, iterations = inside(outer, ranges, "network"), inside(outer, ranges, "iteration")
    network = sum(each.end - each.start for each in networks)
    assert call.network == network
    assert call.wall == iterations[-1].end - iterations[0].start
    assert call.overhead == call.wall / network
    assert call.idle is None
    waves = inside(outer, ranges, "wave")
    assert call.gaps[0] == (waves[1].start - waves[0].end, False)
    # a checkpoint lies in the range of the wave before it, and is no part of it
    checkpoint = inside(outer, ranges, "checkpoint")[0]
    before, after = next((a, b) for a, b in pairwise(waves) if b.start > checkpoint.end)
    assert before.has(checkpoint)
    assert [gap for gap, at_checkpoint in call.gaps if at_checkpoint] == [after.start - checkpoint.start]
    assert call.table["network"].host == network
    # the same, taken down from the file and added by hand
    assert [wave.network for wave in call.waves] == NETWORK
    assert network == 325_322_928


def test_report_on_a_cpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    report.main([str(EAGER), "--call", "2", "--json", str(figures)])
    told = capsys.readouterr().out
    assert "call 2 of nsys-eager.sqlite: times of the host, as no GPU was recorded" in told
    assert "GPU ms" not in told
    (found,) = json.loads(figures.read_text())["calls"]
    assert (found["call"], found["times"], found["idle_share"]) == (2, "host", None)
    assert len(found["waves"]) == ran(EAGER)["waves"]
    assert f"overhead    {found['overhead']:.3f}" in told


@pytest.mark.parametrize("source", [EAGER, GRAPH], ids=lambda path: path.stem)
def test_timeline_shows_its_colours(source: Path, tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from profiling.timeline import COLOURS

    picture = tmp_path / "timeline.png"
    report.main([str(source), "--call", "1", "--png", str(picture)])
    pixels = imread(picture)[:, :, :3]
    for of in ("mixed", "network", "wave_update", *(("coarse", "fine", "record") if source == GRAPH else ())):
        share = (abs(pixels - to_rgb(COLOURS[of])).max(axis=2) < 0.01).mean()
        assert share > (0.0001 if of == "wave_update" else 0.005), of


@pytest.fixture
def eager_gpu(tmp_path: Path) -> Iterator[Gpu]:
    yield from new_gpu(EAGER, tmp_path)


@pytest.fixture
def graph_gpu(tmp_path: Path) -> Iterator[Gpu]:
    yield from new_gpu(GRAPH, tmp_path)


def test_eager_kernels_belong_to_the_ranges_that_launched_them(eager_gpu: Gpu, tmp_path: Path) -> None:
    """In every wave three kernels of 100 us, then an update of 10 us; 50 us pass until the next wave.

    The GPU begins when the host is through with the iterations.
    """
    ranges = seen_in(EAGER)
    outer = [each for each in ranges if each.name == "call"][-1]
    waves, iterations = inside(outer, ranges, "wave"), inside(outer, ranges, "iteration")
    thread, now = outer.thread, iterations[-1].end
    begun = now
    for wave in waves:
        (network,), update = inside(wave, ranges, "network"), inside(wave, ranges, "wave_update")[0]
        for number in range(3):
            launch = eager_gpu.launch(network.start + number, thread)
            eager_gpu.work(launch, thread, now, now + 100 * MICRO)
            now += 100 * MICRO
        launch = eager_gpu.launch(update.start, thread)
        eager_gpu.work(launch, thread, now, now + 10 * MICRO, "wave_update_kernel")
        now += (10 + 50) * MICRO
    # a copy for the last checkpoint, 50 us after; and what is no part of the iterations: text, another process, later
    checkpoint = inside(outer, ranges, "checkpoint")[-1]
    eager_gpu.work(eager_gpu.launch(checkpoint.start, thread), thread, now, now + 5 * MICRO, "copy")
    encode = inside(outer, ranges, "encode")[0]
    eager_gpu.work(eager_gpu.launch(encode.start, thread), thread, encode.end, encode.end + 70 * MICRO)
    eager_gpu.work(launch, thread + (1 << 24), begun, begun + 1000 * MICRO, stream=9)
    eager_gpu.work(eager_gpu.launch(outer.end + 1, thread), thread, now + 900 * MICRO, now + 1000 * MICRO)

    call, count = eager_gpu.call(-1), len(waves)
    assert call.gpu
    assert [len(wave.works) for wave in call.waves] == [4] * count
    assert [wave.end - wave.start for wave in call.waves] == [310 * MICRO] * count
    assert [gap for gap, _ in call.gaps] == [50 * MICRO] * (count - 1)
    assert sum(checkpoint for _, checkpoint in call.gaps) == len(iterations) - 1
    assert call.network == count * 300 * MICRO
    wall = begun - iterations[0].start + (count * 360 + 5) * MICRO
    assert call.wall == wall
    assert call.overhead == wall / (count * 300 * MICRO)
    assert call.busy == (count * 310 + 5) * MICRO
    assert call.idle == 1 - (count * 310 + 5) * MICRO / wall
    assert call.streams_at_once == call.coarse_beside_fine == 0
    gpu = {label: (row.gpu // MICRO, row.launches) for label, row in call.table.items()}
    assert gpu["network"] == (count * 300, count * 3)
    assert gpu["wave_update"] == (count * 10, count)
    assert gpu["wave, mixed"] == (count * 310, count * 4)
    assert gpu["checkpoint"] == (5, 1)
    assert gpu["iteration"] == (count * 310 + 5, count * 4 + 1)
    assert gpu["encode"] == (70, 1)
    assert len(call.works) == 4 * count + 2
    assert call.notes == []


SPLIT = ("coarse", "fine")


def recorded(gpu: Gpu, ranges: list[Seen], *, nodes: bool) -> list[tuple[Seen, list[tuple[str, int]]]]:
    """Give the recorded waves nodes, one for every network call and update. Returns each wave's, with what they run.

    Args:
        gpu: gets the creation of each node, and of its copy when the graph is instantiated.
        ranges: of the file.
        nodes: the profiler saw that.
    """
    record = next(each for each in ranges if each.name == "record")
    found: list[tuple[Seen, list[tuple[str, int]]]] = []
    for wave in inside(record, ranges, "wave"):
        parts = [
            (of, each) for of in SPLIT for rows in inside(wave, ranges, of) for each in inside(rows, ranges, "network")
        ]
        parts = parts or [("network", each) for each in inside(wave, ranges, "network")]
        parts += [("wave_update", each) for each in inside(wave, ranges, "wave_update")]
        made: list[tuple[str, int]] = []
        for of, part in parts:
            node = 100 * len(found) + len(made) + 1
            if nodes:
                gpu.node(node, part.start + 1, wave.thread)
                # where it is instantiated is no wave
                gpu.node(node + 10_000, record.end - 1, wave.thread, original=node)
            made.append((of, node + 10_000))
        found.append((wave, made))
    return found


def replayed(gpu: Gpu, ranges: list[Seen], *, nodes: bool) -> tuple[Seen, int]:
    """Replay them in the last call. Coarse rows take 60 us, beside the fine ones' 100 us, an update 10 us after them.

    10 us pass between waves, 200 us between launches. Returns the call and where its GPU work ends.
    """
    waves = recorded(gpu, ranges, nodes=nodes)
    outer = [each for each in ranges if each.name == "call"][-1]
    replays = inside(outer, ranges, "replay")
    now = inside(outer, ranges, "iteration")[-1].end
    for replay in replays:
        launch = gpu.launch(replay.start, outer.thread)
        if replay is replays[0]:  # the first launch makes its memory ready, then what the first wave reads
            gpu.work(launch, outer.thread, now - 90 * MICRO, now - 80 * MICRO, "fill", graphNodeId=90_001)
            gpu.work(launch, outer.thread, now - 70 * MICRO, now - 60 * MICRO, "wave_update_kernel", graphNodeId=90_002)
        for _ in range(replay.payload or 0):
            _, made = waves.pop(0)
            for of, node in made:
                took = {"coarse": 60, "fine": 100, "network": 100, "wave_update": 10}[of] * MICRO
                start = now + (100 * MICRO if of == "wave_update" else 0)
                name, stream = "wave_update_kernel" if of == "wave_update" else "gemm", 13 if of == "coarse" else 7
                gpu.work(launch, outer.thread, start, start + took, name, stream, graphNodeId=node)
            now += 120 * MICRO
        now += 190 * MICRO
    assert not waves
    return outer, now - 200 * MICRO


@pytest.mark.parametrize("table", ["CUDA_GRAPH_EVENTS", "CUDA_GRAPH_NODE_EVENTS"], ids=["nsys-2022", "nsys-later"])
def test_nodes_of_graphs_belong_to_the_waves_they_were_recorded_in(graph_gpu: Gpu, table: str) -> None:
    ranges = seen_in(GRAPH)
    outer, ended = replayed(graph_gpu, ranges, nodes=True)
    if table != "CUDA_GRAPH_EVENTS":
        graph_gpu.database.execute(f"ALTER TABLE CUDA_GRAPH_EVENTS RENAME TO {table}")
    call, expected = graph_gpu.call(-1), ran(GRAPH)
    count = expected["waves"]
    split = count - 1  # the first wave is a single row
    assert [wave.rows for wave in call.waves] == expected["widths"][:count]
    assert {wave.kind for wave in call.waves} == {"mixed"}
    assert [len(wave.works) for wave in call.waves] == [2] + [3] * split
    assert [wave.end - wave.start for wave in call.waves] == [110 * MICRO] * count
    # the time in which the network runs, not the sum of what runs side by side
    assert call.network == count * 100 * MICRO
    assert call.coarse_beside_fine == call.streams_at_once == split * 60 * MICRO
    launches = len(inside(outer, ranges, "replay"))
    assert sorted(call.gaps) == [(10 * MICRO, False)] * (count - launches) + [(200 * MICRO, True)] * (launches - 1)
    begun = inside(outer, ranges, "iteration")[0].start
    assert call.wall == ended - begun
    assert call.overhead == (ended - begun) / (count * 100 * MICRO)
    assert call.busy == (count * 110 + 20) * MICRO
    gpu = {label: (row.gpu // MICRO, row.launches) for label, row in call.table.items()}
    assert gpu["coarse"] == (split * 60, split)
    assert gpu["fine"] == (split * 100, split)
    assert gpu["network"] == (100 + split * 160, 1 + 2 * split)
    assert gpu["wave_update"] == (count * 10, count)
    # and the two that make it ready
    assert gpu["replay"] == (100 + split * 160 + count * 10 + 20, 2 + 3 * split + 2)
    assert call.table["wave, mixed"].count == count
    assert call.notes == []


def test_what_runs_while_graphs_are_recorded_is_no_wave(graph_gpu: Gpu) -> None:
    """A network may run before it is recorded, in the range of the wave that is recorded next."""
    ranges = seen_in(GRAPH)
    record = next(each for each in ranges if each.name == "record")
    outer = next(each for each in ranges if each.has(record))
    for at in (inside(record, ranges, "network")[0], inside(outer, ranges, "network")[0]):
        launch = graph_gpu.launch(at.start, at.thread)
        graph_gpu.work(launch, at.thread, at.end, at.end + 30 * MICRO)
    call = graph_gpu.call(0)
    assert [len(wave.works) for wave in call.waves] == [1]
    launches = {label: row.launches for label, row in call.table.items() if row.launches}
    assert launches == {"iteration": 1, "wave, mixed": 1, "network": 1, "record": 1}


def test_without_their_creation_waves_end_with_their_update(graph_gpu: Gpu, capsys: pytest.CaptureFixture[str]) -> None:
    replayed(graph_gpu, seen_in(GRAPH), nodes=False)
    call, count = graph_gpu.call(-1), ran(GRAPH)["waves"]
    # what makes the first wave ready ends with an update too: the launch says of how many waves it is
    assert [len(wave.works) for wave in call.waves] == [2] + [3] * (count - 1)
    assert [wave.end - wave.start for wave in call.waves] == [110 * MICRO] * count
    assert call.network == count * 100 * MICRO
    assert {wave.kind for wave in call.waves} == {None}
    assert call.coarse_beside_fine == 0
    assert call.streams_at_once == (count - 1) * 60 * MICRO
    report.main([str(graph_gpu.path)])
    assert "note: in 3 of 3 replays a wave is taken to end with its wave_update kernel" in capsys.readouterr().out


def test_graphs_recorded_as_a_whole_are_named(graph_gpu: Gpu) -> None:
    ranges = seen_in(GRAPH)
    outer = [each for each in ranges if each.name == "call"][-1]
    graph_gpu.database.execute(
        "CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER, end INTEGER, deviceId INTEGER, "
        "contextId INTEGER, streamId INTEGER, correlationId INTEGER, globalPid INTEGER, graphId INTEGER, "
        "graphExecId INTEGER)"
    )
    for replay in inside(outer, ranges, "replay"):
        launch, process = graph_gpu.launch(replay.start, outer.thread), outer.thread & ~0xFFFFFF
        values = (replay.start, replay.start + 20 * MICRO, 0, 1, 7, launch, process, 1, 2)
        graph_gpu.database.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_GRAPH_TRACE VALUES ({', '.join('?' * 9)})", values)
    call = graph_gpu.call(-1)
    assert call.busy == 60 * MICRO
    assert call.table["replay"].launches == 3
    (note,) = call.notes
    assert "--cuda-graph-trace=node" in note


def test_timeline_of_a_gpu_has_a_lane_for_every_stream(graph_gpu: Gpu, tmp_path: Path) -> None:
    from profiling.timeline import draw, lanes_of

    replayed(graph_gpu, seen_in(GRAPH), nodes=True)
    call = graph_gpu.call(-1)
    lanes = lanes_of(call)
    assert list(lanes) == ["host", "host: waves", "GPU: waves", "GPU: stream 7", "GPU: stream 13"]
    assert {bar.of for bar in lanes["GPU: stream 13"]} == {"coarse"}
    assert {bar.of for bar in lanes["GPU: stream 7"]} == {"fine", "mixed", "wave_update", "other"}
    draw(call, "replays", tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def refused(file: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        report.main([str(file), *options])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


def test_files_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no file" in refused(tmp_path / "missing.sqlite", capsys)
    text = tmp_path / "text.sqlite"
    text.write_text("a recording, " * 100)
    assert "is no sqlite file" in refused(text, capsys)
    empty = tmp_path / "empty.sqlite"
    with closing(sqlite3.connect(empty)) as database:
        database.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")
    assert "has no NVTX ranges" in refused(empty, capsys)
    assert "has no call 4. It has 3" in refused(EAGER, capsys, "--call", "4")


def test_ranges_of_others_are_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.sqlite"
    other.write_bytes(EAGER.read_bytes())
    with closing(sqlite3.connect(other, isolation_level=None)) as database:
        database.execute("UPDATE NVTX_EVENTS SET text = 'others' WHERE eventType = 75")
    assert "has no ranges of the domain 'srds_fast'" in refused(other, capsys)


def test_a_recording_that_was_cut_has_no_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.sqlite"
    cut.write_bytes(EAGER.read_bytes())
    with closing(sqlite3.connect(cut, isolation_level=None)) as database:
        calls = "SELECT id FROM StringIds WHERE value = 'call'"
        database.execute(f"DELETE FROM NVTX_EVENTS WHERE eventType = 59 AND textId IN ({calls})")
    assert "has no whole call" in refused(cut, capsys)


def test_the_report_needs_neither_torch_nor_us() -> None:
    code = (
        "import sys; from profiling import report; report.main(sys.argv[1:]); "
        "assert not {'torch', 'srds_fast', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(EAGER)], cwd=ROOT, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("script", ["nsys", "ncu"])
def test_scripts_say_what_is_missing(script: str) -> None:
    missing = {**os.environ, script.upper(): "/there/is/no/profiler"}
    done = subprocess.run(
        ["bash", ROOT / "profiling" / f"{script}.sh", "digits"], env=missing, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "There is no /there/is/no/profiler" in done.stderr


def test_run_captures_recording_and_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, said = tmp_path / "trace.json", tmp_path / "ran.json"
    settings = ["--engine", "graph", "--steps", "6", "--calls", "2"]
    run.main(["digits", *settings, "--trace", str(trace), "--json", str(said)])
    events = json.loads(trace.read_text())["traceEvents"]
    names = [each["name"] for each in events if each["ph"] == "X"]
    names = [name.partition(" (")[0] for name in names]
    # one call records, with the waves of the recording in it; two replay
    assert names.count("call") == 3
    assert names.count("record") == 1
    after = names[names.index("decode") :]
    assert {"replay 0", "replay 1"} <= set(after)
    assert not any(name.startswith("wave ") for name in after)
    assert json.loads(said.read_text())["engine"] == "loop graph"
    assert "loop graph" in capsys.readouterr().out

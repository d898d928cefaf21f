"""All benches by name: what each is, how it is set up, what it is set beside, which tests must be green.

    python -m bench.registry        # their names
    pytest bench --benchmark-only   # runs them, see README.md

A name is "group/subject/contestant": benches of one subject do the same thing in other ways and are compared with each
other. One function sets a bench up, for its time as for its memory; what it is given are the sizes, with defaults
for each kind of device. Nothing is imported before it is set up: so a commit that lacks one thing can still be compared
in all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

from . import setups
from .setups import Prepared

Sizes = Mapping[str, int]

KERNELS = ("wave_update", "fixed_point_wave")
PIPELINES = ("SD DDIM", "SD Euler", "SDXL DDIM", "SDXL Euler", "SD3 flow", "Flux flow", "DDIM pixels")
LOOPS = ("stock", "sequential", "srds", "srds plain")
METHODS = ("sequential", "srds, as published", "srds", "collocation", "parataa", "paradigms", "chords")
PLANNED = ("sequential", "srds", "collocation", "chords", "auto")
WORKLOADS = ("digits", "policy", "sd15", "sdxl", "dit")
# more of them take a CPU long
ROWS_ON_CPU, ROWS_ON_GPU = (1, 2, 4, 8), (12, 16, 24, 32)
# bytes that a call of a kernel moves
LAUNCH_BOUND, BANDWIDTH_BOUND = 2**20, 2**26

_TESTS_OF_METHODS = {
    "collocation": "tests/test_fixed_point.py",
    "parataa": "tests/test_fixed_point.py",
    "paradigms": "tests/test_paradigms.py",
    "chords": "tests/test_chords.py",
}
_TESTS_OF_WORKLOADS = {"digits": "tests/test_digits.py", "policy": "tests/test_sampler.py"}


@dataclass(frozen=True)
class Bench:
    """One bench.

    Attributes:
        group, subject, contestant: its name.
        what: it does, in a few words.
        setup: sizes by name -> the bench, ready.
        sizes: "cpu", "cuda" -> defaults.
        tests: files that must be green before anything is reported.
        marks: of pytest: "gpu" needs a CUDA device, "slow" takes long on a CPU.
        compared: by `bench.compare`, unless it is told otherwise.
    """

    group: str
    subject: str
    contestant: str
    what: str
    setup: Callable[..., Prepared]
    sizes: Mapping[str, Sizes] = field(default_factory=dict)
    tests: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    compared: bool = False

    @property
    def peers(self) -> str:
        """What it shares with those that it is compared with."""
        return f"{self.group}/{self.subject}"

    @property
    def name(self) -> str:
        return f"{self.peers}/{self.contestant}"

    def sizes_on(self, device: str, asked: Sizes) -> dict[str, int]:
        """Its sizes on a kind of device: the defaults, but for those that were asked for."""
        known = self.sizes.get(device, {})
        return {name: asked.get(name, default) for name, default in known.items()}

    def prepare(self, device: str, asked: Sizes = MappingProxyType({})) -> Prepared:
        """Set it up."""
        return self.setup(**self.sizes_on(device, asked))


def _everywhere(**sizes: int) -> dict[str, Sizes]:
    return {"cpu": sizes, "cuda": sizes}


def _kernels() -> Iterator[Bench]:
    what = {
        "kernel": "as the solvers call it",
        "eager": "its reference, one operation after another",
        "compiled": "its reference under torch.compile",
    }
    for kernel in KERNELS:
        for subject, moved, marks in (
            (kernel, LAUNCH_BOUND, ()),
            (f"{kernel}, large", BANDWIDTH_BOUND, ("gpu",)),
        ):
            for contestant, does in what.items():
                yield Bench(
                    "kernels",
                    subject,
                    contestant,
                    does,
                    partial(setups.kernel, kernel, contestant),
                    _everywhere(moved=moved),
                    (f"tests/kernels/test_{kernel}.py",),
                    ("gpu",) if contestant == "compiled" else marks,
                )


def _host() -> Iterator[Bench]:
    for pipeline in PIPELINES:
        for loop in LOOPS:
            yield Bench(
                "host",
                pipeline,
                loop,
                "a call whose network returns at once",
                partial(setups.host, pipeline, loop),
                _everywhere(steps=100),
                ("tests/test_host_time.py",),
                compared=(pipeline, loop) in {("SD DDIM", "srds"), ("SD DDIM", "sequential"), ("Flux flow", "srds")},
            )
    for method in PLANNED:
        yield Bench(
            "host",
            "planning",
            method,
            "from settings to the first wave, nothing known before; auto: a search by a given c(rows)",
            partial(setups.planning, method),
            _everywhere(steps=100),
            ("tests/test_program.py", "tests/test_solvers.py"),
            compared=method in ("srds", "auto"),
        )


def _ranges() -> Iterator[Bench]:
    for contestant, does in (("off", "nobody looks"), ("on", "ranges are pushed"), ("trace", "and kept in a trace")):
        yield Bench(
            "ranges",
            "SD DDIM",
            contestant,
            f"a call whose network returns at once, {does}",
            partial(setups.ranges, contestant),
            _everywhere(steps=100),
            ("tests/test_host_time.py",),
        )


def _samplers() -> Iterator[Bench]:
    for method in METHODS:
        yield Bench(
            "samplers",
            "mixture",
            method,
            "Gaussian mixture in closed form, 64 dimensions, float64, on the CPU",
            partial(setups.sampler, method),
            _everywhere(steps=100, samples=1),
            (_TESTS_OF_METHODS.get(method, "tests/test_solvers.py"),),
            compared=True,
        )


def _end_to_end() -> Iterator[Bench]:
    for workload in WORKLOADS:
        for engine, marks in (("eager", ()), ("graph", ("gpu",))):
            for method in ("stock", *METHODS):
                if (method, engine) == ("stock", "graph"):
                    continue
                yield Bench(
                    "end-to-end",
                    workload,
                    method if engine == "eager" else f"{method}, {engine}",
                    "the pipeline's own loop" if method == "stock" else f"a whole call, {engine}",
                    partial(setups.end_to_end, workload, method, engine),
                    {"cpu": {"steps": 12}, "cuda": {"steps": 50}},
                    (_TESTS_OF_WORKLOADS.get(workload, "tests/test_takeover.py"),),
                    (*marks, *(() if workload in _TESTS_OF_WORKLOADS else ("slow",))),
                    compared=workload == "digits" and engine == "eager" and method in ("srds", "collocation"),
                )


def _rows() -> Iterator[Bench]:
    for workload in WORKLOADS:
        for rows in (*ROWS_ON_CPU, *ROWS_ON_GPU):
            yield Bench(
                "rows",
                workload,
                f"{rows}",
                "one call of the network with so many rows",
                partial(setups.rows, workload, rows),
                tests=("tests/test_row_inputs.py",),
                marks=() if rows in ROWS_ON_CPU else ("gpu",),
            )


GROUPS = (_kernels, _host, _ranges, _samplers, _end_to_end, _rows)
REGISTRY: dict[str, Bench] = {bench.name: bench for benches in GROUPS for bench in benches()}


def main() -> None:
    for name, bench in REGISTRY.items():
        marks = f" [{', '.join(bench.marks)}]" if bench.marks else ""
        print(f"{name}: {bench.what}{marks}{', compared' if bench.compared else ''}")


if __name__ == "__main__":
    main()

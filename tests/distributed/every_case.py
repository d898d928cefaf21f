"""Every method with every kind of call, and every fault at every wave on every rank: prints two tables.

python tests/distributed/every_case.py [--ranks 2] [--only answers|faults|lost] [--json FILE]

The processes are forked from this one, which has imported everything: a start takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine may not know its own name

import diffusers
import torch
import torch.distributed as dist
from cancelling import Network
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from ranked import apart, latents, noise, pipeline, rank, sampled
from torch import Tensor, nn

import srds_fast
from srds_fast.solvers.registry import BY_NAME

STEPS = 8
# seconds: of the group, where ranks are lost; and after which a case counts as a hang
TIMEOUT, HANG = 3.0, 60.0
WORST = 1e-6

# ---- the same answer


def images(name: str, **more: Any) -> Callable[..., dict[str, Any]]:
    """A pipeline, with one process, with all ranks, and as stock."""
    scheduler = more.pop("scheduler", None)

    def case(method: str, *, exact: bool) -> dict[str, Any]:
        pipe, call = pipeline(name)
        if scheduler is not None:
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        call = {**call, **more, "num_inference_steps": STEPS}
        if name == "ddim":
            call["output_type"] = "pt"
        found, states = [], []
        for parallel in (None, "auto", "stock"):
            fast = (
                pipe
                if parallel == "stock"
                else srds_fast.compile(
                    pipe, method=method, exact=exact, parallel=parallel, tolerance=None if exact else 4e-3
                )
            )
            torch.manual_seed(11)
            generator = torch.Generator().manual_seed(3)
            found.append(torch.as_tensor(fast(**call, generator=generator).images))
            states.append((generator.get_state(), torch.get_rng_state()))
        return compared(found, states)

    return case


def denoised(scheduler: Any, cond: bool = False) -> Callable[..., dict[str, Any]]:
    """The same for `sample`; stock is the sequential method of one process."""

    def case(method: str, *, exact: bool) -> dict[str, Any]:
        network = nn.Linear(8, 8, dtype=torch.float64).requires_grad_(False)
        for each in network.parameters():
            nn.init.constant_(each, 0.1)

        def denoiser(x: Tensor, t: Tensor, goal: Tensor | float = 0.0) -> Tensor:
            return torch.tanh(network(x) - goal) * (1 + t[:, None] / 1000)

        more = {"cond": {"goal": noise(3)}} if cond else {}
        x = noise() * scheduler.init_noise_sigma
        found, states = [], []
        for parallel, how in ((None, method), ("auto", method), (None, "sequential")):
            torch.manual_seed(11)
            generator = torch.Generator().manual_seed(5)
            settings = {"exact": True} if exact and how == method else {}
            result = srds_fast.sample(
                denoiser, x, scheduler, STEPS, method=how, generator=generator, parallel=parallel, **settings, **more
            )
            found.append(result.sample)
            states.append((generator.get_state(), torch.get_rng_state()))
        return compared(found, states)

    return case


def compared(found: list[Tensor], states: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    alike = all(torch.equal(one, other) for state in states[:2] for one, other in zip(state, states[2], strict=True))
    return {"one": apart(found[1], found[0]), "stock": apart(found[1], found[2]), "states": alike}


CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    "Stable Diffusion, guidance": images("stable_diffusion"),
    "Stable Diffusion XL": images("stable_diffusion_xl"),
    "Flux, true guidance": images("flux", true_cfg_scale=2.0, negative_prompt="a dog"),
    "DDIM": images("ddim"),
    "Stable Diffusion, Euler ancestral": images("stable_diffusion", scheduler=EulerAncestralDiscreteScheduler),
    "sample, cond": denoised(DDIMScheduler(), cond=True),
    "sample, DDPM": denoised(DDPMScheduler(clip_sample=False)),
}


def answers() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, case in CALLS.items():
        for method in BY_NAME:
            for exact in (False, True):
                try:
                    found[f"{name}|{method}|{exact}"] = case(method, exact=exact)
                except srds_fast.SrdsFastError as error:
                    found[f"{name}|{method}|{exact}"] = {"refused": type(error).__name__, "why": str(error)[:200]}
    return found


# ---- faults


class Faulty:
    """Acts on the output of a network call with a number, on one rank."""

    def __init__(self, act: Callable[[Tensor], Any] | None = None, at: int = 0, on: int = 0) -> None:
        self.act, self.at, self.on, self.calls, self.fired = act, at, on, 0, False

    def __call__(self, output: Tensor) -> Any:
        self.calls += 1
        if self.act is None or (self.calls, rank()) != (self.at, self.on):
            return output
        self.fired = True
        return self.act(output)


def _raised(error: BaseException) -> Callable[[Tensor], Any]:
    def act(m: Tensor) -> Any:
        raise error

    return act


FAULTS: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...]]] = {
    "exception": (_raised(ValueError("broken")), ("RankFailed",)),
    "Ctrl-C": (_raised(KeyboardInterrupt()), ("RankFailed", "KeyboardInterrupt")),
    "NaN": (lambda m: m * float("nan"), ("RankFailed", "DivergenceError")),
    "wrong shape": (lambda m: m[..., :-1], ("RankFailed",)),
    "out of memory": (_raised(torch.OutOfMemoryError("none")), ("RankFailed", "OutOfMemoryError")),
}


class Through(Network):
    def __init__(self, fault: Faulty) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.fault(super().forward(x, t))


def of_samples(method: str) -> Callable[[], Callable[[Faulty], Tensor]]:
    def make() -> Callable[[Faulty], Tensor]:
        return lambda fault: (
            sampled(Through(fault), method=method, parallel="auto", steps=STEPS, exact=method != "auto").sample
        )

    return make


def of_pipelines(**how: Any) -> Callable[[], Callable[[Faulty], Tensor]]:
    def make() -> Callable[[Faulty], Tensor]:
        pipe, call = pipeline("stable_diffusion")
        call["num_inference_steps"] = 6
        fast = srds_fast.compile(pipe, method="srds", exact=True, parallel="auto")

        def run(fault: Faulty) -> Tensor:
            def after(module: Any, args: Any, output: Any) -> Any:
                found = fault(output[0])
                return (found,) if isinstance(output, tuple) else type(output)(found)

            handle = pipe.unet.register_forward_hook(after)
            try:
                return latents(fast, {**call, **how})
            finally:
                handle.remove()

        return run

    return make


WAYS: dict[str, Callable[[], Callable[[Faulty], Tensor]]] = {
    "sample, srds": of_samples("srds"),
    "sample, collocation": of_samples("collocation"),
    "sample, sequential": of_samples("sequential"),
    "sample, auto": of_samples("auto"),
    "pipeline, recorded calls": of_pipelines(),
    "pipeline, its own turns": of_pipelines(callback_on_step_end=lambda *_: {}),
    "pipeline, its own loop": of_pipelines(callback=lambda *_: None, callback_steps=1),
}


def tried(run: Callable[[], Tensor], right: Callable[[Tensor], bool]) -> str:
    """How a call has ended: the class of its error, or whether its sample is right."""
    try:
        found = run()
    except BaseException as error:
        return type(error).__name__
    return "right" if right(found) else "WRONG"


def faults() -> dict[str, Any]:
    """By way and fault: of each place the rank, and how the call and the next one have ended."""
    ended: dict[str, list[Any]] = {}
    for way, make in WAYS.items():
        run = make()
        expected = run(Faulty())
        bound = 4e-3 if "auto" in way else 1e-5

        def right(found: Tensor, expected: Tensor = expected, bound: float = bound) -> bool:
            return bool(found.shape == expected.shape) and apart(found, expected) <= bound

        for name, (act, _) in FAULTS.items():
            for on in range(dist.get_world_size()):
                for at in range(1, 200):
                    fault = Faulty(act, at, on)
                    how = tried(lambda: run(fault), right)  # noqa: B023
                    if not agreed(fault.fired):
                        break
                    after = tried(lambda: run(Faulty()), right)  # noqa: B023
                    ended.setdefault(f"{way}|{name}", []).append([on, at, how, after])
    return ended


def agreed(fired: bool) -> bool:
    """Whether it has on any rank."""
    found = torch.tensor([float(fired)])
    dist.all_reduce(found)
    return bool(found)


def differences() -> dict[str, Any]:
    """Calls with something different on one rank, and the next call."""
    ended: dict[str, list[Any]] = {}
    pipe, call = pipeline("stable_diffusion")
    call["num_inference_steps"] = 6
    fast = srds_fast.compile(pipe, method="srds", parallel="auto")
    expected = latents(fast, call)

    def right(found: Tensor) -> bool:
        return apart(found, expected) <= 1e-6

    for on in range(dist.get_world_size()):
        here, weight = rank() == on, next(pipe.unet.parameters())

        def with_weight() -> Tensor:
            kept = weight.detach().clone()  # noqa: B023
            try:
                with torch.no_grad():
                    weight.add_(1e-7 * here)  # noqa: B023
                return latents(fast, call)
            finally:
                with torch.no_grad():
                    weight.copy_(kept)  # noqa: B023

        ways: dict[str, Callable[[], Tensor]] = {
            "prompt": lambda: latents(fast, {**call, "prompt": "a fox" if here else "a dog"}),  # noqa: B023
            "seed": lambda: latents(fast, call, 4 if here else 3),  # noqa: B023
            "steps": lambda: latents(fast, {**call, "num_inference_steps": 7 if here else 6}),  # noqa: B023
            "weights": with_weight,
        }
        for name, way in ways.items():
            how = tried(way, lambda found: False)
            ended.setdefault(f"pipeline|different {name}", []).append(
                [on, 0, how, tried(lambda: latents(fast, call), right)]
            )
    return ended


# ---- lost ranks


def _die(m: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return m


def _sleep(m: Tensor) -> Tensor:
    time.sleep(2 * TIMEOUT)
    return m


LOST: dict[str, Callable[[Tensor], Tensor]] = {"SIGKILL": _die, "sleep beyond the timeout": _sleep}
LOSING = ("sample, srds", "pipeline, recorded calls", "pipeline, its own turns")


def losing(way: str, kind: str, at: int, on: int) -> Callable[[], Any]:
    def run() -> Any:
        call = WAYS[way]()
        fault = Faulty(LOST[kind], at, on)
        how = tried(lambda: call(fault), lambda found: False)
        return [fault.fired, how, tried(lambda: call(Faulty()), lambda found: False)]

    return run


# ---- processes


@contextmanager
def forked(size: int, timeout: float, run: Callable[[], Any]) -> Iterator[dict[int, Any]]:
    """What each rank returns that comes to its end; ranks that do not within HANG are killed, and give "hang"."""
    folder = Path(tempfile.mkdtemp())
    children = {}
    for number in range(size):
        if (child := os.fork()) == 0:
            _child(number, size, timeout, run, folder)
        children[child] = number
    found: dict[int, Any] = {}
    deadline = time.monotonic() + HANG if run.__name__ == "run" else None
    while children:
        child, _ = os.waitpid(-1, os.WNOHANG)
        if child:
            children.pop(child, None)
        elif deadline is not None and time.monotonic() > deadline:
            for each, number in children.items():
                os.kill(each, signal.SIGKILL)
                found[number] = "hang"
            deadline += HANG
        else:
            time.sleep(0.02)
    for path in folder.glob("*.json"):
        found[int(path.stem)] = json.loads(path.read_text())
    shutil.rmtree(folder)
    yield found


def _child(number: int, size: int, timeout: float, run: Callable[[], Any], folder: Path) -> None:
    """The life of a rank."""
    try:
        torch.set_num_threads(1)
        store = f"file://{folder}/store"
        dist.init_process_group(
            "gloo", init_method=store, rank=number, world_size=size, timeout=timedelta(seconds=timeout)
        )
        found = run()
        (folder / f"{number}.json").write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def shown(title: str, rows: list[tuple[Any, ...]], columns: tuple[str, ...]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    sys.stdout.flush()


def show_answers(size: int) -> int:
    """Print the table; how many calls are not as they should be."""
    with forked(size, 600, answers) as by_rank:
        pass
    bad = size - len(by_rank)
    rows = []
    for name in CALLS:
        cells = [(key, of_rank[key]) for of_rank in by_rank.values() for key in of_rank if key.split("|")[0] == name]
        made = [(key, each) for key, each in cells if "one" in each]
        exact = [each["stock"] for key, each in made if key.endswith("True")]
        wrong = [
            (key, each)
            for key, each in made
            if each["one"] > WORST or not each["states"] or (key.endswith("True") and each["stock"] > WORST)
        ]
        for each in wrong:
            print("not as it should be:", each)
        bad += len(wrong)
        refused = {f"{key.split('|')[1]}: {each['refused']}" for key, each in cells if "refused" in each}
        most = max((each["one"] for _, each in made), default=0.0)
        states = sum(each["states"] for _, each in made)
        rows.append(
            (
                name,
                len(made),
                f"{most:.1e}",
                f"{max(exact, default=0.0):.1e}",
                f"{states} of {len(made)}",
                ", ".join(sorted(refused)) or "none",
            )
        )
    columns = (
        "call",
        "calls",
        "from one process, at most",
        "exact=True from stock, at most",
        "generators as in stock",
        "refused",
    )
    shown(f"{size} ranks: every method, with and without exact=True", rows, columns)
    return bad


def show_faults(size: int) -> int:
    """The same for faults that ranks survive."""
    found: dict[str, dict[int, list[Any]]] = {}
    for run in (faults, differences):
        with forked(size, 120, run) as by_rank:
            if len(by_rank) < size:
                print(f"{size - len(by_rank)} ranks did not come to their end")
                return 1
            for number, ended in by_rank.items():
                for key, cases in ended.items():
                    found.setdefault(key, {})[number] = cases
    rows, bad = [], 0
    for key, by_number in found.items():
        way, kind = key.split("|")
        allowed = FAULTS[kind][1] if kind in FAULTS else ("RankMismatch",)
        count: Counter[str] = Counter()
        for cases in zip(*(by_number[number] for number in sorted(by_number)), strict=True):
            ends = [case[2] for case in cases]
            after = all(case[3] == "right" for case in cases)
            if all(each == "right" for each in ends):
                count["right sample"] += 1
            elif all(each in allowed for each in ends) and (kind == "Ctrl-C" or len(set(ends)) == 1):
                count["right error"] += 1
            else:
                count["WRONG"] += 1
                print("not as it should be:", key, cases)
            count["next call right"] += after
            if not after:
                print("not as it should be after it:", key, cases)
        total = count["right sample"] + count["right error"] + count["WRONG"]
        bad += count["WRONG"] + total - count["next call right"]
        rows.append(
            (way, kind, total, count["right error"], count["right sample"], count["WRONG"], 0, count["next call right"])
        )
    columns = (
        "call",
        "fault, on one rank",
        "places",
        "same error on all",
        "right sample on all",
        "wrong",
        "hangs",
        "next call right",
    )
    shown(f"{size} ranks: faults at every network call on every rank", rows, columns)
    return bad


def show_lost(size: int) -> int:
    """The same for ranks that are lost, at every network call of each rank."""
    rows, bad = [], 0
    for way in LOSING:
        for kind in LOST:
            count: Counter[str] = Counter()
            for on in range(size):
                for at in range(1, 100):
                    with forked(size, TIMEOUT, losing(way, kind, at, on)) as by_rank:
                        others = [by_rank.get(number, "died") for number in range(size) if number != on]
                    if kind == "SIGKILL" and on in by_rank and by_rank[on] != "hang" and not by_rank[on][0]:
                        break
                    if kind != "SIGKILL" and by_rank.get(on) not in (None, "hang") and not by_rank[on][0]:
                        break
                    count["places"] += 1
                    if "hang" in by_rank.values():
                        count["hang"] += 1
                    elif all(each[1:] == ["RankLost", "RankLost"] for each in others):
                        count["RankLost"] += 1
                    else:
                        count["WRONG"] += 1
                    if others and (count["hang"] or count["WRONG"]):
                        print("not as it should be:", way, kind, on, at, by_rank)
            bad += count["hang"] + count["WRONG"]
            rows.append((way, kind, count["places"], count["RankLost"], count["WRONG"], count["hang"]))
    shown(
        f"{size} ranks: a rank is lost",
        rows,
        ("call", "fault", "places", "RankLost on the others, twice", "wrong", "hangs"),
    )
    return bad


PARTS = {"answers": show_answers, "faults": show_faults, "lost": show_lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", choices=PARTS)
    given = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    bad = sum(show(given.ranks) for name, show in PARTS.items() if given.only in (None, name))
    print(f"\n{bad} not as they should be")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

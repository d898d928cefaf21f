"""Every method with every kind of call: with all ranks as with one process, and as stock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from forking import forked, shown
from ranked import apart, noise, pipeline
from torch import Tensor, nn

import srds_fast
from srds_fast.solvers.registry import BY_NAME

STEPS = 8
WORST = 1e-6


def images(name: str, **more: Any) -> Callable[..., dict[str, Any]]:
    """A pipeline, with one process, with all ranks, and as stock."""
    scheduler = more.pop("scheduler", None)

    def case(method: str, *, exact: bool) -> dict[str, Any]:
        pipe, call = pipeline(name)
        if scheduler is not None:
            pipe = type(pipe)(**{**pipe.components, "scheduler": scheduler.from_config(pipe.scheduler.config)})
            pipe.set_progress_bar_config(disable=True)
        call = {**call, **more, "num_inference_steps": STEPS}
        if name == "ddim":
            call["output_type"] = "pt"
        found, states = [], []
        for parallel in (None, "auto", "stock"):
            fast = (
                pipe if parallel == "stock" else srds_fast.compile(pipe, method=method, exact=exact, parallel=parallel)
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


def show_answers(size: int) -> int:
    """Print the table; how many calls are not as they should be."""
    by_rank = forked(size, 3600, answers)
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

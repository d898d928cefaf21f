"""A pipeline on two engines, side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import tiny
import torch
from calls import denoiser
from torch import Tensor, nn
from waiting import ended

import srds_fast

STEPS = 3
FIRST = "this is the first call of its kind"


class Twins:
    """A pipe compiled for graphs and compiled to run eagerly. Both must give the same result for every call.

    name: in tiny.PIPELINES; Flux records fastest. graphs: settings of the graph engine alone. settings: of both.
    """

    def __init__(
        self,
        name: str = "flux",
        pipe: Any = None,
        graphs: dict[str, Any] | None = None,
        engine: str = "graph",
        **settings: Any,
    ) -> None:
        self.engine = {"graph": "loop graph", "network-graphs": "network graphs"}[engine]
        build, base = tiny.PIPELINES[name]
        self.base = {"num_inference_steps": STEPS, **base}
        self.pipe = build() if pipe is None else pipe
        settings = settings or {"method": "srds", "num_blocks": 3, "exact": True}
        self.fast = srds_fast.compile(self.pipe, **{"engine": engine, "method": "srds", **settings, **(graphs or {})})
        self.eager = srds_fast.compile(self.pipe, engine="eager", **{"method": "srds", **settings})

    @property
    def network(self) -> Any:
        return denoiser(self.pipe)

    @property
    def report(self) -> Any:
        return self.fast.report

    @property
    def counts(self) -> tuple[int, int]:
        """Recordings made, calls replayed."""
        return self.fast.graphs.captured, self.fast.graphs.replayed

    def alone(self, each: Any, seed: int = 0, **call: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The result of one of them, and the states of its generator and of the global one afterwards."""
        torch.manual_seed(7)
        generator = torch.Generator().manual_seed(seed)
        found = torch.as_tensor(each(**{**self.base, **call}, generator=generator)[0])
        return found, generator.get_state(), torch.get_rng_state()

    def same(self, seed: int = 0, relative: float = 0.0, **call: Any) -> Tensor:
        """The result of both; whichever engine ran."""
        found, *states = self.alone(self.fast, seed, **call)
        expected, *expected_states = self.alone(self.eager, seed, **call)
        assert self.eager.report.engine == "eager"
        assert found.shape == expected.shape
        assert bool(expected.isfinite().all())
        if relative == 0.0:
            assert torch.equal(found, expected)
        assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(states, expected_states, strict=True))
        return found

    def first(self, seed: int = 0, relative: float = 0.0, **call: Any) -> Tensor:
        """A call of a kind that has not been seen."""
        captured = self.fast.graphs.captured
        found = self.same(seed, relative, **call)
        assert self.report.engine == "eager"
        assert self.report.engine_reason.startswith(FIRST)
        assert self.report.capture_seconds > 0
        assert self.fast.graphs.captured == captured + 1
        return found

    def replayed(self, seed: int = 0, relative: float = 0.0, **call: Any) -> Tensor:
        """A call that replays, and records nothing."""
        captured = self.fast.graphs.captured
        found = self.same(seed, relative, **call)
        assert self.report.engine == self.engine
        assert self.report.path == "takeover"
        assert self.report.engine_reason is None
        assert self.report.capture_seconds == 0
        assert self.fast.graphs.captured == captured
        if relative == 0.0:  # a batch that is not narrowed evaluates more
            ours, theirs = self.report.to_dict(), self.eager.report.to_dict()
            may_differ = {"seconds", "speedup", "engine", "dropped_waves"}
            may_differ |= {f"{what}_{unit}" for what in ("check", "rehearsal") for unit in ("calls", "seconds")}
            assert {name for name in ours if ours[name] != theirs[name]} <= may_differ
        return found

    def eagerly(self, why: str, seed: int = 0, **call: Any) -> Tensor:
        """A call that runs eagerly for a reason that names this."""
        found = self.same(seed, **call)
        assert self.report.engine == "eager"
        assert why in self.report.engine_reason
        return found


def differ(*results: Tensor) -> bool:
    """Whether no two of them are equal."""
    return all(not torch.equal(one, other) for number, one in enumerate(results) for other in results[:number])


class Act(nn.Module):
    """A layer, and what is made of its output."""

    def __init__(self, layer: nn.Module, act: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.layer = layer
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


def put(twins: Twins, act: Callable[[Tensor], Tensor] | None = None, kind: Callable[..., nn.Module] = Act) -> Any:
    """Put a layer of that kind around the network's last one."""
    layer = twins.network.proj_out
    twins.network.proj_out = made = (kind(layer) if act is None else kind(layer, act)).eval()
    return made


def in_a_thread(function: Callable[[], Any]) -> Any:
    """The result of a function in a separate thread; fails if it does not end."""
    results: list[Any] = []

    def work() -> None:
        torch.set_num_threads(1)
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ended(thread), "it waits for a device that nobody gives back"
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]

"""The network that a plan was measured with, by a digest that every call asks for."""

from __future__ import annotations

from typing import Any

import torch
from problems import scheduler
from torch import nn

from srds_fast.planner.context import context_of
from srds_fast.schedulers.verify import noise_table


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 3)))


def of(module: nn.Module) -> str | None:
    steps = scheduler()
    steps.set_timesteps(4)
    return context_of(torch.device("cpu"), noise_table(steps), [module]).network


def test_networks_of_the_same_form_are_alike_and_others_are_not() -> None:
    own: Any = network()
    before = of(own)
    assert before == of(own) == of(network())
    own[0].weight.data.zero_()
    assert of(own) == before, "what the weights are does not count"
    own[2][0] = nn.Linear(4, 3, bias=False)
    without = of(own)
    own[2][0].weight = nn.Parameter(torch.zeros(5, 4))
    wider = of(own)
    own.double()
    assert len({before, without, wider, of(own)}) == 4
    own.register_parameter("scale", nn.Parameter(torch.zeros(1)))
    scaled = of(own)
    own.factor = own.scale
    del own.scale
    assert scaled != of(own), "another name of the same parameter"

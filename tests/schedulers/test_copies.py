"""Copies of schedulers: deep, but for what cannot be written to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from srds_fast.schedulers.own_loop import copy_scheduler
from srds_fast.schedulers.reader import state_key


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_a_copy_holds_the_same_and_shares_no_tensor_and_no_list(cls: Any) -> None:
    scheduler = cls()
    scheduler.set_timesteps(5)
    scheduler.kept = [torch.ones(2)]
    found = copy_scheduler(scheduler)
    assert type(found) is cls
    assert state_key(found) == state_key(scheduler) == state_key(copy.deepcopy(scheduler))
    for name, value in vars(found).items():
        if isinstance(value, Tensor):
            assert value.data_ptr() != vars(scheduler)[name].data_ptr()
    assert found.kept is not scheduler.kept
    assert found.kept[0].data_ptr() != scheduler.kept[0].data_ptr()


def test_a_tensor_or_scheduler_that_is_held_twice_stays_one() -> None:
    scheduler = DDIMScheduler()
    scheduler.itself, scheduler.again = scheduler, [scheduler.alphas]
    found = copy_scheduler(scheduler)
    assert found.itself is found
    assert found.again[0] is found.alphas

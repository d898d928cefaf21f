from __future__ import annotations

import copy
from itertools import product
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UnCLIPScheduler,
)
from every_scheduler import HISTORIES, READ, has_table, made
from thinned import thinned, thinned_product

import srds_fast
import srds_fast.schedulers.verify as noise_module
from srds_fast.errors import UnsupportedScheduler
from srds_fast.kernels.common.clamping import Threshold
from srds_fast.sampling.rows import draw_noise
from srds_fast.schedulers.own_loop import OwnLoop, StepCall
from srds_fast.schedulers.private_draws import Seeded
from srds_fast.schedulers.reader import InFloat64
from srds_fast.schedulers.table import NoiseTable
from srds_fast.schedulers.verify import check_scheduler, noise_table

PREDICTIONS, SPACINGS = ("epsilon", "v_prediction", "sample"), ("leading", "trailing", "linspace")


def options(**columns: tuple[object, ...]) -> list[dict[str, object]]:
    """The product of options."""
    return [dict(zip(columns, values, strict=True)) for values in product(*columns.values())]


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
DDIM = [
    *options(
        timestep_spacing=SPACINGS,
        set_alpha_to_one=(True, False),
        prediction_type=PREDICTIONS,
        clip_sample=(True, False),
    ),
    ZERO_SNR,
    {"rescale_betas_zero_snr": True, "prediction_type": "sample", "timestep_spacing": "linspace"},
    {"beta_schedule": "squaredcos_cap_v2", "steps_offset": 1},
    {"clip_sample_range": 0.5},
]
EULER = [
    *options(timestep_spacing=SPACINGS, prediction_type=PREDICTIONS),
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"},
    ZERO_SNR,
    {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    {"interpolation_type": "log_linear"},
]
FLOW: list[dict[str, object]] = [{}, {"shift": 3.0}, {"use_karras_sigmas": True}, {"shift_terminal": 0.1}]
DPM = [
    *options(solver_type=("midpoint", "heun"), timestep_spacing=SPACINGS, prediction_type=PREDICTIONS),
    {"solver_order": 1},
    {"solver_order": 1, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    {"final_sigmas_type": "sigma_min", "euler_at_final": True},
    {"use_karras_sigmas": True},
    {"use_lu_lambdas": True},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
]
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
DDPM = [
    *options(variance_type=VARIANCES, clip_sample=(True, False), prediction_type=PREDICTIONS),
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace", "steps_offset": 1},
]
ANCESTRAL = options(timestep_spacing=SPACINGS, prediction_type=PREDICTIONS[:2])
VARIANTS = {
    DDIMScheduler: DDIM,
    EulerDiscreteScheduler: EULER,
    FlowMatchEulerDiscreteScheduler: FLOW,
    DPMSolverMultistepScheduler: DPM,
    DDPMScheduler: DDPM,
    EulerAncestralDiscreteScheduler: ANCESTRAL,
}
NO_STEP = FlowMatchEulerDiscreteScheduler, {"shift_terminal": 0.1}  # with one step only
CASES = [(scheduler, config) for scheduler, configs in VARIANTS.items() for config in configs]


def name_of(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(map(name_of, value))
    if isinstance(value, dict):
        return "-".join(f"{key}={entry}" for key, entry in value.items()) or "default"
    return getattr(value, "__name__", str(value))


WALKS = [(case, num_steps) for case in CASES for num_steps in (1, 7, 20, 30) if num_steps > 1 or case != NO_STEP]


@pytest.mark.parametrize(("case", "num_steps"), thinned(WALKS), ids=name_of)
def test_the_table_walks_as_the_scheduler_does(case: tuple[type, dict], num_steps: int) -> None:
    """Along a whole trajectory, so that a wrong arrival would add up."""
    cls, config = case
    scheduler = cls(**config)
    scheduler.set_timesteps(num_steps)
    walk(scheduler, noise_table(scheduler))


@pytest.mark.parametrize(("config", "eta"), thinned_product(DDIM, [0.3, 1.0]), ids=name_of)
def test_the_table_walks_as_ddim_with_eta_does(config: dict, eta: float) -> None:
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(20)
    walk(scheduler, noise_table(scheduler, eta=eta))


def walk(scheduler: object, table: NoiseTable) -> None:
    """Both walk the same outputs and draw the same noise, which each takes from a generator of its own."""
    draw = torch.Generator().manual_seed(1)
    stock_noise, our_noise = (torch.Generator().manual_seed(2) for _ in range(2))
    loop = OwnLoop(scheduler, table.call, generator=stock_noise)
    stock = ours = torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64) * table.init_noise_sigma
    torch.manual_seed(2)  # some draw from the global generator
    draws = draw_noise(table, stock, torch.float64, our_noise)
    torch.manual_seed(2)
    x0 = None
    for index in range(table.num_steps):
        m = torch.randn(ours.shape, generator=draw, dtype=torch.float64)
        torch.testing.assert_close(table.input_scale[index] * ours, loop.scaled(stock), rtol=1e-5, atol=1e-5)
        stock = loop.step(m, stock)
        ours, x0 = table.step(index, ours, m, x0, None if draws is None else draws[index])
    # DDIM and DDPM step in the dtype of the sample; the others round the sample to float32
    tolerance = 1e-10 if type(scheduler) in (DDIMScheduler, DDPMScheduler) else 1e-5
    torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance * float(stock.abs().max()))
    assert torch.equal(our_noise.get_state(), stock_noise.get_state())


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_part_of_a_table_walks_as_the_scheduler_that_begins_there(cls: type) -> None:
    scheduler = cls()
    scheduler.set_timesteps(20)
    part = noise_table(scheduler).part(6, 20)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(6)
    stock = ours = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = None
    for index, t in enumerate(scheduler.timesteps[6:]):
        m = torch.tanh(stock)
        stock = scheduler.step(m, t, stock).prev_sample
        ours, x0 = part.step(index, ours, m, x0)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "config"), HISTORIES, ids=str)
def test_a_part_of_a_table_with_memory_is_the_loop_that_begins_there(name: str, config: dict) -> None:
    """Its first steps are of lower order, as those of img2img; what ends earlier ends with the same steps."""
    scheduler = made(name, config)
    table = noise_table(scheduler)
    part, whole = table.part(6, table.num_steps - 2), table.part(0, table.num_steps - 2)
    for grid, start in ((part, 6), (whole, 0)):
        generator = torch.Generator().manual_seed(0)
        loop = OwnLoop(scheduler, StepCall.of(scheduler), start, generator=generator.clone_state())
        stock = ours = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        carried = None
        with InFloat64(tuple(stock.shape)):
            for index in range(grid.num_steps):
                loop.scaled(stock)
                m, z = torch.tanh(stock), None
                if grid.draws is not None and bool(grid.draws[index]):
                    z = torch.randn(
                        2, 3, generator=generator, dtype=grid.draw_dtypes.get((m.dtype, m.dtype), m.dtype)
                    ).double()
                stock = loop.step(m, stock)
                ours, carried = grid.step(index, ours, m, carried, z)
        # in what precision noise is drawn may depend on the rounding
        tolerance = 1e-9 if grid.draws is None else 1e-5
        torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance)
        assert torch.equal(grid.timesteps, scheduler.timesteps[start:-2])
    assert table.part(6, table.num_steps - 2) is part, "solvers cache by the identity of a table"


@pytest.mark.parametrize("cut", [1, 3, 9])
@pytest.mark.parametrize(("name", "config"), HISTORIES, ids=str)
def test_a_run_goes_on_with_what_is_carried(name: str, config: dict, cut: int) -> None:
    table = noise_table(made(name, config))
    generator = torch.Generator().manual_seed(0)
    outputs, draws = torch.randn(2, table.num_steps, 5, dtype=torch.float64, generator=generator)
    x, carried, states, given = draws[0], None, [], None
    for index, (m, z) in enumerate(zip(outputs, draws, strict=True)):
        given = (x, carried) if index == cut else given
        x, carried = table.step(index, x, m, carried, z)
        states.append(x)
    assert given is not None
    rest, (x, carried) = table.part(cut, table.num_steps, afresh=False), given
    assert carried is not None
    assert rest.carried(0) == table.carried(cut) == len(carried)
    for index in range(rest.num_steps):
        x, carried = rest.step(index, x, outputs[cut + index], carried, draws[cut + index])
        assert torch.equal(x, states[cut + index])


@pytest.mark.parametrize("clip", [True, False])
def test_clipped_epsilon_is_ddims_own(clip: bool) -> None:
    scheduler = DDIMScheduler(clip_sample=clip)
    scheduler.set_timesteps(10)
    table = noise_table(scheduler, clip_epsilon=True)
    x, m = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    stock = scheduler.step(m, scheduler.timesteps[3], x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(table.step(3, x, m)[0], stock, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bound", [{"clip_sample": False}, {"clip_sample": True}, {"thresholding": True}], ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_of_a_predicted_size_is_ddpms_own(prediction: str, bound: dict[str, Any]) -> None:
    scheduler = DDPMScheduler(variance_type="learned_range", prediction_type=prediction, **bound)
    scheduler.set_timesteps(10)
    table = noise_table(scheduler)
    for index in (0, 5, 9):  # the last one adds no noise
        x, m, v = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
        both = torch.cat((3 * m, v), 1)
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(x.shape, dtype=torch.float64, generator=generator.clone_state())
        stock = scheduler.step(both, scheduler.timesteps[index], x, generator=generator).prev_sample
        found = table.step(index, x, table.folded(index, x, both, z), None, z)[0]
        torch.testing.assert_close(found, stock, rtol=1e-5, atol=1e-5)
        part = table.part(index, 10)
        torch.testing.assert_close(part.folded(0, x, both, z), table.folded(index, x, both, z))
        if bound == {"clip_sample": False}:  # nothing is changed of m, also where x0 is much larger
            assert torch.equal(table.folded(index, x, both, None), 3 * m)


def test_sample_takes_no_predicted_size_of_noise() -> None:
    scheduler = DDPMScheduler(variance_type="learned_range")
    with pytest.raises(UnsupportedScheduler, match="further channels"):
        srds_fast.sample(lambda x, t: x, torch.zeros(1, 3, 4, 4), scheduler, 4)


def test_building_a_table_changes_nothing() -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(9)
    before, rng = copy.deepcopy(scheduler.__dict__), torch.get_rng_state()
    noise_table(scheduler)
    check_scheduler(scheduler)
    assert scheduler.__dict__.keys() == before.keys()
    assert scheduler._step_index is None
    assert torch.equal(scheduler.timesteps, before["timesteps"])
    assert torch.equal(torch.get_rng_state(), rng)


REFUSED = [
    (DPMSolverMultistepScheduler(variance_type="learned_range"), "variance_type"),
    (UnCLIPScheduler(variance_type="learned_range"), "variance_type"),
    (DDPMScheduler(variance_type="learned"), "variance_type"),
]


@pytest.mark.parametrize(("scheduler", "says"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_refused_is_named_with_a_line_that_works(scheduler: object, says: str) -> None:
    with pytest.raises(UnsupportedScheduler, match=says) as caught:
        check_scheduler(scheduler)
    # the line that the message tells the user to write
    line = str(caught.value).split("Write `")[1].split("`")[0]
    pipe = SimpleNamespace(scheduler=scheduler)
    exec(line, {"diffusers": diffusers, "pipe": pipe})
    check_scheduler(pipe.scheduler)


@pytest.mark.parametrize("name", ["UniPCMultistep", "DEISMultistep"])
def test_a_clipped_x0_among_more_that_is_kept_is_refused_with_that_reason(name: str) -> None:
    with pytest.raises(UnsupportedScheduler, match="clips x0, and needs more"):
        check_scheduler(made(name, {"thresholding": True, "solver_order": 3}))


@pytest.mark.parametrize("bound", [0.3, 1.0, 7.5])
def test_the_bound_of_an_unknown_class_that_clips_is_read(bound: float) -> None:
    class Clips(EulerDiscreteScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
            index = 0 if self.step_index is None else self.step_index
            sigma = self.sigmas[index]
            x0 = (sample - sigma * model_output).clamp(-bound, bound)
            return super().step((sample - x0) / sigma, timestep, sample)

    scheduler = Clips()
    scheduler.set_timesteps(9)
    assert noise_table(scheduler).clip == bound


@pytest.mark.parametrize("quantile", [0.5, 0.995])
def test_a_threshold_is_told_from_a_clamp(quantile: float) -> None:
    """With few steps and a low quantile, one large number among small ones would raise the threshold of all."""
    scheduler = DPMSolverMultistepScheduler(
        thresholding=True,
        dynamic_thresholding_ratio=quantile,
        sample_max_value=1.5,
        beta_schedule="squaredcos_cap_v2",
    )
    scheduler.set_timesteps(9)
    assert noise_table(scheduler).clip == Threshold(quantile, 1.5)


def test_a_step_that_bends_x0_otherwise_is_refused() -> None:
    class Bends(EulerDiscreteScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
            index = 0 if self.step_index is None else self.step_index
            sigma = self.sigmas[index]
            return super().step((sample - torch.tanh(sample - sigma * model_output)) / sigma, timestep, sample)

    with pytest.raises(UnsupportedScheduler, match=r"not linear|steps differently"):
        check_scheduler(Bends())


def test_a_changed_step_is_noticed() -> None:
    class Nudged(DDIMScheduler):
        def step(self, *args: object, **kwargs: object) -> object:
            (x, *rest) = super().step(*args, **kwargs)
            return (x * 1.0001, *rest)

    with pytest.raises(UnsupportedScheduler, match="steps differently"):
        check_scheduler(Nudged(clip_sample=False))


@pytest.mark.parametrize("fails", [False, True])
def test_of_the_steps_compared_together_the_first_that_differs_is_named(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a step behind it fails altogether."""

    class Nudged(DDIMScheduler):
        def step(self, m: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            (x, *rest) = super().step(m, timestep, *args, **kwargs)
            number = self.timesteps.tolist().index(timestep)
            if fails and number == 7:
                raise ValueError("broken")
            return (x * 1.0001 if number == 6 else x, *rest)

    monkeypatch.setattr(noise_module, "CHUNK", 4)
    with pytest.raises(UnsupportedScheduler, match=r"steps differently .* step 6 of 10"):
        check_scheduler(Nudged(clip_sample=False))


def set_to(stock: Any, num_steps: int) -> Any:
    stock.set_timesteps(num_steps)
    return stock


def test_a_check_makes_every_step_once_and_watches_those_of_diffusers_for_one_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, watched = list[int](), list[int]()

    class Own(DDIMScheduler):
        """Draws late, from the global generator."""

        draws_at: int | None = None

        def step(self, m: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            made.append(self.timesteps.tolist().index(timestep))
            (x, *rest) = super().step(m, timestep, *args, **kwargs)
            return (x + torch.randn_like(x) if made[-1] == self.draws_at else x, *rest)

    function = Seeded.__torch_function__
    monkeypatch.setattr(noise_module, "CHUNK", 8)
    monkeypatch.setattr(Seeded, "__torch_function__", lambda *given: (watched.append(1), function(*given))[1])
    counts = []
    for num_steps in (20, 40):
        noise_table(set_to(Own(clip_sample=False), num_steps))
        assert [step for step in made if step > 0] == list(range(1, num_steps)), "the first one also on trial"
        del made[:], watched[:]
        noise_table(set_to(DDIMScheduler(clip_sample=False), num_steps))
        counts.append(len(watched))
    assert counts[0] == counts[1] > 0

    Own.draws_at, state = 19, torch.get_rng_state()
    with pytest.raises(UnsupportedScheduler, match=r"steps differently .* step 19 of 20"):
        noise_table(set_to(Own(clip_sample=False, beta_end=0.03), 20))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_table_is_checked_once_and_again_when_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []
    check = noise_module._check_against
    monkeypatch.setattr(noise_module, "_check_against", lambda *given: (checks.append(1), check(*given)))
    monkeypatch.setattr(noise_module, "_checked", {})
    scheduler = DDIMScheduler(clip_sample=False)
    for num_steps, expected in ((10, 1), (10, 1), (20, 2), (10, 2)):
        scheduler.set_timesteps(num_steps)
        assert noise_table(scheduler).num_steps == num_steps
        assert len(checks) == expected
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    assert float(noise_table(scheduler).alpha[0]) == float(scheduler.alphas_cumprod[scheduler.timesteps[0]].sqrt())
    scheduler.step = lambda m, t, x, **options: (x,)
    with pytest.raises(UnsupportedScheduler, match="steps differently"):
        noise_table(scheduler)


@pytest.mark.parametrize("cls", ["DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"])
def test_a_timestep_beyond_the_schedule_is_refused(cls: str) -> None:
    scheduler = getattr(diffusers, cls)(steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(1000)
    with pytest.raises(UnsupportedScheduler, match="timestep 1000"):
        noise_table(scheduler)


def test_a_division_by_zero_is_refused() -> None:
    with pytest.raises(UnsupportedScheduler, match="divides by zero"):
        check_scheduler(DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    cls, config = NO_STEP
    scheduler = cls(**config)
    scheduler.set_timesteps(1)
    with pytest.raises(UnsupportedScheduler, match="divides by zero"):
        noise_table(scheduler)


@pytest.mark.parametrize(("name", "config"), thinned(READ), ids=str)
def test_a_scheduler_that_was_read_is_a_table_or_refused(name: str, config: dict) -> None:
    scheduler = made(name, config)
    if not has_table(name, config):
        with pytest.raises(UnsupportedScheduler, match="noise levels"):
            noise_table(scheduler)
        return
    table = noise_table(scheduler)
    walk(scheduler, table)
    assert torch.equal(table.timesteps, scheduler.timesteps[: table.num_steps])
    if name in ("UnCLIP", "DDPM", "CMStochasticIterative"):  # their steps do not arrive where the next one starts
        return
    arrives = table.sigma_next if table.spread is None else (table.sigma_next**2 + table.spread**2).sqrt()
    torch.testing.assert_close(table.alpha_next[:-1], table.alpha[1:], rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(arrives[:-1], table.sigma[1:], rtol=2e-4, atol=1e-5)


def test_noise_is_drawn_in_the_dtype_of_the_scheduler() -> None:
    """DPM-Solver++ SDE draws float32 whatever the network's dtype is; the same seed then gives other numbers."""
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(5)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        like = torch.zeros(2, 3, dtype=dtype)
        drawn = draw_noise(noise_table(scheduler), like, torch.float64, torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        assert drawn is not None
        for each in drawn:
            assert torch.equal(each, torch.randn(2, 3, generator=generator).double())

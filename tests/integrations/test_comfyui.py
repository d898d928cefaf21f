"""The nodes for ComfyUI, driven through ComfyUI's own samplers, guiders and model patcher where it can be imported.

Elsewhere only what needs no ComfyUI is tested: how nodes describe themselves, and what is split or refused.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srds_fast import UnsupportedPipeline
from srds_fast.integrations import comfyui
from srds_fast.integrations.comfyui.conditioning import ComfyRows
from srds_fast.integrations.comfyui.nodes import NOT_RUN, SamplerSRDS, SRDSReport
from srds_fast.solvers.registry import METHODS


def test_nodes_describe_themselves() -> None:
    assert set(comfyui.NODE_CLASS_MAPPINGS) == set(comfyui.NODE_DISPLAY_NAME_MAPPINGS)
    for node in comfyui.NODE_CLASS_MAPPINGS.values():
        inputs: dict[str, Any] = node.INPUT_TYPES()
        assert hasattr(node, node.FUNCTION)
        assert inputs["required"]
        assert node.RETURN_TYPES
    assert SamplerSRDS.INPUT_TYPES()["required"]["method"][0] == list(METHODS)
    latent = {"samples": torch.zeros(1)}
    assert SRDSReport().read(SimpleNamespace(), latent) == {"ui": {"text": [NOT_RUN]}, "result": (NOT_RUN, latent)}


def test_the_folder_loads_as_a_custom_node(tmp_path: Path) -> None:
    """As ComfyUI loads one: under a name of its own, from a link."""
    link = tmp_path / "srds_fast_nodes"
    link.symlink_to(comfyui.__path__[0], target_is_directory=True)
    spec = importlib.util.spec_from_file_location("custom_nodes_srds", link / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS is comfyui.NODE_CLASS_MAPPINGS


class FirstSigmaAlone(nn.Module):
    """A model of KSAMPLER's form whose conditioning reads the sigma of the first row for all of them."""

    def __init__(self, **conds: Any) -> None:
        super().__init__()
        self.calls: list[int] = []
        guider = type("CFGGuider", (), {"__module__": "comfy.samplers"})()
        guider.conds, guider.inner_model = {"positive": [conds]}, nn.Linear(1, 1)
        self.inner_model, self.latent_image, self.noise = guider, None, None

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        self.calls.append(len(x))
        cond = self.inner_model.conds["positive"][0]
        on = not (sigma[0] > cond.get("timestep_start", 1e9) or sigma[0] < cond.get("timestep_end", -1.0))
        return x * 0.5 + float(on)


def test_rows_are_split_where_conditioning_begins_and_ends() -> None:
    sigma, x = torch.tensor([9.0, 5.0, 5.0, 4.0, 3.0, 0.5]), torch.arange(6.0).view(6, 1)
    control = SimpleNamespace(timestep_range=(4.5, 0.0), previous_controlnet=None)
    for conds, groups in (
        ({}, 1),
        ({"timestep_start": 5.0}, 3),
        ({"timestep_start": 5.0, "timestep_end": 3.0}, 5),
        ({"control": control}, 2),
    ):
        model = FirstSigmaAlone(**conds)
        rows = ComfyRows(model, x[:1], {}, velocity=False, trust_patches=False)
        found = rows(x, sigma)
        assert len(model.calls) == groups
        expected = torch.cat([model(x[row : row + 1], sigma[row : row + 1]) for row in range(6)])
        assert torch.equal(found, expected)
        as_flow = ComfyRows(model, x[:1], {}, velocity=True, trust_patches=False)(x, sigma)
        torch.testing.assert_close(x - sigma[:, None] * as_flow, expected)


@pytest.mark.parametrize(
    ("options", "conds", "says"),
    [
        ({"sampler_cfg_function": print}, {}, "sampler_cfg_function"),
        ({"denoise_mask_function": print}, {}, "denoise_mask_function"),
        ({"transformer_options": {"patches": {"attn1": [print]}}}, {}, "patches"),
        ({}, {"hooks": 1}, "hooks"),
    ],
)
def test_what_cannot_be_split_is_refused(options: dict[str, Any], conds: dict[str, Any], says: str) -> None:
    model = FirstSigmaAlone(**conds)
    with pytest.raises(UnsupportedPipeline, match=says):
        ComfyRows(model, torch.zeros(1, 1), {"model_options": options}, velocity=False, trust_patches=False)
    if says in ("sampler_cfg_function", "patches"):
        ComfyRows(model, torch.zeros(1, 1), {"model_options": options}, velocity=False, trust_patches=True)
    model.inner_model.__class__.__module__ = "custom_nodes.other"
    with pytest.raises(UnsupportedPipeline, match="is not known"):
        ComfyRows(model, torch.zeros(1, 1), {}, velocity=False, trust_patches=False)


# ComfyUI's own code


@pytest.fixture(scope="module")
def comfy() -> Any:
    """ComfyUI's modules, on the CPU, with a tiny latent model of its own classes."""
    kept, sys.argv = sys.argv, ["main.py", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.latent_formats
        import comfy.model_base
        import comfy.model_management
        import comfy.model_patcher
        import comfy.samplers
        import comfy.supported_models_base
        import comfy_extras.nodes_custom_sampler as nodes
    except ImportError as why:
        pytest.skip(f"ComfyUI's modules cannot be imported here: {why}")
    finally:
        sys.argv = kept
    return SimpleNamespace(comfy=comfy, nodes=nodes)


def patcher(comfy: Any, flow: bool = False) -> Any:
    """A ModelPatcher around ComfyUI's BaseModel with its UNet, random weights."""
    base, torch_device = comfy.comfy.model_base, torch.device("cpu")
    unet = {
        "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": [1, 2], "use_spatial_transformer": True, "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 16,
        "use_linear_in_transformer": False, "legacy": False, "dtype": torch.float32,
    }  # fmt: skip
    heads = {"unet_extra_config": {"num_heads": 2, "num_head_channels": -1}}
    config = type("Tiny", (comfy.comfy.supported_models_base.BASE,), heads)(unet)
    config.latent_format = comfy.comfy.latent_formats.SD15()
    torch.manual_seed(0)
    kind = base.ModelType.FLOW if flow else base.ModelType.EPS
    model = base.BaseModel(config, model_type=kind, device=torch_device).eval()
    for name, each in model.named_parameters():  # ComfyUI leaves them to the checkpoint
        if each.ndim > 1:
            nn.init.normal_(each, std=0.05)
        else:
            nn.init.constant_(each, float(name.endswith("weight")))
    return comfy.comfy.model_patcher.ModelPatcher(model, torch_device, torch_device)


def cond(seed: int, **more: Any) -> list[Any]:
    return [[torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(seed)), more]]


class Run:
    """SamplerCustomAdvanced on a tiny model."""

    def __init__(self, comfy: Any, flow: bool = False, positive: Any = None, steps: int = 20) -> None:
        self.comfy, model = comfy, patcher(comfy, flow)
        self.guider = comfy.comfy.samplers.CFGGuider(model)
        self.guider.set_conds(cond(1) if positive is None else positive, cond(2))
        self.guider.set_cfg(4.0)
        sampling = model.get_model_object("model_sampling")
        self.sigmas = comfy.comfy.samplers.calculate_sigmas(sampling, "simple" if flow else "karras", steps)

    def __call__(self, sampler: Any, batch: int = 1, mask: Tensor | None = None, callback: Any = None) -> Tensor:
        latent = 0.3 * torch.ones(batch, 4, 8, 8)
        noise = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(4))
        found = self.guider.sample(
            noise, latent, sampler, self.sigmas, denoise_mask=mask, callback=callback, disable_pbar=True, seed=7
        )
        assert isinstance(found, Tensor)
        return found


def ours(name: str, method: str = "srds", **more: Any) -> Any:
    return SamplerSRDS().get_sampler(name, method, 4e-3, **more)[0]


@pytest.mark.parametrize("flow", [False, True], ids=["eps", "flow"])
@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m", "euler_ancestral", "heun"])
def test_the_sample_is_that_of_the_stock_sampler(comfy: Any, name: str, flow: bool) -> None:
    run = Run(comfy, flow)
    state = torch.get_rng_state()
    expected = run(comfy.comfy.samplers.sampler_object(name), batch=2)
    seen = list[tuple[int, int]]()
    sampler = ours(name)
    found = run(sampler, 2, callback=lambda step, x0, x, total: seen.append((step, total)))
    scale = float(expected.abs().mean())
    assert float((found - expected).abs().mean()) <= 4e-3 * 6 + 1e-3 * scale, "in units of unscaled latents"
    assert seen == [(step, 20) for step in range(20)]
    report = SRDSReport().read(sampler, {})["result"][0]
    assert "srds" in report
    assert sampler.sampler_function.report.waves < (39 if name == "heun" else 20)
    assert name == "ddim" or torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch", [1, 2])
def test_conditioning_with_a_range_and_inpainting(comfy: Any, batch: int) -> None:
    positive = cond(1, start_percent=0.2, end_percent=0.7) + cond(3, start_percent=0.5, end_percent=1.0)
    run, mask = Run(comfy, positive=positive), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    for given in (None, mask):
        expected = run(comfy.comfy.samplers.sampler_object("euler"), batch, given)
        found = run(ours("euler"), batch, given)
        assert float((found - expected).abs().mean()) <= 4e-3 * 6


def test_an_interrupt_acts_before_the_next_wave(comfy: Any) -> None:
    run, management = Run(comfy), comfy.comfy.model_management
    calls = 0

    def counted(apply: Any, given: dict[str, Any]) -> Tensor:
        nonlocal calls
        calls += 1
        management.interrupt_current_processing(calls == 2)
        found = apply(given["input"], given["timestep"], **given["c"])
        assert isinstance(found, Tensor)
        return found

    run.guider.model_options["model_function_wrapper"] = counted
    with pytest.raises(UnsupportedPipeline, match="model_function_wrapper"):
        run(ours("euler"))
    with pytest.raises(management.InterruptProcessingException):
        run(ours("euler", trust_patches=True))
    assert calls == 2

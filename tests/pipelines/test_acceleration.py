from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
import tiny
import torch
from calls import assert_close, latents
from diffusers.models import attention_processor as stock
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig
from torch import Tensor, nn

import srds_fast
from srds_fast.engine.compiled import compiled
from srds_fast.errors import InvalidArgument
from srds_fast.pipelines import acceleration
from srds_fast.pipelines.acceleration import Applied, NetworkOptions, applied

KINDS = ["stable_diffusion", "stable_diffusion_controlnet", "stable_diffusion_3", "flux", "pixart", "dit", "ddim"]
# settings that change what a running call computes: (first call, a call during it)
CONFLICTS = [("flux", "attention", "_native_math", "sdpa"), ("ddim", "channels_last", True, False)]


def networks_of(pipe: Any) -> list[Any]:
    return [pipe.components[name] for name in ("unet", "transformer", "controlnet") if name in pipe.components]


def apply(*networks: Any, **options: Any) -> AbstractContextManager[Applied]:
    return applied(networks, NetworkOptions(**options), torch.device("cpu"))


def image_of(pipe: Any, name: str = "stable_diffusion", **more: Any) -> Tensor:
    return latents(pipe, **{**tiny.PIPELINES[name][1], "num_inference_steps": 2, **more})


def processors_of(network: Any) -> list[Any]:
    return [each.processor for each in network.modules() if hasattr(each, "set_processor")]


def backends_of(network: Any) -> set[Any]:
    return {each._attention_backend for each in processors_of(network)}


def state_of(*networks: Any) -> list[Any]:
    """All that a setting may change and all that it must not: processors, backends, and where the weights lie."""
    found: list[Any] = [_AttentionBackendRegistry._active_backend]
    for network in networks:
        found += ((id(each), getattr(each, "_attention_backend", None)) for each in processors_of(network))
        found += ((id(each), each.data_ptr(), each.stride()) for each in network.parameters())
    return found


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(("attention", name, r"^attention is .*\. diffusers has no .*\. Pass") for name in ("fast", "NATIVE", 1, [])),
        *(("torch_compile", mode, "Pass None or one of 'auto', 'default'") for mode in ("reduce-overhead", "fastest")),
        *(("channels_last", value, "It is a switch. Pass True") for value in (1, "yes")),
    ],
)
def test_unknown_options_are_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        NetworkOptions(**{option: value})


@pytest.mark.parametrize("name", ["auto", "sdpa", "_native_math"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_gives_the_same_image_and_is_put_back(kind: str, name: str) -> None:
    pipe = tiny.PIPELINES[kind][0]()
    networks = networks_of(pipe)
    expected, before = image_of(pipe, kind), state_of(*networks)
    with apply(*networks, attention=name) as made:
        assert (state_of(*networks) == before) == (name == "auto" or not (kind == "flux" or name == "sdpa"))
        assert_close(image_of(pipe, kind), expected)
    assert state_of(*networks) == before
    assert made.replacements == {}
    # the attention of older networks is their processors' own: no backend can be chosen
    left = networks if name == "_native_math" and kind != "flux" else []
    assert [reason.partition(" has ")[0] for reason in made.reasons] == [
        f"attention='_native_math' was left out where {type(each).__name__}" for each in left
    ]


def test_a_backend_is_used_by_this_network_only_and_the_users_own_comes_back_after_an_error() -> None:
    network, other = tiny.flux().transformer, tiny.flux(seed=1).transformer
    for each in processors_of(network):
        each._attention_backend = AttentionBackendName._NATIVE_MATH
    before, others = state_of(network), state_of(other)

    def call() -> None:
        with apply(network, attention="sdpa"):
            assert backends_of(network) == {AttentionBackendName.NATIVE}
            assert state_of(other) == others
            raise KeyError

    with pytest.raises(KeyError):
        call()
    assert state_of(network) == before


class AttnProcessor(stock.AttnProcessor):
    """A user's own, which may compute something else."""


def test_sdpa_replaces_the_processors_that_compute_the_same_and_leaves_others_with_a_reason() -> None:
    pipe = tiny.stable_diffusion(**tiny.BLOCKS)  # which attend in three places
    embeds = tiny.add_ip_adapter(pipe)
    attentions = [each for each in pipe.unet.modules() if isinstance(each, stock.Attention)]
    plain, unscaled, own = [each for each in attentions if "IP" not in type(each.processor).__name__][:3]
    plain.set_processor(stock.AttnProcessor())
    unscaled.set_processor(stock.AttnProcessor())
    unscaled.scale_qk, unscaled.scale = False, 1.0
    own.set_processor(AttnProcessor())
    expected, before = image_of(pipe, ip_adapter_image_embeds=embeds), state_of(pipe.unet)
    with apply(pipe.unet, attention="sdpa") as made:
        assert type(plain.processor) is stock.AttnProcessor2_0
        assert type(unscaled.processor) is stock.AttnProcessor
        assert type(own.processor) is AttnProcessor
        assert_close(image_of(pipe, ip_adapter_image_embeds=embeds), expected)
    assert state_of(pipe.unet) == before
    left = "AttnProcessor, IPAdapterAttnProcessor2_0"
    assert made.reasons == [f"attention='sdpa' was left out where UNet2DConditionModel has {left}"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of them can run here")
@pytest.mark.parametrize("name", ["xformers", "flash", "sage", "flash_hub", "_native_npu", "_native_cudnn"])
@pytest.mark.parametrize("kind", ["stable_diffusion", "flux"])
def test_attention_that_cannot_run_here_is_a_reason_and_changes_nothing(kind: str, name: str) -> None:
    pipe = tiny.PIPELINES[kind][0]()
    (network,) = networks_of(pipe)
    expected, before = image_of(pipe, kind), state_of(network)
    with apply(network, attention=name) as made:
        assert state_of(network) == before
        assert torch.equal(image_of(pipe, kind), expected)
    (reason,) = made.reasons
    assert reason.startswith(f"attention='{name}' cannot be used: ")
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("stored", "autocast", "used"),
    [
        (torch.float16, False, torch.float16),
        (torch.float32, True, torch.bfloat16),
        (torch.float8_e4m3fn, False, torch.bfloat16),
    ],
)
def test_attention_is_tried_as_it_will_be_used(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, autocast: bool, used: torch.dtype
) -> None:
    tried: list[tuple[Any, ...]] = []
    monkeypatch.setattr(acceleration, "_try_attention", lambda *each: tried.append(each))
    unet = tiny.stable_diffusion().unet.to(stored)
    head_dims = {each.inner_dim // each.heads for each in unet.modules() if isinstance(each, stock.Attention)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), apply(unet, attention="sdpa"):
        pass
    assert tried == [("native", head_dim, used, torch.device("cpu")) for head_dim in sorted(head_dims)]


@pytest.mark.parametrize(
    ("kind", "processor"),
    [("stable_diffusion", stock.XFormersAttnProcessor), ("stable_diffusion_3", stock.XFormersJointAttnProcessor)],
)
def test_xformers_replaces_stock_processors_and_draws_nothing(
    kind: str, processor: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    (network,) = networks_of(tiny.PIPELINES[kind][0]())
    monkeypatch.setattr(acceleration, "_try_attention", lambda *_: None)
    before, random = state_of(network), torch.get_rng_state()
    inside = []
    for _ in range(2):
        with apply(network, attention="xformers") as made:
            inside.append(state_of(network))
            assert {type(each) for each in processors_of(network)} == {processor}
        assert state_of(network) == before
        assert made.reasons == []
    assert inside[0] == inside[1], "or compiled code would be compiled again"
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_3", "flux"])
def test_xformers_on_a_gpu_gives_the_same_image_and_draws_nothing(kind: str) -> None:
    pytest.importorskip("xformers")
    pipe = tiny.PIPELINES[kind][0]().to("cuda")
    networks = networks_of(pipe)
    expected, before, random = image_of(pipe, kind), state_of(*networks), torch.cuda.get_rng_state()
    with applied(networks, NetworkOptions("xformers"), torch.device("cuda")) as made:
        assert torch.equal(torch.cuda.get_rng_state(), random)
        torch.testing.assert_close(image_of(pipe, kind), expected, atol=2e-2, rtol=0)
    assert state_of(*networks) == before
    assert all("cannot be used" in reason for reason in made.reasons)


@pytest.mark.parametrize(("kind", "setting", "first", "second"), CONFLICTS)
def test_calls_share_a_setting_and_the_last_puts_it_back(kind: str, setting: str, first: Any, second: Any) -> None:
    (network,) = networks_of(tiny.PIPELINES[kind][0]())
    before = state_of(network)
    outer, same, other = (apply(network, **{setting: value}) for value in (first, first, second))
    with outer:
        switched = state_of(network)
        assert switched != before
        assert same.__enter__().reasons == []
        conflict = f"another call is using it with {setting}={first!r}"
        was_not_set = f"{setting}={second!r} was not set on {type(network).__name__}"
        with other as made:
            assert made.reasons == [f"{was_not_set}: {conflict}"]
            assert state_of(network) == switched
    assert state_of(network) == switched, "a call still uses it"
    same.__exit__(None, None, None)
    assert (state_of(network) == before) == (setting == "attention")
    with apply(network, **{setting: second}) as made:
        assert state_of(network) != switched
        assert made.reasons == []


def test_calls_in_threads_see_one_setting_each_and_leave_the_network_as_it_was() -> None:
    network = tiny.flux().transformer
    before = state_of(network)

    def work(name: str) -> None:
        wanted = AttentionBackendName("native" if name == "sdpa" else name)
        for _ in range(200):
            with apply(network, attention=name) as made:
                backends = backends_of(network)
                # either its own all the time, or somebody else's and a reason
                assert len(backends) == 1
                assert (backends == {wanted}) == (not made.reasons)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, ["sdpa", "_native_math"] * 2))
    assert state_of(network) == before
    assert acceleration._holds == {}


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_controlnet", "ddim"])
def test_channels_last_gives_the_same_image_and_values_and_stays(kind: str) -> None:
    pipe = tiny.PIPELINES[kind][0]()
    networks = networks_of(pipe)
    if kind == "stable_diffusion":
        networks[0].add_adapter(LoraConfig(r=4, target_modules=["to_q", "conv1"], init_lora_weights=False))
        networks[0].eval()
    expected, before = image_of(pipe, kind), state_of(*networks)
    weights = [(each, each.detach().clone()) for network in networks for each in network.parameters()]
    with apply(*networks, channels_last=True) as made:
        assert_close(image_of(pipe, kind), expected)
    assert made.reasons == []
    assert [id(each) for each, _ in weights] == [id(each) for network in networks for each in network.parameters()]
    assert all(torch.equal(weight, copy) for weight, copy in weights)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each, _ in weights if each.dim() == 4)
    laid_out = state_of(*networks)
    with apply(*networks, channels_last=True):
        assert state_of(*networks) == laid_out, "nothing moves again"
    with apply(*networks, channels_last=False):
        assert [each[2:] for each in state_of(*networks)[1:]] == [each[2:] for each in before[1:]]
        assert torch.equal(image_of(pipe, kind), expected)


@pytest.mark.parametrize("kind", ["stable_diffusion_3", "flux", "pixart", "dit"])
def test_transformers_and_weights_that_are_not_in_memory_are_not_laid_out(kind: str) -> None:
    (network,) = networks_of(tiny.PIPELINES[kind][0]())
    before, unet = state_of(network), tiny.ddim().unet.to("meta")
    with apply(network, unet, channels_last=True) as made:
        assert state_of(network) == before
        assert unet.conv_in.weight.is_contiguous()
    nothing = f"changes nothing in {type(network).__name__}: it is no convolution network"
    assert made.reasons == [f"channels_last=True {nothing}"]


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Another backend than inductor, which takes seconds."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, options: original(call, backend=backend))


def test_a_compiled_network_shares_the_weights_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, "eager")
    unet = tiny.ddim().unet
    before = {name: dict(vars(each)) for name, each in unet.named_modules()}
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10.0, 500.0])
    with torch.no_grad(), apply(unet, torch_compile="default") as made:
        fast = made.replacements[unet]
        torch.testing.assert_close(fast(x, t).sample, unet(x, t).sample, atol=1e-5, rtol=0)
        next(unet.parameters()).zero_()
        torch.testing.assert_close(fast(x, t).sample, unet(x, t).sample, atol=1e-5, rtol=0)
    assert made.reasons == []
    assert {name: dict(vars(each)) for name, each in unet.named_modules()} == before
    with apply(unet, torch_compile="default") as made:
        assert made.replacements == {unet: fast}
    with apply(unet, torch_compile="max-autotune-no-cudagraphs") as made:
        assert made.replacements[unet] is not fast
    network = nn.Linear(2, 2)
    compiled(network, "default")(torch.ones(1, 2))
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None, "compiled code does not keep it"


def test_networks_do_not_make_each_others_shapes_dynamic(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.extend(inputs)
        return graph.forward

    compile_with(monkeypatch, backend)
    for width in (2, 3, 5):
        network = nn.Linear(width, width)
        compiled(network, "default")(torch.ones(10 * width, width))
    assert len(seen) == 3 * 4, "three tensors each, and the number of rows: no other size may change"


def test_what_cannot_be_compiled_is_called_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        raise OSError("no compiler was found. Install one")

    already = torch.compile(nn.Linear(2, 2), backend="eager")
    compile_with(monkeypatch, no_compiler)
    network, x = nn.Linear(2, 2), torch.ones(1, 2)
    with apply(network, already, torch_compile="default") as made:
        assert list(made.replacements) == [network]
        for _ in range(2):
            assert torch.equal(made.replacements[network](x), network(x))
    assert made.reasons == [
        "torch_compile='default' was left out: Linear is compiled already",
        "torch_compile='default' failed on Linear: no compiler was found",
    ]


def test_the_report_of_a_call_tells_that_compiling_failed_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        raise OSError("no compiler was found. Install one")

    compile_with(monkeypatch, no_compiler)
    fast = srds_fast.compile(tiny.ddim(), method="srds", torch_compile="default")
    fast(num_inference_steps=4, output_type="pt")
    assert fast.report.left_out == ["torch_compile='default' failed on UNet2DModel: no compiler was found"]


def test_errors_of_the_network_itself_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, "eager")
    fast = compiled(network := nn.Linear(2, 2), "default")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fast(torch.ones(1, 3))
    assert fast.failure is None
    assert torch.equal(fast(torch.ones(1, 2)), network(torch.ones(1, 2)))


def test_waves_of_all_widths_need_two_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for a single row, one for all others."""
    widths: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        widths.append(1)
        return graph.forward

    compile_with(monkeypatch, counting)
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, method="srds", torch_compile="default")
    for steps in (50, 30):
        fast("a cat", num_inference_steps=steps, guidance_scale=1.0, output_type="latent")
        assert fast.report.peak_rows > 4
        assert fast.report.left_out == []
    assert len(widths) == 2


class Clock:
    """Time that advances by the rows of calls: of the network itself, and of compiled code by so much a row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, compiled_row: Callable[[int], float]) -> None:
        self.now, self.compiled_calls = 0.0, list[int]()
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            self.now += 60.0

            def call(*args: Any) -> Any:
                found = graph.forward(*args)
                rows = len(found[0])
                self.compiled_calls.append(rows)
                self.now += rows * compiled_row(rows)
                return found

            return call

        compile_with(monkeypatch, backend)

    def network(self) -> nn.Module:
        network = nn.Linear(2, 2)
        network.register_forward_hook(lambda module, args, output: self.advance(len(output)))
        return network

    def advance(self, rows: int) -> None:
        if not torch.compiler.is_compiling():
            self.now += rows


def test_auto_calls_compiled_code_for_the_numbers_of_rows_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, lambda rows: 0.5 if rows >= 4 else 2.0)
    network = clock.network()
    with torch.no_grad(), apply(network, torch_compile="auto") as made:
        for rows in (1, 2, 8):
            made.replacements[network](torch.ones(rows, 2))
        clock.compiled_calls.clear()
        for rows in (1, 2, 3, 8, 12, 15):
            x = torch.randn(rows, 2)
            torch.testing.assert_close(made.replacements[network](x), network(x))
        assert clock.compiled_calls == [8, 12, 15]
    assert made.reasons == []
    assert made.compile_seconds > 60
    with apply(network, torch_compile="auto") as again:
        again.replacements[network](torch.ones(1, 2))
    assert again.compile_seconds == 0, "it is decided"


def test_auto_says_where_compiling_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, lambda rows: 1.25)
    network = clock.network()
    with torch.no_grad(), apply(network, torch_compile="auto") as made:
        made.replacements[network](torch.ones(4, 2))
        clock.compiled_calls.clear()
        made.replacements[network](torch.ones(4, 2))
    assert clock.compiled_calls == []
    found = "compiled code takes 1.25 times as long as the network itself, at best"
    assert made.reasons == [f"torch_compile='auto' changes nothing in Linear: {found}"]


def test_calls_of_auto_tell_what_compiling_took(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, "eager")
    pipe = tiny.ddim()
    fast = srds_fast.compile(pipe, method="srds", torch_compile="auto")
    call: dict[str, Any] = {"num_inference_steps": 25, "output_type": "pt"}
    found = latents(fast, **call)
    assert fast.report.compile_seconds > 0
    assert "compiling" in str(fast.report)
    assert_close(found, latents(srds_fast.compile(pipe, method="srds"), **call))
    latents(fast, **call)
    assert fast.report.compile_seconds == 0, "all is decided"


@pytest.mark.parametrize(("mode", "precision"), [("default", "highest"), ("max-autotune-no-cudagraphs", "high")])
def test_inductor_captures_no_graphs_and_leaves_torchs_flags_alone(mode: str, precision: str) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def flags() -> list[Any]:
        owners = (torch.backends, matmul, cudnn, cudnn.conv, torch.backends.mkldnn)
        precisions = [torch.get_float32_matmul_precision(), *(each.fp32_precision for each in owners)]
        return [cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32, *precisions]

    network, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.ones(2, 4)
    usual = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        user = torch._inductor.config.patch({"triton.cudagraphs": True})
        with user, cudnn.flags(benchmark=precision == "high"), torch.no_grad():
            before = flags()
            with apply(network, torch_compile=mode) as made:
                torch.testing.assert_close(made.replacements[network](x), network(x), atol=1e-5, rtol=0)
            assert flags() == before
    finally:
        torch.set_float32_matmul_precision(usual)
    assert made.reasons == []
    assert made.replacements[network]._call.get_compiler_config()["triton.cudagraphs"] is False

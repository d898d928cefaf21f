from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from srds_fast import faster as module
from srds_fast.errors import InvalidArgument
from srds_fast.faster import check_attention, check_torch_compile, compiled, faster, lay_out, torch_flags_kept

KINDS = ["stable_diffusion", "stable_diffusion_controlnet", "stable_diffusion_3", "flux", "pixart", "dit", "ddim"]


def networks(pipe: Any) -> list[Any]:
    return [pipe.components[name] for name in ("unet", "transformer", "controlnet") if name in pipe.components]


def image_of(pipe: Any, name: str = "stable_diffusion") -> torch.Tensor:
    call = tiny.PIPELINES[name][1]
    output = pipe(**call, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    return torch.as_tensor(output)


def processors_of(network: Any) -> list[Any]:
    return [each.processor for each in network.modules() if hasattr(each, "set_processor")]


def assert_same_image(image: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the range of values, which for latents of a random network is several units wide."""
    torch.testing.assert_close(image, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)


def attention_state(network: Any) -> tuple[Any, ...]:
    """Processors by identity and what diffusers' switches leave on them, and the backend of the process."""
    processors = processors_of(network)
    backends = [dict(vars(each)) for each in processors]
    return [id(each) for each in processors], backends, _AttentionBackendRegistry._active_backend


def kinds_of(network: Any) -> set[type]:
    return {type(each) for each in processors_of(network)}


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 1))


@pytest.mark.parametrize("name", ["auto", "sdpa", "xformers", "native", "_native_math", "flash_hub"])
def test_known_attention_passes(name: str) -> None:
    check_attention(name)


@pytest.mark.parametrize("name", ["fast", "", "NATIVE", None, 1])
def test_unknown_attention_is_refused_in_three_sentences(name: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^attention is .*\. diffusers has no .*\. Pass 'auto', 'sdpa'"):
        check_attention(name)
    with pytest.raises(InvalidArgument), faster([], attention=name):
        pass


@pytest.mark.parametrize(
    ("mode", "instead"), [("reduce-overhead", "'default'"), ("max-autotune", "'max-autotune-no-cudagraphs'")]
)
def test_modes_with_their_own_graphs_are_refused_with_the_mode_to_use(mode: str, instead: str) -> None:
    with pytest.raises(InvalidArgument, match=f"Pass {instead}"):
        compiled(nn.Linear(2, 2), mode)
    with pytest.raises(InvalidArgument, match=f"Pass {instead}"), faster([], torch_compile=mode):
        pass


def test_unknown_modes_are_refused() -> None:
    for mode in (None, "default", "max-autotune-no-cudagraphs"):
        check_torch_compile(mode)
    with pytest.raises(InvalidArgument, match="Pass None or one of 'default'"):
        check_torch_compile("fastest")


@pytest.mark.parametrize("name", KINDS)
def test_auto_changes_nothing(name: str) -> None:
    pipe = tiny.PIPELINES[name][0]()
    before = [attention_state(each) for each in networks(pipe)]
    with faster(networks(pipe)) as made:
        assert [attention_state(each) for each in networks(pipe)] == before
        assert list(made.networks) == networks(pipe)
        assert made.reasons == []


@pytest.mark.parametrize("attention", ["sdpa", "native", "_native_math"])
@pytest.mark.parametrize("name", KINDS)
def test_attention_gives_the_same_image_and_is_put_back(name: str, attention: str) -> None:
    pipe = tiny.PIPELINES[name][0]()
    expected = image_of(pipe, name)
    before = [attention_state(each) for each in networks(pipe)]
    with faster(networks(pipe), attention) as made:
        assert_same_image(image_of(pipe, name), expected)
    assert [attention_state(each) for each in networks(pipe)] == before
    by_backend = name == "flux" or attention != "_native_math"
    assert made.reasons == [
        f"attention='_native_math' changes nothing in {type(each).__name__}: its attention does not go through "
        "diffusers' backends"
        for each in ([] if by_backend else networks(pipe))
    ]


def test_a_backend_is_really_used_and_only_by_this_network() -> None:
    flux = tiny.flux().transformer
    other = tiny.flux(seed=1).transformer
    active = _AttentionBackendRegistry._active_backend
    with faster([flux], "_native_math"):
        assert {each._attention_backend for each in processors_of(flux)} == {AttentionBackendName._NATIVE_MATH}
        assert {each._attention_backend for each in processors_of(other)} == {None}
        assert _AttentionBackendRegistry._active_backend is active


def test_the_users_own_backend_comes_back_also_after_an_exception() -> None:
    flux = tiny.flux().transformer
    for each in processors_of(flux):
        each._attention_backend = AttentionBackendName._NATIVE_MATH
    before = attention_state(flux)

    def call() -> None:
        with faster([flux], "sdpa"):
            assert {each._attention_backend for each in processors_of(flux)} == {AttentionBackendName.NATIVE}
            raise KeyError

    with pytest.raises(KeyError):
        call()
    assert attention_state(flux) == before


def test_sdpa_replaces_plain_processors_for_the_time_of_the_call() -> None:
    pipe = tiny.stable_diffusion()
    pipe.unet.set_attn_processor({name: stock.AttnProcessor() for name in pipe.unet.attn_processors})
    expected, before = image_of(pipe), attention_state(pipe.unet)
    with faster([pipe.unet], "sdpa") as made:
        assert kinds_of(pipe.unet) == {stock.AttnProcessor2_0}
        assert_same_image(image_of(pipe), expected)
    assert attention_state(pipe.unet) == before
    assert made.reasons == []


def test_what_the_user_sets_during_the_call_stays() -> None:
    unet = tiny.stable_diffusion().unet
    unet.set_attn_processor(stock.AttnProcessor())
    mine = stock.AttnProcessor()
    name = next(iter(unet.attn_processors))
    with faster([unet], "sdpa"):
        unet.get_submodule(name.removesuffix(".processor")).set_processor(mine)
    assert unet.attn_processors[name] is mine
    assert kinds_of(unet) == {stock.AttnProcessor}


class Custom(stock.AttnProcessor2_0):
    """Of a user: also a subclass of a stock processor may compute something else."""


def test_processors_that_are_not_stock_are_left_with_a_reason() -> None:
    pipe = tiny.stable_diffusion()
    embeds = tiny.add_ip_adapter(pipe)
    name = next(iter(pipe.unet.attn_processors))
    pipe.unet.get_submodule(name.removesuffix(".processor")).set_processor(Custom())
    before = attention_state(pipe.unet)
    call = {**tiny.PIPELINES["stable_diffusion"][1], "ip_adapter_image_embeds": embeds}

    def image() -> torch.Tensor:
        return pipe(**call, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images

    expected = image()
    with faster([pipe.unet], "sdpa") as made:
        assert attention_state(pipe.unet)[0] == before[0]
        assert torch.equal(image(), expected)
    assert attention_state(pipe.unet) == before
    assert made.reasons == [
        "attention='sdpa' was left out where UNet2DConditionModel has Custom, IPAdapterAttnProcessor2_0"
    ]


@pytest.mark.parametrize("name", KINDS)
def test_without_xformers_the_image_is_the_same_bit_for_bit(name: str) -> None:
    if torch.cuda.is_available() and module.importlib.util.find_spec("xformers"):
        pytest.skip("xformers can run here")
    pipe = tiny.PIPELINES[name][0]()
    expected = image_of(pipe, name)
    before = [attention_state(each) for each in networks(pipe)]
    with faster(networks(pipe), "xformers") as made:
        assert [attention_state(each) for each in networks(pipe)] == before
        assert torch.equal(image_of(pipe, name), expected)
    (reason,) = made.reasons
    assert reason.startswith("attention='xformers' cannot be used: xformers ")


def test_xformers_on_another_device_than_a_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    with faster([tiny.flux().transformer], "xformers") as made:
        pass
    assert made.reasons == [
        "attention='xformers' cannot be used: xformers runs on CUDA devices only, and the network is on cpu"
    ]


@pytest.mark.parametrize("attention", ["flash", "sage", "flash_hub", "_native_npu", "_native_cudnn"])
def test_backends_that_cannot_run_here_are_a_reason(attention: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("some of them can run here")
    pipe = tiny.flux()
    expected = image_of(pipe, "flux")
    with faster([pipe.transformer], attention) as made:
        assert torch.equal(image_of(pipe, "flux"), expected)
    (reason,) = made.reasons
    assert reason.startswith(f"attention='{attention}' cannot be used: ")
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("name", "kind"),
    [("stable_diffusion", stock.XFormersAttnProcessor), ("stable_diffusion_3", stock.XFormersJointAttnProcessor)],
)
def test_xformers_replaces_stock_processors_and_draws_nothing(
    name: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    (network,) = networks(tiny.PIPELINES[name][0]())
    monkeypatch.setattr(module, "_try_backend", lambda *_: None)
    before, random = attention_state(network), torch.get_rng_state()
    inside = []
    for _ in range(2):
        with faster([network], "xformers") as made:
            inside.append(attention_state(network)[0])
            assert kinds_of(network) == {kind}
        assert attention_state(network) == before
        assert made.reasons == []
    assert inside[0] == inside[1]  # or compiled code would be compiled again
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3", "flux"])
def test_xformers_on_a_gpu_gives_the_same_image_and_draws_nothing(name: str) -> None:
    pytest.importorskip("xformers")
    pipe = tiny.PIPELINES[name][0]().to("cuda")
    expected = image_of(pipe, name)
    before, random = attention_state(networks(pipe)[0]), torch.cuda.get_rng_state()
    with faster(networks(pipe), "xformers") as made:
        assert torch.equal(torch.cuda.get_rng_state(), random)
        torch.testing.assert_close(image_of(pipe, name), expected, atol=2e-2, rtol=0)
    assert attention_state(networks(pipe)[0]) == before
    assert all("cannot be used" in reason for reason in made.reasons)


def test_nested_calls_share_a_switch_and_the_last_puts_it_back() -> None:
    flux = tiny.flux().transformer
    before = attention_state(flux)
    outer = faster([flux], "_native_math")
    inner = faster([flux], "_native_math")
    outer.__enter__()
    switched = attention_state(flux)
    assert inner.__enter__().reasons == []
    outer.__exit__(None, None, None)
    assert attention_state(flux) == switched
    inner.__exit__(None, None, None)
    assert attention_state(flux) == before


def test_a_call_that_wants_something_else_goes_on_with_what_is_set() -> None:
    flux = tiny.flux().transformer
    before = attention_state(flux)
    with faster([flux], "_native_math"):
        switched = attention_state(flux)
        with faster([flux], "sdpa") as made:
            assert attention_state(flux) == switched
        assert attention_state(flux) == switched
    assert attention_state(flux) == before
    assert made.reasons == [
        "attention='sdpa' was not set on FluxTransformer2DModel: another call is using it with attention='_native_math'"
    ]
    with faster([flux], "sdpa") as made:
        assert made.reasons == []


def test_threads_leave_the_network_as_it_was() -> None:
    network = tiny.flux().transformer
    before = attention_state(network)
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def work(attention: str) -> None:
        try:
            start.wait()
            for _ in range(200):
                with faster([network], attention) as made:
                    backends = {each._attention_backend for each in processors_of(network)}
                    wanted = AttentionBackendName("native" if attention == "sdpa" else attention)
                    # either our own all the time, or somebody else's and a reason
                    assert len(backends) == 1
                    assert (backends == {wanted}) == (not made.reasons)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(each,)) for each in ["sdpa", "_native_math"] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert attention_state(network) == before
    assert not module._holds.get(network)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_controlnet", "ddim"])
def test_channels_last_gives_the_same_image_and_values(name: str) -> None:
    pipe = tiny.PIPELINES[name][0]()
    expected = image_of(pipe, name)
    before = [dict(each.named_parameters()) for each in networks(pipe)]
    values = [{key: weight.detach().clone() for key, weight in each.items()} for each in before]
    strides = [{key: weight.stride() for key, weight in each.items()} for each in before]
    with faster(networks(pipe), channels_last=True) as made:
        assert_same_image(image_of(pipe, name), expected)
    assert made.reasons == []
    for network, parameters, copies in zip(networks(pipe), before, values, strict=True):
        for key, weight in network.named_parameters():
            assert weight is parameters[key]
            assert torch.equal(weight, copies[key])
            if weight.dim() == 4:
                assert weight.is_contiguous(memory_format=torch.channels_last)
    # it stays, as documented, until it is undone
    for network, each in zip(networks(pipe), strides, strict=True):
        assert not lay_out(network, True)
        assert lay_out(network, False)
        assert {key: weight.stride() for key, weight in network.named_parameters()} == each
    assert torch.equal(image_of(pipe, name), expected)


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux", "pixart", "dit"])
def test_transformers_are_not_laid_out(name: str) -> None:
    (network,) = networks(tiny.PIPELINES[name][0]())
    pointers = [weight.data_ptr() for weight in network.parameters()]
    assert not lay_out(network, True)
    with faster([network], channels_last=True) as made:
        assert [weight.data_ptr() for weight in network.parameters()] == pointers
    assert made.reasons == [
        f"channels_last=True changes nothing in {type(network).__name__}: it is no convolution network"
    ]


def test_shared_parameters_stay_shared() -> None:
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    second.weight = first.weight
    network = nn.Sequential(first, second)
    assert lay_out(network, True)
    assert first.weight is second.weight
    assert first.weight.is_contiguous(memory_format=torch.channels_last)


def test_lora_layers_are_laid_out_as_well() -> None:
    from peft import LoraConfig

    pipe = tiny.stable_diffusion()
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "conv1"], init_lora_weights=False))
    pipe.unet.eval()
    expected = image_of(pipe)
    assert lay_out(pipe.unet, True)
    assert all(
        weight.is_contiguous(memory_format=torch.channels_last)
        for name, weight in pipe.unet.named_parameters()
        if weight.dim() == 4 and "lora" in name
    )
    assert_same_image(image_of(pipe), expected)


def test_weights_that_are_not_there_are_left_alone() -> None:
    assert not lay_out(conv_net().to("meta"), True)


def test_another_layout_during_a_call_is_refused() -> None:
    unet = tiny.ddim().unet
    with faster([unet], channels_last=True):
        pointers = [weight.data_ptr() for weight in unet.parameters()]
        with faster([unet], channels_last=False) as made:
            assert [weight.data_ptr() for weight in unet.parameters()] == pointers
    (reason,) = made.reasons
    assert reason.startswith("channels_last=False was not set on UNet2DModel")


def test_compiled_shares_the_network_and_gives_the_same_output() -> None:
    unet = tiny.ddim().unet
    before = {name: dict(vars(each)) for name, each in unet.named_modules()}
    fast = compiled(unet, "default", _backend="eager")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10.0, 500.0])
    with torch.no_grad():
        torch.testing.assert_close(fast(x, t).sample, unet(x, t).sample, atol=1e-5, rtol=0)
        next(unet.parameters()).zero_()
        torch.testing.assert_close(fast(x, t, return_dict=False)[0], unet(x, t).sample, atol=1e-5, rtol=0)
    assert fast.failure is None
    assert fast.config is unet.config
    assert fast.dtype == unet.dtype
    assert not hasattr(fast, "nothing")
    assert {name: dict(vars(each)) for name, each in unet.named_modules()} == before
    assert compiled(unet, "default", _backend="eager") is fast
    assert compiled(unet, "max-autotune-no-cudagraphs", _backend="eager") is not fast


def test_compiled_does_not_keep_the_network() -> None:
    network = conv_net()
    fast = compiled(network, "default", _backend="eager")
    fast(torch.ones(1, 3, 4, 4))
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None
    with pytest.raises(ReferenceError, match="Keep a reference"):
        fast(torch.ones(1, 3, 4, 4))


def test_networks_do_not_make_each_others_shapes_dynamic() -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.extend(size for each in inputs if isinstance(each, torch.Tensor) for size in each.shape)
        return graph.forward

    for width in (2, 3, 5):
        network = nn.Linear(width, width)
        compiled(network, "default", _backend=backend)(torch.ones(width, width))
    assert all(type(size) is int for size in seen)


def test_a_network_that_cannot_be_compiled_is_called_as_it_is() -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        raise OSError("no compiler was found. Install one")

    network = nn.Linear(2, 2)
    fast = compiled(network, "default", _backend=backend)
    x = torch.ones(1, 2)
    for _ in range(2):
        assert torch.equal(fast(x), network(x))
    assert fast.failure == "torch_compile='default' failed on Linear: no compiler was found"


def test_errors_of_the_network_itself_are_its_own() -> None:
    fast = compiled(network := nn.Linear(2, 2), "default", _backend="eager")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fast(torch.ones(1, 3))
    assert fast.failure is None
    assert torch.equal(fast(torch.ones(1, 2)), network(torch.ones(1, 2)))


def test_inductor_compiles_without_graphs_of_its_own() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    x = torch.ones(2, 4)
    with torch.no_grad(), faster([network], torch_compile="default") as made:
        (fast,) = made.networks
        torch.testing.assert_close(fast(x), network(x), atol=1e-5, rtol=0)
    assert made.reasons == []
    options = fast._call.get_compiler_config()
    assert options["triton.cudagraphs"] is False


def test_faster_reports_what_could_not_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        raise OSError("no compiler was found")

    monkeypatch.setattr(module, "compiled", lambda network, mode: compiled(network, mode, _backend=backend))
    network, already = nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager")
    with faster([network, already], torch_compile="default") as made:
        made.networks[0](torch.ones(1, 2))
        assert made.networks[1] is already
    assert made.reasons == [
        "torch_compile='default' was left out: Linear is compiled already",
        "torch_compile='default' failed on Linear: no compiler was found",
    ]


def flags() -> list[Any]:
    cudnn = torch.backends.cudnn
    precisions = [module._precision_owner(name).fp32_precision for name in module._PRECISIONS]
    return [cudnn.benchmark, cudnn.deterministic, module._legacy_precision(), *precisions]


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch.backends.cuda.matmul, "allow_tf32", True),
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cudnn, "benchmark", True),
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends, "fp32_precision", "tf32"),
        (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    ],
    ids=lambda each: getattr(each, "__name__", type(each).__name__) if not isinstance(each, str | bool) else str(each),
)
def test_torch_flags_are_put_back_also_after_an_exception(owner: Any, name: str, value: Any) -> None:
    before = flags()

    def change() -> None:
        with torch_flags_kept():
            setattr(owner, name, value)
            assert flags() != before
            raise KeyError

    with pytest.raises(KeyError):
        change()
    assert flags() == before
    assert torch.backends.cuda.matmul.allow_tf32 is False


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_is_put_back(precision: str) -> None:
    before = flags()
    with torch_flags_kept():
        torch.set_float32_matmul_precision(precision)
        inside = flags()
        assert inside != before
        with torch_flags_kept():
            torch.set_float32_matmul_precision("highest")
        assert flags() == inside
    assert flags() == before


def test_diffusers_switches_work_as_this_module_takes_them_to() -> None:
    flux = tiny.flux().transformer
    active = _AttentionBackendRegistry._active_backend
    try:
        flux.set_attention_backend("_native_math")
        assert _AttentionBackendRegistry._active_backend == AttentionBackendName._NATIVE_MATH
        flux.reset_attention_backend()
        # of the process, and not put back
        assert _AttentionBackendRegistry._active_backend == AttentionBackendName._NATIVE_MATH
    finally:
        _AttentionBackendRegistry.set_active_backend(active)

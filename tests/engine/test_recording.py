"""What a recording leaves alone, what a replay does again, what is refused, and what the key of a network sees."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor
from hypothesis import example, given
from hypothesis import strategies as st
from tape import Tape, TapeRecorder
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from srds_fast.engine.graphs.cache_key import hooked, network_key, tensors_of
from srds_fast.engine.graphs.capture_checks import CaptureCheck, refuse_unknown_reads, storage_of
from srds_fast.errors import CaptureFailed


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8).clone()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def record(work: Callable[[], Any]) -> tuple[Tape, Any]:
    tape, _, found = TapeRecorder().record(lambda check: work())
    return tape, found


class Store:
    """Outside tensors that a program reads and writes: [4, 6] each."""

    def __init__(self, seed: int) -> None:
        self.x, self.y = numbers(4, 6, seed=seed), numbers(4, 6, seed=seed + 1)
        self.index = torch.randperm(4, generator=torch.Generator().manual_seed(seed))

    def fill(self, other: Store) -> None:
        for mine, its in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(its)

    def tensors(self) -> list[Tensor]:
        return [self.x, self.y, self.index]


# takes the store and [4, 6], returns [4, 6]
OPERATIONS: dict[str, Callable[[Store, Tensor], Tensor]] = {
    "read": lambda s, h: h + s.x,
    "in place on an outside tensor": lambda s, h: h + s.x.mul_(0.9).add_(0.1),
    "in place on a view of one": lambda s, h: h * s.y[:, 1:3].T.tanh_().sum(),
    "in place on a made one": lambda s, h: (h + 1).sin_().clamp_(max=0.5),
    "copy to a row": lambda s, h: h + s.y[2].copy_(h[0]),
    "a number to a row": lambda s, h: (s.x.__setitem__(3, 0.75), h + s.x)[1],
    "index": lambda s, h: h[s.index],
    "out": lambda s, h: torch.add(h, 1, out=s.y) * 1,
    "foreach": lambda s, h: torch._foreach_add([h, torch._foreach_mul([s.x, s.y], 0.5)[0]], 1.0)[0],
    "split of an outside tensor": lambda s, h: h + s.x.split(3, 1)[1].sum() + s.x.chunk(2)[0][0],
    "empty": lambda s, h: torch.empty_like(h).copy_(h).mul_(2),
}


def program(names: list[str], store: Store) -> Tensor:
    h = store.x * 1
    for name in names:
        h = OPERATIONS[name](store, h)
        h = h / (1 + h.abs().amax())
    return h


@example(list(OPERATIONS))
@given(st.lists(st.sampled_from(list(OPERATIONS)), min_size=1, max_size=8))
def test_a_replay_of_a_program_is_an_eager_run(names: list[str]) -> None:
    """Recording changes nothing, and replays on other inputs are eager runs on them, each from the last one's end."""
    store, eager = Store(0), Store(0)
    before = [bits(tensor) for tensor in store.tensors()]
    state = torch.get_rng_state()
    tape, found = record(lambda: program(names, store))
    assert all(map(torch.equal, map(bits, store.tensors()), before))
    assert torch.equal(torch.get_rng_state(), state)
    assert found.isnan().all(), "nothing holds a value before the first replay"
    for seed in (0, 7, 7):
        store.fill(Store(seed))
        eager.fill(Store(seed))
        with torch.no_grad():
            expected = program(names, eager)
        tape.replay()
        assert torch.equal(bits(found), bits(expected))
        assert all(map(torch.equal, map(bits, store.tensors()), map(bits, eager.tensors())))


@pytest.mark.parametrize("error", [KeyError("no such block"), CaptureFailed("not this one"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_things_as_they_were(error: BaseException) -> None:
    x = numbers(3)
    before = x.clone()

    def work() -> None:
        x.mul_(2)
        raise error

    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CaptureFailed) as raised:
        record(work)
    assert torch.equal(x, before)
    if isinstance(error, KeyError):
        assert "KeyError: 'no such block'" in str(raised.value)
        assert "engine='eager'" in str(raised.value)
    assert x.tolist() == before.tolist(), "no guard is left behind"


matrix, vector, mask = numbers(4, 4), torch.tensor([0, 2]), torch.tensor([True, False, True, True])
scalar = torch.tensor(3.0)
generator = torch.Generator()
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "item": (lambda: scalar.item(), "_local_scalar_dense"),
    "if": (lambda: 1 if scalar > 0 else 0, "_local_scalar_dense"),
    "format": (lambda: f"{scalar:.1f}", "_local_scalar_dense"),
    "a tensor as a bound of a slice": (lambda: matrix[: vector[1]], "_local_scalar_dense"),
    "equal": (lambda: torch.equal(matrix, matrix), "aten.equal"),
    "inverse": (lambda: torch.linalg.inv(matrix), "_linalg_check_errors"),
    "tolist": (lambda: matrix.tolist(), "Tensor.tolist"),
    "numpy": (lambda: matrix.numpy(), "Tensor.numpy"),
    "numpy.asarray": (lambda: numpy.asarray(matrix), "Tensor.__array__"),
    "dlpack": (lambda: numpy.from_dlpack(matrix), "Tensor.__dlpack__"),
    "tensor_split at a tensor": (lambda: matrix.tensor_split(vector), "tensor_split"),
    "nonzero": (lambda: matrix.nonzero(), "aten.nonzero"),
    "a mask as an index": (lambda: matrix[mask], "aten.index.Tensor"),
    "a mask that is written through": (lambda: matrix.clone().index_put((mask,), scalar), "aten.index_put"),
    "unique": (lambda: matrix.unique(), "_unique2"),
    "torch.tensor": (lambda: torch.tensor([1.0, 2.0]), "tensor makes a tensor from Python numbers"),
    "as_tensor": (lambda: torch.as_tensor([1.0]), "as_tensor makes a tensor from Python numbers"),
    "new_tensor": (lambda: matrix.new_tensor([1.0]), "new_tensor makes a tensor from Python numbers"),
    "a list as an index": (lambda: matrix[[0, 2]], "lift_fresh"),
    "to another device": (lambda: matrix.to("meta"), "copies between cpu and meta"),
    "randn": (lambda: torch.randn(2), "aten.randn"),
    "randn_like": (lambda: torch.randn_like(matrix), "aten.randn_like"),
    "normal_": (lambda: torch.empty(2).normal_(generator=generator), "aten.normal_"),
    "multinomial": (lambda: matrix.abs().multinomial(2), "aten.multinomial"),
    "dropout in training": (lambda: F.dropout(matrix, 0.5), "draws random numbers"),
    "attention that drops out": (
        lambda: F.scaled_dot_product_attention(matrix[None], matrix[None], matrix[None], dropout_p=0.1),
        "draws random numbers",
    ),
}
ALLOWED: dict[str, Callable[[], Any]] = {
    "attention": lambda: F.scaled_dot_product_attention(matrix[None], matrix[None], matrix[None], dropout_p=0.0),
    "dropout in eval": lambda: F.dropout(matrix, 0.5, training=False),
    "arange": lambda: torch.arange(3),
    "full": lambda: torch.full((3,), 2.0),
    "a tensor of numbers as an index": lambda: matrix[vector, :2],
    "written through one": lambda: matrix.clone().index_put_((vector,), scalar),
    "where": lambda: torch.where(matrix > 0, matrix, 0.0),
    "a number to a part": lambda: matrix.clone().__setitem__((slice(1, 2), 0), 1.0),
    "a number for a tensor": lambda: matrix * 2.0 + scalar,
    "tensor_split at a number": lambda: matrix.tensor_split(2),
    "len, shape, iteration": lambda: [len(row) + matrix.shape[0] for row in matrix],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_hold_is_refused(name: str) -> None:
    """By name, with what it would do and what to do about it; nothing is drawn."""
    work, said = REFUSED[name]
    state, own = torch.get_rng_state(), generator.get_state()
    with pytest.raises(CaptureFailed, match="engine='eager'") as raised, torch.no_grad(), CaptureCheck():
        work()
    assert said in str(raised.value)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generator.get_state(), own)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_graph_holds_is_allowed(name: str) -> None:
    with torch.no_grad(), CaptureCheck():
        ALLOWED[name]()


def test_the_outside_tensors_are_held_once() -> None:
    """One for each memory, wherever it is read; those that the network reads apart."""
    x, weight, own = numbers(4), numbers(4, seed=1), numbers(4, seed=2)
    with torch.no_grad(), CaptureCheck() as guard:
        made = x + own
        x[1:].mul_(2)
        with guard.network():
            (made.view(2, 2) + x.view(2, 2) + weight.view(2, 2)) * weight.sum()
        own.add_(made)
    assert list(guard.read) == list(map(storage_of, (x, own, weight)))
    assert list(guard.read_by_network) == list(map(storage_of, (x, weight)))
    assert storage_of(made.view(-1)) in guard.made
    assert storage_of(x[2:]) not in guard.made
    refuse_unknown_reads(guard, [weight, x[1:]], [])
    with pytest.raises(CaptureFailed, match=r"a tensor of shape \(4,\)"):
        refuse_unknown_reads(guard, [weight], [])


def test_a_number_is_not_a_tensor_from_outside() -> None:
    """FreeU writes its scale to a part of a mask so."""
    x = numbers(4)
    with torch.no_grad(), CaptureCheck() as guard, guard.network():
        mask = x * 2
        mask[1:3] = 0.5
    assert list(guard.read_by_network) == [storage_of(x)]


def test_the_network_must_not_write_to_what_outlasts_the_call() -> None:
    """As a buffer that counts: a recording is made, and compared, beside the call."""
    x = numbers(4)
    with torch.no_grad(), CaptureCheck() as guard:
        x.add_(1)  # the solver may
        with guard.network():
            (x + 1).add_(1)
            for write in (lambda: x.add_(1), lambda: x[:2].zero_(), lambda: torch.add(x, 1, out=x)):
                with pytest.raises(CaptureFailed, match="kept after the call"):
                    write()


def test_memory_given_back_is_not_taken_for_what_comes_after() -> None:
    with torch.no_grad(), CaptureCheck() as guard:
        for size in range(1, 200):
            numbers_made = torch.zeros(size)
        del numbers_made
    made = guard.made
    del guard
    later = [torch.zeros(size) for size in range(1, 200)]
    assert not {storage_of(tensor) for tensor in later} & made


def test_tensors_without_memory_of_their_own_are_told_apart() -> None:
    sparse, other = numbers(2, 2).to_sparse(), numbers(2, 2).to_sparse()
    assert storage_of(sparse) == storage_of(sparse)
    assert storage_of(sparse) != storage_of(other)


class Plain:
    """An object with settings, as an attention processor."""

    __slots__ = ("inner", "strength", "table")

    def __init__(self) -> None:
        self.strength = 1.0
        self.table = torch.ones(2)
        self.inner = SimpleNamespace(factor=2.0)


def network() -> Any:
    """A small UNet with all that a module may hold."""
    made = tiny.unet().eval()
    made.extra = numbers(2)
    made.listed = {"deep": [numbers(3), {"deeper": numbers(4)}]}
    made.settings = Plain()
    made.names = {"a", "b"}
    made.pairs = [[1], 2, 3]
    made.number, made.switch = 1.5, False
    made.register_buffer("position", numbers(5))
    return made


def _two_loras(net: Any) -> None:
    tiny.add_lora(net)
    tiny.add_lora(net, "second", seed=1)


def _each_lora(net: Any, change: Callable[[Any], Any]) -> None:
    for module in net.modules():
        if hasattr(module, "scaling"):
            change(module)


def _other_forward(net: Any) -> None:
    class Other(type(net)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    net.__class__ = Other


def _ip_processor(net: Any) -> Any:
    return next(each for each in net.attn_processors.values() if hasattr(each, "scale"))


def nothing(net: Any) -> None:
    pass


FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
# what was done before, and what makes it another network
CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "data of a parameter": (nothing, lambda net: setattr(net.conv_in.weight, "data", net.conv_in.weight.data.clone())),
    "parameter": (nothing, lambda net: setattr(net.conv_in, "bias", nn.Parameter(net.conv_in.bias.detach().clone()))),
    "buffer": (nothing, lambda net: setattr(net, "position", net.position.clone())),
    "class": (nothing, lambda net: setattr(net.conv_act, "__class__", nn.ReLU)),
    "forward of the class": (nothing, _other_forward),
    "LoRA loaded": (nothing, tiny.add_lora),
    "LoRA scale": (tiny.add_lora, lambda net: _each_lora(net, lambda layer: layer.set_scale("default", 0.5))),
    "LoRA merged": (tiny.add_lora, lambda net: _each_lora(net, lambda layer: layer.merge())),
    "LoRA switched": (_two_loras, lambda net: net.set_adapter("default")),
    "IP-Adapter loaded": (nothing, lambda net: tiny.add_ip_adapter(SimpleNamespace(unet=net))),
    "IP-Adapter scale": (
        lambda net: tiny.add_ip_adapter(SimpleNamespace(unet=net)),
        lambda net: _ip_processor(net).scale.__setitem__(0, 0.3),
    ),
    "FreeU strength": (lambda net: net.enable_freeu(**FREEU), lambda net: net.enable_freeu(**FREEU | {"b2": 1.5})),
    "attention processor": (nothing, lambda net: net.set_attn_processor(AttnProcessor())),
    "attribute of a processor": (nothing, lambda net: setattr(next(iter(net.attn_processors.values())), "flag", True)),
    "training of a part": (nothing, lambda net: net.mid_block.train()),
    "number": (nothing, lambda net: setattr(net, "number", 2.0)),
    "setting": (nothing, lambda net: setattr(net.settings, "strength", 0.5)),
    "object in an object": (nothing, lambda net: setattr(net.settings.inner, "factor", 3.0)),
    "set": (nothing, lambda net: net.names.add("c")),
    "plain tensor": (nothing, lambda net: setattr(net, "extra", net.extra.clone())),
    "element of another list": (nothing, lambda net: setattr(net, "pairs", [[1, 2], 3])),
    "dtype": (nothing, lambda net: net.to(torch.bfloat16)),
    "channels_last": (nothing, lambda net: net.to(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    before, change = CHANGES[name]
    net = network()
    before(net)
    found = network_key(net)
    assert network_key(net) == found
    assert hash(network_key(net)) == hash(found)
    change(net)
    assert network_key(net) != found


def _write(net: Any) -> None:
    with torch.no_grad():
        for tensor in (*net.parameters(), net.position, net.extra):
            tensor.mul_(1.5)


def _forward(net: Any) -> None:
    with torch.no_grad():
        net(numbers(1, 4, 16, 16), 3, encoder_hidden_states=numbers(1, 7, 32))


@pytest.mark.parametrize(
    "change",
    [nothing, _write, _forward, lambda net: net.eval(), lambda net: net.to("cpu"), lambda net: net.state_dict()],
    ids=["nothing", "weights written in place", "forward", "eval", "to where it is", "state_dict"],
)
def test_what_a_replay_sees_is_no_change(change: Callable[[Any], Any]) -> None:
    net = network()
    found = network_key(net)
    change(net)
    assert network_key(net) == found


def test_every_tensor_is_known() -> None:
    net = network()
    plain = [net.extra, *net.listed["deep"][:1], net.listed["deep"][1]["deeper"], net.settings.table]
    known = {id(tensor) for tensor in tensors_of(net)}
    assert known == {id(tensor) for tensor in (*net.parameters(), *net.buffers(), *plain)}


def test_a_quantized_tensor_has_a_network_key() -> None:
    """One that is made of several, without an address."""
    net = nn.Linear(2, 2)
    net.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)), requires_grad=False)
    net.odd = numbers(2, 2).to_sparse()
    found = network_key(net)
    assert network_key(net) == found
    net.odd = numbers(2, 2).to_sparse()
    assert network_key(net) != found
    sparse_linear = nn.LazyLinear(2)
    assert network_key(sparse_linear) == network_key(sparse_linear)


HOOKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward": (lambda net: net.mid_block.register_forward_hook(lambda *given: None), "mid_block"),
    "before": (lambda net: net.conv_in.register_forward_pre_hook(lambda *given: None), "conv_in"),
    "on the whole": (lambda net: net.register_forward_hook(lambda *given: None), "UNet2DConditionModel"),
    "diffusers": (
        lambda net: HookRegistry.check_if_exists_or_initialize(net.mid_block).register_hook(ModelHook(), "mine"),
        "mid_block",
    ),
    "accelerate": (lambda net: add_hook_to_module(net.mid_block, AccelerateHook()), "mid_block"),
    "forward of its own": (lambda net: setattr(net.conv_in, "forward", lambda x: x), "conv_in"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_found(name: str) -> None:
    net = tiny.unet()
    assert hooked(net) is None
    hang, where = HOOKS[name]
    hang(net)
    assert hooked(net) == where


def test_hooks_that_are_gone_are_forgotten() -> None:
    """Accelerate leaves the class's own forward with the module."""
    net = tiny.unet()
    add_hook_to_module(net.mid_block, AccelerateHook())
    remove_hook_from_module(net, recurse=True)
    net.conv_in.register_forward_hook(lambda *given: None).remove()
    assert "forward" in vars(net.mid_block)
    assert hooked(net) is None
    assert hooked(torch.compile(nn.Linear(2, 2), backend="eager")) == "OptimizedModule"

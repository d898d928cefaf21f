"""Draws that name no generator: the numbers are those of torch's global one, which does not advance."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from srds_fast.schedulers.private_draws import PrivateDraws, Seeded

X, WORDS = torch.linspace(-1, 1, 128).reshape(2, 4, 4, 4), torch.linspace(-1, 1, 24).reshape(3, 2, 4)
ATTENTION, LAYERS = nn.MultiheadAttention(4, 2, dropout=0.5), nn.LSTM(4, 4, 2, dropout=0.5)
DRAWS: dict[str, Callable[[], Tensor]] = {
    "randn": lambda: torch.randn(3),
    "randn_like": lambda: torch.randn_like(X),
    "uniform_": lambda: torch.empty(3).uniform_(),
    "dropout": lambda: nn.Dropout(0.3)(X),
    "dropout in place": lambda: nn.Dropout(0.3, inplace=True)(X.clone()),
    "dropout2d": lambda: nn.Dropout2d(0.3)(X),
    "alpha dropout": lambda: nn.AlphaDropout(0.3)(X),
    "feature alpha dropout": lambda: nn.FeatureAlphaDropout(0.3)(X),
    "torch.dropout": lambda: torch.dropout(X, 0.3, train=True),
    "scaled dot product": lambda: functional.scaled_dot_product_attention(X, X, X, dropout_p=0.3),
    "attention": lambda: ATTENTION(WORDS, WORDS, WORDS)[0],
    "lstm": lambda: LAYERS(WORDS)[0],
    "rrelu": lambda: nn.RReLU()(X),
    "gumbel": lambda: functional.gumbel_softmax(WORDS),
}


@pytest.mark.parametrize("name", DRAWS)
@torch.no_grad()
def test_numbers_are_those_of_the_global_generator_which_stays(name: str) -> None:
    torch.manual_seed(3)
    expected, after = DRAWS[name](), torch.randn(2)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with PrivateDraws() as draws:
        found, next_one = DRAWS[name](), torch.randn(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, expected)
    assert torch.equal(next_one, after)
    assert draws.drawn > 1


def test_dropout_as_gpus_make_it_draws_beside_the_global_generator_too() -> None:
    """native_dropout has numbers of its own, and takes no generator."""
    x, before = torch.ones(4000), torch.get_rng_state()
    with PrivateDraws():
        found, kept = torch.native_dropout(x, 0.25, True)
        nothing, none_kept = torch.native_dropout(x, 1.0, True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, kept / 0.75)
    assert 0.7 < float(kept.double().mean()) < 0.8
    assert not bool(nothing.any() | none_kept.any())


def test_what_does_not_drop_out_draws_nothing() -> None:
    with PrivateDraws() as draws:
        nn.Dropout(0.3).eval()(X)
        functional.dropout(X, 0.3, training=False)
        functional.scaled_dot_product_attention(X, X, X)
    assert draws.drawn == 0


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_it_stays_until_it_is_left_as_often_as_it_was_entered() -> None:
    before, draws = torch.get_rng_state(), PrivateDraws()
    with draws:
        with draws, Watching():
            torch.randn(1)
        torch.randn(1)
        mode = Watching()
        mode.__enter__()
        with draws.paused():
            pass
        torch.randn(1)
    torch.ones(1)
    mode.__exit__(None, None, None)
    assert draws.drawn == 3
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(1)
    assert not torch.equal(torch.get_rng_state(), before)


def test_of_nested_contexts_the_inner_one_draws() -> None:
    """With its own states, also where a mode of somebody else lies between the two."""

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    cpu = torch.device("cpu")
    state = torch.Generator().manual_seed(7).get_state()
    expected = torch.randn(3, generator=torch.Generator().manual_seed(7))
    for between in (nullcontext(), Mode()):
        with PrivateDraws() as outer:
            with between, PrivateDraws({cpu: state}) as inner:
                assert torch.equal(torch.randn(3), expected)
            torch.randn(3)
        assert (outer.drawn, inner.drawn) == (1, 1)


def test_tensors_made_in_seeded_contexts_are_on_the_cpu() -> None:
    with torch.device("meta"), Seeded():
        assert {torch.ones(2).device.type, torch.randn(2).device.type, torch.arange(2).device.type} == {"cpu"}
        assert torch.ones(2, device="meta").is_meta

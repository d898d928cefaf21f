"""c(rows): the time of one batched network call against its rows, the one curve that every plan hangs on.

    python bench/rows.py                                  # every network, rows 1 to 32, eager and replayed from a graph
    python bench/rows.py --networks digits policy --rows 1 2 4
    python bench/rows.py --json rows.json

Where c(rows) / c(1) stays near 1, rows are free and parallel-in-time wins; where it grows as rows do, one row keeps the
device busy. A row under guidance is two entries of the batch. Networks have random weights (time does not depend on
them) but for the bundled digits pipeline. On a CUDA device times are medians by events; on the CPU networks are made
small, and what is measured means nothing but that it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from srds_fast import zoo
from srds_fast.cli.environment import environment

sys.path.insert(0, str(Path(__file__).parent))
import timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = DEVICE.type == "cpu"
ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32)

Call = Callable[[], object]


class Case(NamedTuple):
    """A network, ready to be called with so many rows.

    Attributes:
        call: rows -> a function that makes one call.
        parameters: how many it has.
        entries: of the batch in a row.
        dtype: of the network.
        network: itself.
    """

    call: Callable[[int], Call]
    parameters: int
    entries: int
    dtype: torch.dtype
    network: nn.Module


def _case(network: nn.Module, dtype: torch.dtype, entries: int, inputs: Callable[[int], dict[str, Tensor]]) -> Case:
    network = network.to(DEVICE, dtype).eval()

    def call(rows: int) -> Call:
        given = {
            name: value.to(DEVICE, dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs(rows * entries).items()
        }
        return lambda: network(**given)

    return Case(call, sum(each.numel() for each in network.parameters()), entries, dtype, network)


def _times(batch: int) -> Tensor:
    """Every entry its own timestep."""
    return torch.linspace(1, 999, batch).long()


def digits() -> Case:
    """The bundled UNet over latents of 4 x 8 x 8, with guidance, float32."""
    pipe = zoo.load("digits")
    unet = pipe.unet
    size, channels = unet.config.sample_size, unet.config.in_channels

    def inputs(batch: int) -> dict[str, Tensor]:
        text = torch.randn(batch, pipe.tokenizer.model_max_length, unet.config.cross_attention_dim)
        return {
            "sample": torch.randn(batch, channels, size, size),
            "timestep": _times(batch),
            "encoder_hidden_states": text,
        }

    return _case(unet, torch.float32, 2, inputs)


def stable_diffusion() -> Case:
    """A UNet of Stable Diffusion 1.5's size at 512 x 512, with guidance, float16."""
    from diffusers import UNet2DConditionModel

    small = {"block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8} if SMALL else {}
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8, **small)
    size = 16 if SMALL else 64

    def inputs(batch: int) -> dict[str, Tensor]:
        return {
            "sample": torch.randn(batch, 4, size, size),
            "timestep": _times(batch),
            "encoder_hidden_states": torch.randn(batch, 77, 768),
        }

    return _case(unet, torch.float32 if SMALL else torch.float16, 2, inputs)


def dit() -> Case:
    """A DiT-XL/2 at 256 x 256, with guidance, float16."""
    from diffusers import DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2 if SMALL else 16,
        attention_head_dim=8 if SMALL else 72,
        num_layers=2 if SMALL else 28,
        in_channels=4,
        out_channels=8,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    )

    def inputs(batch: int) -> dict[str, Tensor]:
        return {
            "hidden_states": torch.randn(batch, 4, 32, 32),
            "timestep": _times(batch),
            "class_labels": torch.arange(batch) % 1000,
        }

    return _case(transformer, torch.float32 if SMALL else torch.float16, 2, inputs)


class _Block(nn.Module):
    """Two convolutions in time; observation and timestep scale and shift what is between (FiLM)."""

    def __init__(self, channels_in: int, channels_out: int, conditions: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(channels_in, channels_out, 5, padding=2), nn.GroupNorm(8, channels_out))
        self.second = nn.Sequential(nn.Conv1d(channels_out, channels_out, 5, padding=2), nn.GroupNorm(8, channels_out))
        self.film = nn.Linear(conditions, 2 * channels_out)
        self.past = nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        scale, shift = self.film(conditions)[:, :, None].chunk(2, dim=1)
        between = nn.functional.mish(self.first(x)) * (1 + scale) + shift
        return nn.functional.mish(self.second(between)) + self.past(x)


class PolicyNetwork(nn.Module):
    """A 1-D UNet over a horizon of actions, as Diffusion Policy's (Chi et al. 2023) in shape and size."""

    def __init__(self, actions: int = 7, observation: int = 64, widths: tuple[int, ...] = (256, 512, 1024)) -> None:
        super().__init__()
        self.frequencies = 128
        self.embed = nn.Sequential(nn.Linear(2 * self.frequencies, 256), nn.Mish(), nn.Linear(256, 256))
        conditions = 256 + observation
        ins = (actions, *widths[:-1])
        self.down = nn.ModuleList(_Block(a, b, conditions) for a, b in zip(ins, widths, strict=True))
        self.middle = _Block(widths[-1], widths[-1], conditions)
        self.up = nn.ModuleList(
            _Block(2 * b, a, conditions)
            for a, b in zip(reversed((widths[0], *widths[:-1])), reversed(widths), strict=True)
        )
        self.out = nn.Conv1d(widths[0], actions, 1)

    def forward(self, sample: Tensor, timestep: Tensor, observation: Tensor) -> Tensor:
        rates = torch.arange(self.frequencies, device=sample.device) * (-9.2 / self.frequencies)
        angles = timestep[:, None].to(sample) * rates.exp().to(sample)
        conditions = torch.cat([self.embed(torch.cat([angles.sin(), angles.cos()], -1)), observation], -1)
        x, kept = sample, []
        for block in self.down:
            x = block(x, conditions)
            kept.append(x)
            x = nn.functional.avg_pool1d(x, 2)
        x = self.middle(x, conditions)
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2)
            x = block(torch.cat([x, kept.pop()], dim=1), conditions)
        return self.out(x)


def policy() -> Case:
    """A robot policy's 1-D UNet, 16 actions of 7 dimensions, no guidance, float32."""
    network = PolicyNetwork(widths=(16, 32)) if SMALL else PolicyNetwork()

    def inputs(batch: int) -> dict[str, Tensor]:
        return {
            "sample": torch.randn(batch, 7, 16),
            "timestep": _times(batch),
            "observation": torch.randn(batch, 64),
        }

    return _case(network, torch.float32, 1, inputs)


NETWORKS: dict[str, Callable[[], Case]] = {
    "digits": digits,
    "policy": policy,
    "sd15": stable_diffusion,
    "dit-xl": dit,
}


@torch.no_grad()
def curve(name: str, rows: list[int]) -> dict[str, Any]:
    """Seconds of a call for each number of rows, "eager" as Python makes it and "replayed" from a graph."""
    torch.manual_seed(0)
    case = NETWORKS[name]()
    found: dict[str, Any] = {
        "network": name,
        "parameters": case.parameters,
        "entries_per_row": case.entries,
        "dtype": str(case.dtype),
        "rows": rows,
        "eager": [timing.called_seconds(case.call(each), DEVICE, calls=2 if SMALL else 20) for each in rows],
        "replayed": None,
    }
    if not SMALL:
        found["replayed"] = [timing.gpu_seconds(case.call(each), replays=20, calls=1) for each in rows]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    curves = []
    for name in options.networks:
        found = curve(name, options.rows)
        curves.append(found)
        print(f"\n{name}, {found['parameters'] / 1e6:.1f} M parameters, {found['dtype']}, ms a call (over one row)")
        print("rows      " + "".join(f"{each:>14}" for each in options.rows))
        for how in ("eager", "replayed"):
            if found[how] is not None:
                first = found[how][0]
                times = "".join(f"{1e3 * each:8.2f}{each / first:5.2f}x" for each in found[how])
                print(f"{how:10}{times}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"environment": environment(), "curves": curves}, indent=1) + "\n")


if __name__ == "__main__":
    main()

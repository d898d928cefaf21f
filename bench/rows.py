"""c(rows): the time of one batched network call against its rows, the one curve that every plan hangs on.

    python -m bench.rows                                  # every network, rows 1 to 32, eager and replayed from a graph
    python -m bench.rows --networks digits policy --rows 1 2 4
    python -m bench.rows --json rows.json --picture rows.png
    python -m bench.rows --from rows.json --picture rows.png       # or from gpu_check.json; nothing is run

Where c(rows) / c(1) stays near 1, rows are free and parallel-in-time wins; where it grows as rows do, one row keeps the
device busy. A row under guidance is two entries of the batch. Networks have random weights (time does not depend on
them) but for the bundled digits pipeline. A curve ends with the first call that takes longer than --longest, or that
does not fit into memory: its rows are those that were measured. On a CUDA device times are medians by events; on the
CPU networks are made small, and what is measured means nothing but that it runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from srds_fast import zoo
from srds_fast.telemetry.environment import environment

from . import timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = DEVICE.type == "cpu"
ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32)
# seconds: a call of more rows than one that takes so long would tell no plan anything
LONGEST = 2.0
# of the pooled text embedding
SDXL_POOLED = 1280
# actions of a policy's sample
HORIZON = 16

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


def _case(network: nn.Module, dtype: torch.dtype, entries: int, inputs: Callable[[int], dict[str, Any]]) -> Case:
    # diffusers' own `to` warns of modules to keep in float32, of which there are none
    nn.Module.to(network, device=DEVICE, dtype=dtype).eval()

    def call(rows: int) -> Call:
        given = _on_device(inputs(rows * entries), dtype)
        return lambda: network(**given)

    return Case(call, sum(each.numel() for each in network.parameters()), entries, dtype, network)


def _on_device(value: Any, dtype: torch.dtype) -> Any:
    """Tensors, also those in dictionaries; floating-point ones in this dtype."""
    if isinstance(value, dict):
        return {name: _on_device(each, dtype) for name, each in value.items()}
    return value.to(DEVICE, dtype if value.is_floating_point() else value.dtype)


def _times(batch: int) -> Tensor:
    """Every entry its own timestep."""
    return torch.linspace(1, 999, batch).long()


def digits() -> Case:
    """The bundled UNet over latents of 4 x 8 x 8, with guidance, float32."""
    pipe = zoo.load("digits")
    unet = pipe.unet
    size, channels = unet.config.sample_size, unet.config.in_channels

    def inputs(batch: int) -> dict[str, Any]:
        text = torch.randn(batch, pipe.tokenizer.model_max_length, unet.config.cross_attention_dim)
        return {
            "sample": torch.randn(batch, channels, size, size),
            "timestep": _times(batch),
            "encoder_hidden_states": text,
        }

    return _case(unet, torch.float32, 2, inputs)


def sd15_unet(small: bool) -> Any:
    """Stable Diffusion 1.5's UNet, for 512 x 512; or one of the same kind that a CPU can do."""
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    if small:
        config |= {"sample_size": 16, "block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8}
    return UNet2DConditionModel(**config)


def stable_diffusion() -> Case:
    """A UNet of Stable Diffusion 1.5's size at 512 x 512, with guidance, float16."""
    with DEVICE:
        unet = sd15_unet(SMALL)
    size = unet.config.sample_size

    def inputs(batch: int) -> dict[str, Any]:
        return {
            "sample": torch.randn(batch, 4, size, size),
            "timestep": _times(batch),
            "encoder_hidden_states": torch.randn(batch, 77, unet.config.cross_attention_dim),
        }

    return _case(unet, torch.float32 if SMALL else torch.float16, 2, inputs)


def sdxl_unet(small: bool) -> Any:
    """Stable Diffusion XL's UNet, for 1024 x 1024; or one of the same kind that a CPU can do."""
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + SDXL_POOLED,
    }
    if small:
        config |= {
            "sample_size": 16,
            "block_out_channels": (32, 64, 64),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (2, 4, 4),
            "norm_num_groups": 8,
        }
    return UNet2DConditionModel(**config)


def stable_diffusion_xl() -> Case:
    """A UNet of Stable Diffusion XL's size at 1024 x 1024, with guidance, float16."""
    with DEVICE:
        unet = sdxl_unet(SMALL)
    size = unet.config.sample_size

    def inputs(batch: int) -> dict[str, Any]:
        return {
            "sample": torch.randn(batch, 4, size, size),
            "timestep": _times(batch),
            "encoder_hidden_states": torch.randn(batch, 77, unet.config.cross_attention_dim),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(batch, SDXL_POOLED),
                "time_ids": torch.tensor([8.0 * size, 8.0 * size, 0, 0, 8.0 * size, 8.0 * size]).expand(batch, -1),
            },
        }

    return _case(unet, torch.float32 if SMALL else torch.float16, 2, inputs)


def dit_transformer(small: bool) -> Any:
    """DiT-XL/2, for 256 x 256; or one of the same kind that a CPU can do."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2 if small else 16,
        attention_head_dim=8 if small else 72,
        num_layers=2 if small else 28,
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


def dit() -> Case:
    """A DiT-XL/2 at 256 x 256, with guidance, float16."""
    with DEVICE:
        transformer = dit_transformer(SMALL)
    size = transformer.config.sample_size

    def inputs(batch: int) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(batch, 4, size, size),
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
    """A 1-D UNet over a horizon of actions, as Diffusion Policy's (Chi et al. 2023) in shape and size.

    Attributes:
        actions, observation: width of an action and of an observation.
    """

    def __init__(self, actions: int = 7, observation: int = 64, widths: tuple[int, ...] = (256, 512, 1024)) -> None:
        super().__init__()
        self.actions, self.observation = actions, observation
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


def policy(network: PolicyNetwork | None = None) -> Case:
    """A robot policy's 1-D UNet, 16 actions of 7 dimensions, no guidance, float32; or another one like it."""
    if network is None:
        network = PolicyNetwork(widths=(16, 32)) if SMALL else PolicyNetwork()

    def inputs(batch: int) -> dict[str, Any]:
        return {
            "sample": torch.randn(batch, network.actions, HORIZON),
            "timestep": _times(batch),
            "observation": torch.randn(batch, network.observation),
        }

    return _case(network, torch.float32, 1, inputs)


NETWORKS: dict[str, Callable[[], Case]] = {
    "digits": digits,
    "policy": policy,
    "sd15": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "dit": dit,
}


class Measured(NamedTuple):
    """Seconds of a call of so many rows, "eager" as Python makes it, "replayed" from a graph or None."""

    rows: int
    eager: float
    replayed: float | None


@torch.no_grad()
def points(case: Case, rows: Sequence[int], longest: float) -> Iterator[Measured]:
    """From few rows to many, until a call takes longer than so many seconds or does not fit into memory."""
    for each in sorted(rows):
        try:
            found = _measured(case.call(each), each)
        except torch.cuda.OutOfMemoryError:
            return
        yield found
        if found.eager > longest:
            return


def _measured(call: Call, rows: int) -> Measured:
    call()
    once = timing.called_seconds(call, DEVICE, calls=1, warm_up=0)
    calls = 2 if SMALL else max(1, min(20, int(0.3 / once)))
    eager = timing.called_seconds(call, DEVICE, calls, warm_up=0)
    return Measured(rows, eager, None if SMALL else timing.gpu_seconds(call, replays=calls, calls=1, warm_up=1))


def curve(name: str, rows: Sequence[int], longest: float = LONGEST) -> dict[str, Any]:
    """Seconds of a call for each number of rows that was measured."""
    torch.manual_seed(0)
    case = NETWORKS[name]()
    found = list(points(case, rows, longest))
    return {
        "network": name,
        "parameters": case.parameters,
        "entries_per_row": case.entries,
        "dtype": str(case.dtype),
        "rows": [each.rows for each in found],
        "eager": [each.eager for each in found],
        "replayed": None if SMALL else [each.replayed for each in found],
    }


def to_write(text: str) -> Path:
    """An argument: a file in a folder that is there. Refused before anything is timed."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path} cannot be written: name a file in a folder that is there")
    return path


def read(path: Path) -> dict[str, Any]:
    """What this command has written, alone or as a part of gpu_check.json.

    Raises:
        SystemExit: it has not.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        whole: dict[str, Any] = found["parts"]["rows"]["result"] if "parts" in found else found
        assert whole["curves"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as why:
        raise SystemExit(
            f"{path} holds no curves ({type(why).__name__}). Name a file that --json has written, or the "
            "gpu_check.json of a run with the part rows."
        ) from None
    return whole


def _draw(whole: dict[str, Any], path: Path) -> None:
    from .rows_picture import picture

    gpu = whole.get("gpu") or "small networks on a CPU: it means nothing but that it runs"
    picture(f"{gpu}, torch {whole['environment']['torch']}", whole["curves"], path)


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        prog="python -m bench.rows", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--longest", type=float, default=LONGEST, help="seconds of a call at which a curve ends")
    parser.add_argument("--json", type=to_write)
    parser.add_argument("--picture", type=to_write, help="PNG: c(rows) / c(1) against rows")
    parser.add_argument("--from", dest="saved", type=Path, help="JSON of this command, or of gpu_check: runs nothing")
    options = parser.parse_args(arguments)
    if options.picture is not None and find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib, which is not installed. Install the extra `plot`.")
    if options.saved is not None:
        if options.picture is None:
            parser.error("--from draws what was measured. Name the picture: --picture rows.png")
        _draw(read(options.saved), options.picture)
        return
    if any(each < 1 for each in options.rows):
        parser.error(f"--rows has {min(options.rows)}. A call has at least one row. Pass 1 or more.")
    gpu = None if SMALL else torch.cuda.get_device_name()
    curves = []
    for name in options.networks:
        found = curve(name, options.rows, options.longest)
        curves.append(found)
        print(f"\n{name}, {found['parameters'] / 1e6:.1f} M parameters, {found['dtype']}, ms a call (over one row)")
        print("rows      " + "".join(f"{each:>14}" for each in found["rows"]))
        for how in ("eager", "replayed"):
            if found[how]:
                first = found[how][0]
                times = "".join(f"{1e3 * each:8.2f}{each / first:5.2f}x" for each in found[how])
                print(f"{how:10}{times}", flush=True)
        whole = {"environment": environment(), "gpu": gpu, "curves": curves}
        if options.json is not None:  # after each, so that a run cut short leaves what it has
            options.json.write_text(json.dumps(whole, indent=1) + "\n")
        if options.picture is not None:
            _draw(whole, options.picture)


if __name__ == "__main__":
    main()

"""Contact sheets: images side by side under readable labels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..solvers.registry import SEQUENTIAL
from .measure import Convergence
from .output import small

GAIN = 20
_TILE, _GAP, _TEXT, _LINE = 96, 8, 13, 17
_INK, _FAINT, _ACCENT = (30, 30, 30), (120, 120, 120), (0, 100, 180)


class Column(NamedTuple):
    """Images [rows, channels, height, width] in [0, 1], 1 or 3 channels, under a heading and a fainter note."""

    heading: str
    note: str
    images: Tensor
    coloured: bool = False


def convergence_sheet(result: Convergence) -> Image.Image:
    """One row per prompt: the image after every iteration, the final one, the sequential one, and their difference."""
    final, reference = result.final, result.stock.images
    stop, mean = final.report.iterations, result.difference(final.images)["mean"]
    columns = [
        Column(f"iteration {stage.iteration}", f"{stage.spent.waves} waves", stage.images, stage.iteration == stop)
        for stage in result.stages
    ]
    columns += [
        Column("final", f"{final.report.waves} waves", final.images, True),
        Column(SEQUENTIAL, f"{result.request.steps} waves", reference),
        Column(f"difference x {GAIN}", f"mean {small(mean)}", amplified(final.images, reference)),
    ]
    return contact_sheet(result.request.prompts, columns)


def amplified(images: Tensor, reference: Tensor, gain: float = GAIN) -> Tensor:
    """Absolute difference times `gain`, clipped to [0, 1]."""
    return (gain * (images.float() - reference.float()).abs()).clamp(0, 1)


def contact_sheet(labels: Sequence[str], columns: Sequence[Column]) -> Image.Image:
    """Lay out columns of images, one labelled row each. Small images are enlarged, every pixel becomes a square."""
    font = ImageFont.load_default(size=_TEXT)
    height, width = columns[0].images.shape[-2:]
    scale = max(1, round(_TILE / width))
    height, width = height * scale, width * scale
    texts = ["\n".join(textwrap.wrap(label, 24)[:4]) for label in labels]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max(ruler.multiline_textbbox((0, 0), text, font)[2] for text in texts)
    left, top = int(margin) + 3 * _GAP, 2 * _LINE + 2 * _GAP
    size = left + len(columns) * (width + _GAP) + _GAP, top + len(labels) * (height + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, text in enumerate(texts):
        place = left - 2 * _GAP, top + row * (height + _GAP) + height // 2
        draw.multiline_text(place, text, _INK, font, anchor="rm", align="right")
    for number, column in enumerate(columns):
        x = left + number * (width + _GAP)
        middle = x + width // 2
        draw.text((middle, _GAP), column.heading, _ACCENT if column.coloured else _INK, font, anchor="mt")
        draw.text((middle, _GAP + _LINE), column.note, _ACCENT if column.coloured else _FAINT, font, anchor="mt")
        for row, image in enumerate(column.images):
            tile = _picture(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, top + row * (height + _GAP)))
    return sheet


def _picture(image: Tensor) -> Image.Image:
    pixels = (255 * image.float().expand(3, -1, -1)).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())

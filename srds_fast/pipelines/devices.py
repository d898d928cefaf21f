"""The names of devices. Nothing of diffusers is imported here: who only checks a name does not wait for it."""

from __future__ import annotations

import re

import torch

from ..errors import InvalidArgument


def device_of(name: str) -> torch.device:
    """The device of that name. Raises InvalidArgument if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):  # PyTorch knows more, such as meta, that compute nothing
        raise InvalidArgument(f"There is no device {name!r}. Use auto, cpu, cuda or cuda:1.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise InvalidArgument(f"There is no device {name!r}. PyTorch sees {seen} CUDA devices. Use cpu or one of them.")
    return device

"""Writes what a measurement was made on: `python -m bench.gpu.where environment.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from bench.command import environment


def main(path: str) -> None:
    """Write versions and hardware, and whether torch can use the GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    text = json.dumps({**environment(), "cuda": torch.version.cuda, "gpu": gpu}, indent=1)
    Path(path).write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1])

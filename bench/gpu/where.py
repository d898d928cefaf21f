"""Writes what a measurement was made on: `python -m bench.where environment.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from srds_fast.cli.environment import environment


def main(path: str) -> None:
    """Write versions and hardware, and whether torch can use the GPU."""
    cuda = torch.cuda.is_available()
    found = {**environment(), "cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name() if cuda else None}
    Path(path).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])

"""`srds-fast env`: versions and hardware."""

from __future__ import annotations

import argparse
from typing import Any

from ..environment import environment


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print one line for each package and device."""
    found = environment()
    lines = {name: "not installed" if value is None else value for name, value in found.items()}
    del lines["cuda_devices"]
    lines |= {
        f"cuda:{number}": "{name}, driver {driver}, {memory_mib} MiB".format(**device)
        for number, device in enumerate(found["cuda_devices"])
    } or {"cuda": "no device"}
    if args.json is None:
        for name, value in lines.items():
            print(f"{name:<14}{value}")
    return found

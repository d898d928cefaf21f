"""`srds-fast env`: versions and hardware."""

from __future__ import annotations

import argparse
import json

from ..environment import environment


def run(args: argparse.Namespace) -> None:
    """Print one line for each package and device, or everything as JSON."""
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    devices = found.pop("cuda_devices")
    lines = {name: "not installed" if value is None else value for name, value in found.items()}
    lines |= {
        f"cuda:{number}": "{name}, driver {driver}, {memory_mib} MiB".format(**device)
        for number, device in enumerate(devices)
    } or {"cuda": "no device"}
    for name, value in lines.items():
        print(f"{name:<14}{value}")

"""The software and hardware of a measurement. Package versions are read without importing the packages."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

from ._version import __version__

PACKAGES = ("torch", "triton", "diffusers", "transformers", "nvtx", "xformers")


def environment() -> dict[str, Any]:
    """Versions and hardware, as plain JSON types; None for a package that is not installed."""
    return {
        "srds_fast": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu_threads": _cpu_threads(),
        "cuda_devices": _cuda_devices(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_threads() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cuda_devices() -> list[dict[str, Any]]:
    """Name, driver and memory of every device; an empty list without an NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    devices = [line.split(", ") for line in answer.splitlines() if line.count(", ") == 2]
    return [
        {"name": name, "driver": driver, "memory_mib": int(memory) if memory.isdecimal() else None}
        for name, driver, memory in devices
    ]

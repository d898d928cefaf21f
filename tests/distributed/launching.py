"""Starts the processes of a test by torchrun."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "worker.py"
# the machine may not know its own name
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}


def script(kind: str) -> str:
    """A script of the guide."""
    (found,) = re.findall(rf"^```python {kind}\n(.*?)^```", (ROOT / "srds_fast" / "GUIDE.md").read_text(), re.M | re.S)
    return str(found)


def launched(ranks: int, folder: Path, *checks: str) -> dict[int, dict[str, Any]]:
    """What the ranks wrote that came to their end. checks: by name; none: all."""
    command = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    given = [sys.executable, "-m", *command, str(WORKER), str(folder), *checks]
    ran = subprocess.run(given, env=ENVIRONMENT, capture_output=True, text=True, timeout=3600)
    found = written(folder)
    assert found, ran.stderr[-4000:]
    return found


def written(folder: Path) -> dict[int, dict[str, Any]]:
    """What ranks have written there, by rank."""
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}

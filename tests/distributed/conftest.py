from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from launching import launched, script


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what all checks and commands found: they are started once, whoever asks first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder of all workers
        folder = folder.parent
    folder = folder / "two-ranks"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "commands").exists():
            (folder / "commands").mkdir()
            (folder / "commands" / "script.py").write_text(script("torchrun"))
            launched(2, folder)
    return folder

"""What each process of a test does under torchrun after the checks: the script of the guide, and the commands."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import torch.distributed as dist

from srds_fast.cli import main

# of the guide: fewer steps take less time
SHORTER = "num_inference_steps=50", "num_inference_steps=8"
DIGITS = ["--steps", "6", "--prompt", "the digit seven"]
COMMANDS = {
    "generate": ["generate", *DIGITS, "--method", "srds", "--out", "generated", "--json", "generated.json"],
    "plan": ["plan", *DIGITS, "--save", "plan.json"],
    "compare": ["compare", *DIGITS, "--method", "srds", "--calls", "1"],
    "mistake": ["generate", *DIGITS, "--out", "generated", "--device", "nothing"],
}


def run(folder: Path) -> None:
    """In a process group that is there, and stays. folder: holds the script; gets what was printed and written."""
    os.chdir(folder)
    begin, end = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda: None
    script = Path("script.py").read_text().replace(*SHORTER)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(script, "the script of the guide", "exec"), {"__name__": "__main__"})
    said = {"script": [0, printed.getvalue(), ""]}
    for name, arguments in COMMANDS.items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        said[name] = [code, out.getvalue(), err.getvalue()]
    dist.init_process_group, dist.destroy_process_group = begin, end
    (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps(said))

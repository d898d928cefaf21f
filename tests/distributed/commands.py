"""What each process of a test does under torchrun: the script of the guide, then the command, several times.

torchrun --nproc-per-node 2 tests/distributed/commands.py FOLDER
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch
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
    torch.set_num_threads(1)
    os.chdir(folder)
    # the process group of the script stays for the commands: to start another takes seconds
    end, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    script = Path("script.py").read_text().replace(*SHORTER)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(script, "the script of the guide", "exec"), {"__name__": "__main__"})
    said = {"script": [0, printed.getvalue(), ""]}
    for name, arguments in COMMANDS.items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        said[name] = [code, out.getvalue(), err.getvalue()]
    end()
    (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    run(Path(sys.argv[1]))

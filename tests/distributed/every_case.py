"""Every method with every kind of call, and every fault at every network call on every rank: prints tables.

python tests/distributed/every_case.py [--ranks 2] [--only answers|faults|lost] [--call "sample, auto"]
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine may not know its own name

import diffusers
import torch
from every_answer import show_answers
from every_fault import WAYS, show_faults, show_lost

PARTS = {"answers": show_answers, "faults": show_faults, "lost": show_lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--call", choices=WAYS, help="of the faults, only those of this kind of call")
    given = parser.parse_args()
    parts = PARTS if given.call is None else {"faults": partial(show_faults, only=given.call)}
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # as in each rank: a process that has threads must not fork
    bad = sum(show(given.ranks) for name, show in parts.items() if given.only in (None, name))
    print(f"\n{bad} not as they should be")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

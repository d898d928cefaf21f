"""A robot policy: latency of one trajectory, 100 DDIM steps, batch 1, every method at its defaults.

    python -m bench.quality.policy --json policy.json       # trains for a minute, then measures

A 1-D UNet over 16 actions of 7 dimensions, trained on synthetic demonstrations. Columns are those of
`bench.quality.peers`, but the first loop is "by hand", the best sequential loop that one would write for this policy:
coefficients computed before, nothing but arithmetic between two network calls.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.command import parser, write
from bench.runner import AUTO, BY_HAND, SEQUENTIAL, STOCK, Entrant, Row, measured, show, told
from bench.workloads import demonstrations
from bench.workloads.samplers import SAMPLES, policy
from srds_fast.solvers.collocation.options import Collocation

from .entrants import by_hand


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.quality.policy", __doc__)
    found.add_argument("--smoke", action="store_true", help="a tiny size: 10 steps, hardly trained, 2 rounds")
    options = found.parse_args(arguments)
    steps, rounds, training = (10, 2, 3) if options.smoke else (100, SAMPLES, demonstrations.TRAINING_STEPS)
    workload = policy(demonstrations.train(training))
    every = [
        Entrant(BY_HAND, partial(by_hand, workload, steps)),
        Entrant(STOCK, partial(workload.stock, steps)),
        told(workload, steps, SEQUENTIAL, method="sequential"),
        told(workload, steps, "srds", method="srds"),
        *(told(workload, steps, f"collocation, cover 1 / {n}", method=Collocation(cover=n)) for n in (1, 3)),
        told(workload, steps, AUTO, method="auto"),
    ]
    results: list[Row] = []
    for results in measured("policy", workload, steps, rounds, every):
        write(options.json, results=results)
    print(f"{workload.parameters / 1e3:.0f} thousand parameters, {steps} steps")
    show(results)


if __name__ == "__main__":
    main()

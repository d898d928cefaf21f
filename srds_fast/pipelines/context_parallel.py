"""Networks whose calls several processes make together: diffusers' context parallelism.

Such a call waits for the other processes, so all of them must make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engine.compiled import unwrapped
from ..engine.distributed.ranks import CONTEXT, Ranks
from ..errors import InvalidArgument

ADVICE = (
    "Make one mesh with the dimensions 'time', 'ring' and 'ulysses', pass it as parallel=mesh, and call "
    "enable_parallelism(config=ContextParallelConfig(ring_degree=..., ulysses_degree=..., mesh=mesh)) on the network."
)


def processes_of(network: Any) -> frozenset[int] | None:
    """The global ranks that make each call of a network together; None: each process makes its own."""
    parallel = getattr(unwrapped(network), "_parallel_config", None)
    config = getattr(parallel, "context_parallel_config", None)
    if config is None:
        return None
    import torch.distributed as dist

    return frozenset(dist.get_process_group_ranks(config._flattened_mesh.get_group()))


def check_ranks(networks: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise InvalidArgument unless the processes that evaluate the same rows are those that share network calls."""
    found = {name: together for name, each in networks.items() if (together := processes_of(each)) is not None}
    for name, together in found.items():
        if together != ranks.beside:
            raise InvalidArgument(
                f"The {name} splits each call over the ranks {sorted(together)}, and parallel gives the same rows to "
                f"the ranks {sorted(ranks.beside)}. A split call would mix the rows of several. {ADVICE}"
            )
    if len(ranks.beside) > 1 and not found:
        raise InvalidArgument(
            f"parallel is a mesh with {' and '.join(map(repr, CONTEXT))}, along which {len(ranks.beside)} processes "
            f"would evaluate the same rows, and no network of this pipeline splits its calls over them. {ADVICE}"
        )


def by_clocks(networks: Mapping[str, Any]) -> str | None:
    """Why the stock loop makes a call that would be planned by the clocks of single processes, or None."""
    name = next((name for name, each in networks.items() if processes_of(each) is not None), None)
    if name is None:
        return None
    return (
        f"the {name} splits its calls over several processes, whose clocks may choose different plans: pass a method, "
        "or parallel=mesh with the dimensions 'time', 'ring' and 'ulysses'"
    )

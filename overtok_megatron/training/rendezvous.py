"""The store of torch.distributed in which the ranks of one start of a job find each other.

torchrun with its static rendezvous, which is what `--master-addr` means, keeps one store for all starts of `--max-restarts`.
Ranks of a later start would read there what those before them have left: verdicts of the checks, and addresses at which nobody
listens any more, on which torch itself fails ("Gloo connectFullMesh failed"). So each start has keys of its own.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, register_rendezvous_handler, rendezvous

_SCHEME = "overtok"


def store_of_start(attempt: str, timeout: timedelta, *, rank: int = -1, world_size: int = -1) -> tuple[Store, int, int]:
    """The store at MASTER_ADDR and MASTER_PORT with the keys of one start, the rank and the number of ranks.

    attempt: how many starts of this job there were before. rank, world_size: -1 = those of the environment. Raises as torch's
    `env://` does, which reads the environment.
    """
    store, rank, world_size = next(rendezvous("env://", rank, world_size, timeout=timeout))
    return PrefixStore(f"overtok/start {attempt}", store), rank, world_size


def init_method(attempt: str) -> str:
    """What makes torch.distributed, and so DeepSpeed, use `store_of_start` for the process group."""
    return f"{_SCHEME}://{attempt}"


def _handler(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    yield store_of_start(url.partition("://")[2].partition("?")[0], timeout)


register_rendezvous_handler(_SCHEME, _handler)

"""The store of torch.distributed in which the ranks of one start of a job find each other.

torchrun with its static rendezvous, which is what `--master-addr` means, keeps one store for all starts of `--max-restarts`.
Ranks of a later start would read there what those before them have left: verdicts of the checks, and addresses at which nobody
listens any more, on which torch itself fails ("Gloo connectFullMesh failed"). So each start has keys of its own.
"""

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, register_rendezvous_handler, rendezvous

INIT_METHOD = "overtok://"  # as env://, with the keys of this start
_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun: how many starts there were before this one


def store_of_start(rank: int, world_size: int, timeout: timedelta) -> Store:
    """The store at MASTER_ADDR and MASTER_PORT with the keys of this start alone. Raises as torch's `env://` does."""
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    return PrefixStore(f"overtok/start {os.environ.get(_ATTEMPT, '0')}", store)


def _handler(_: str, timeout: timedelta, **__: Any) -> Iterator[tuple[Store, int, int]]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    yield store_of_start(rank, world_size, timeout), rank, world_size


register_rendezvous_handler(INIT_METHOD.partition(":")[0], _handler)

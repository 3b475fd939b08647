"""Which rank owns which rows, and the exchange between the ranks: flat, or in two levels where hosts have several ranks."""

from typing import Any

import torch
import torch.distributed as dist

from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.ngram.exchange import Exchange, FlatExchange
from overtok_megatron.ngram.row_space import RowFilter
from overtok_megatron.ngram.two_level_exchange import TwoLevelExchange
from overtok_megatron.parallel.splits import split_bounds, split_range


def owner_index(rank: int, world_size: int, ranks_per_host: int | None) -> int:
    """Which of the contiguous ranges of rows a rank owns.

    In a flat exchange that is the rank. In two levels ranges are ordered by (rank within the host, host), so that the ranks
    with the same number on all hosts own neighbouring ranges.
    """
    if ranks_per_host is None:
        return rank
    host, rank_in_host = divmod(rank, ranks_per_host)
    return rank_in_host * (world_size // ranks_per_host) + host


def owned_range(total_rows: int, rank: int, world_size: int, ranks_per_host: int | None) -> tuple[int, int]:
    """The first row id that a rank owns, and the end of its range."""
    return split_range(total_rows, world_size, owner_index(rank, world_size, ranks_per_host))


def make_exchange(
    total_rows: int,
    group: dist.ProcessGroup | None,
    *,
    ranks_per_host: int | None,
    kernels: RowKernels,
    gradient_dtype: torch.dtype,
    trained_rows: RowFilter | None = None,
    backend: str | None = None,
    name: str = "tables",
    pin_rows: bool = False,
) -> Exchange[Any]:
    """The exchange over all ranks of the world. All ranks must call this, because it may make process groups.

    group: of all ranks; None = one rank. ranks_per_host: given, it asks for the exchange in two levels. trained_rows: which
    rows take updates; None = all. backend: of the process groups that are made for the exchange; None = the default one, and
    the flat exchange uses `group` itself. name: of these groups in traces. pin_rows: as in FlatExchange.
    """
    world_size = 1 if group is None else dist.get_world_size(group)
    bounds = split_bounds(total_rows, world_size)
    settings: dict[str, Any] = {
        "kernels": kernels, "gradient_dtype": gradient_dtype, "trained_rows": trained_rows, "pin_rows": pin_rows,
    }  # fmt: skip
    if world_size == 1:
        return FlatExchange(bounds, None, **settings)
    if ranks_per_host is None:
        if backend is not None:
            group = dist.new_group(list(range(world_size)), backend=backend, group_desc=name)
        return FlatExchange(bounds, group, **settings)
    hosts = world_size // ranks_per_host
    ranks_of_hosts = [list(range(host * ranks_per_host, (host + 1) * ranks_per_host)) for host in range(hosts)]
    same_rank_in_host = [list(range(first, world_size, ranks_per_host)) for first in range(ranks_per_host)]
    return TwoLevelExchange(
        bounds,
        host_group=_group_of_this_rank(ranks_of_hosts, backend, f"{name}, host"),
        network_group=_group_of_this_rank(same_rank_in_host, backend, f"{name}, hosts"),
        **settings,
    )


def _group_of_this_rank(partition: list[list[int]], backend: str | None, name: str) -> dist.ProcessGroup | None:
    """The group of those ranks of a partition of the world among which this rank is; None where groups have one rank."""
    if len(partition[0]) == 1:
        return None
    own = None
    for ranks in partition:  # every rank must make every group, in the same order
        group = dist.new_group(ranks, backend=backend, group_desc=name)
        if dist.get_rank() in ranks:
            own = group
    return own

"""Which rank owns which rows, and the exchange between them: flat, or in two levels where hosts have several ranks."""

import torch
import torch.distributed as dist

from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.ngram.exchange import Exchange, FlatExchange, Trained, TwoLevelExchange
from overtok_megatron.ngram.row_space import row_bounds


def owner_place(rank: int, world_size: int, ranks_per_host: int | None) -> int:
    """Where in the order of owners a rank comes: its own number, or in two levels by (place within the host, host)."""
    if ranks_per_host is None:
        return rank
    host, within = divmod(rank, ranks_per_host)
    return within * (world_size // ranks_per_host) + host


def owned_range(total_rows: int, rank: int, world_size: int, ranks_per_host: int | None) -> tuple[int, int]:
    """First place in the row space that a rank owns, and the end."""
    bounds, place = row_bounds(total_rows, world_size), owner_place(rank, world_size, ranks_per_host)
    return bounds[place], bounds[place + 1]


def make_exchange(
    total_rows: int,
    group: dist.ProcessGroup | None,
    *,
    ranks_per_host: int | None,
    kernels: RowKernels,
    gradient_dtype: torch.dtype,
    trained: Trained | None = None,
    backend: str | None = None,
) -> Exchange:
    """The exchange over all ranks of the world, of which `group` is the group; None = one rank.

    trained: which rows take updates; None = all. backend: of process groups made for it; None = none are made where `group`
    itself serves. A collective of the world.
    """
    world = 1 if group is None else dist.get_world_size(group)
    bounds = row_bounds(total_rows, world)
    if world == 1:
        return FlatExchange(bounds, None, kernels, gradient_dtype, trained)
    if ranks_per_host is None:
        own = group if backend is None else dist.new_group(list(range(world)), backend=backend, group_desc="tables")
        return FlatExchange(bounds, own, kernels, gradient_dtype, trained)
    hosts = world // ranks_per_host
    within = [list(range(host * ranks_per_host, (host + 1) * ranks_per_host)) for host in range(hosts)]
    across = [list(range(place, world, ranks_per_host)) for place in range(ranks_per_host)]
    host_group = _own_group(within, backend, "tables, host")
    host_lines = _own_group(across, backend, "tables, hosts")
    return TwoLevelExchange(bounds, host_group, host_lines, kernels, gradient_dtype, trained)


def _own_group(lists: list[list[int]], backend: str | None, name: str) -> dist.ProcessGroup | None:
    if len(lists[0]) == 1:
        return None
    own = None
    for ranks in lists:  # every rank makes every group, in the same order
        group = dist.new_group(ranks, backend=backend, group_desc=name)
        if dist.get_rank() in ranks:
            own = group
    return own

"""From a run's configuration to its n-gram tables.

This is the root of the room: below it values are passed, not configuration objects.
"""

from functools import partial

import torch
import torch.distributed as dist

from overtok_megatron.config.derived import hash_base, row_width
from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig, RunConfig
from overtok_megatron.kernels.choice import Kernels, choose_kernels
from overtok_megatron.kernels.dtypes import DTYPES, ROW_DTYPES
from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.ngram.exchange import Exchange, FlatExchange
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.placement import make_exchange, owned_range
from overtok_megatron.ngram.prefetch import Prefetch
from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.ngram.row_space import RowSpace, TableGroup
from overtok_megatron.ngram.row_store import RowReader, RowStore
from overtok_megatron.ngram.sharded_tables import ShardedTables, TableReader


def row_space(model: ModelConfig, over: OverEncodingConfig) -> RowSpace:
    """The tables that a validated, enabled over-encoding section asks for."""
    assert over.enabled and over.table_rows is not None
    added = [TableGroup(tuple(one.orders), one.num_slices, one.table_rows, one.frozen) for one in over.added]
    width = row_width(model, over)
    return RowSpace(over.ngram_order, over.num_slices, over.table_rows, width, tuple(added), over.frozen)


def build_row_store(
    config: RunConfig, *, device: torch.device, kernels: RowKernels, group: dist.ProcessGroup | None = None
) -> RowStore:
    """This rank's rows with their initial values. device: where they lie; group: all ranks, None = all rows are here."""
    over = config.over_encoding
    space = row_space(config.model, over)
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    return RowStore(
        *owned_range(space.total_rows, rank, size, over.ranks_per_host),
        space.width,
        std=over.init_std,
        seed=config.training.seed,
        device=device,
        dtype=ROW_DTYPES[over.row_dtype],
        kernels=kernels,
    )


def build_hash(config: RunConfig, eod_id: int, kernels: RowKernels) -> NgramHash:
    """How tokens become row ids. eod_id: the token that ends a document."""
    over = config.over_encoding
    return NgramHash(row_space(config.model, over), hash_base(config), over.pad_id, over.boundary, eod_id, kernels)


def build_table_reader(
    config: RunConfig, eod_id: int, store: RowReader, *, device: torch.device, kernels: Kernels
) -> TableReader:
    """Tables to be read, over a store that holds all rows. device: where the model computes, with its kernels."""
    return TableReader(
        build_hash(config, eod_id, kernels.rows),
        store,
        FlatExchange((0, store.stop), None, store.kernels),
        dtype=DTYPES[config.training.precision],
        device=device,
        kernels=kernels.rows,
    )


def build_tables(
    config: RunConfig,
    eod_id: int,
    *,
    device: torch.device,
    kernels: Kernels,
    group: dist.ProcessGroup | None = None,
    sequence_slice: tuple[int, int] = (0, 1),
) -> ShardedTables:
    """This rank's tables with initial rows, to be trained.

    device: where the model computes, with its kernels. group: the table group, which is the world; None = all rows are here.
    sequence_slice: (index, count) of the slice of every sequence that this rank looks up.
    """
    over = config.over_encoding
    space, dtype = row_space(config.model, over), DTYPES[config.training.precision]
    on_host = over.storage == "host"
    store_device = torch.device("cpu") if on_host else device
    row_kernels = kernels.rows if store_device == device else choose_kernels(config.training.kernels, store_device).rows
    store = build_row_store(config, device=store_device, kernels=row_kernels, group=group)
    optimizer = RowOptimizer(
        over.optimizer,
        store.rows,
        weight_decay=over.weight_decay,
        betas=over.betas,
        eps=over.eps,
        state_dtype=ROW_DTYPES[over.state_dtype],
        seed=config.training.seed,
        kernels=row_kernels,
    )

    def exchange() -> Exchange:  # each has process groups of its own in host memory
        return make_exchange(
            space.total_rows,
            group,
            ranks_per_host=over.ranks_per_host,
            kernels=row_kernels,
            gradient_dtype=ROW_DTYPES[over.gradient_dtype],
            trained=space.trained_at if space.any_frozen else None,
            backend="gloo" if on_host else None,
        )

    prefetch = Prefetch(exchange(), partial(store.read, dtype=dtype)) if on_host else None
    return ShardedTables(
        build_hash(config, eod_id, kernels.rows),
        store,
        exchange(),
        optimizer=optimizer,
        dtype=dtype,
        device=device,
        kernels=kernels.rows,
        group=group,
        sequence_slice=sequence_slice,
        prefetch=prefetch,
    )

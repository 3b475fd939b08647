"""From a run's configuration to its n-gram tables.

This is the only file of ngram/ that reads configuration objects; it passes plain values to the others.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from overtok_megatron.config.derived import hash_base, row_width
from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig, RunConfig
from overtok_megatron.kernels.choice import Kernels, choose_row_kernels
from overtok_megatron.kernels.dtypes import DTYPES, ROW_DTYPES
from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.ngram.exchange import Exchange, FlatExchange
from overtok_megatron.ngram.families import TableFamily
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.placement import make_exchange, owned_range
from overtok_megatron.ngram.prefetch import Prefetch
from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.ngram.row_space import RowSpace, TableGroup
from overtok_megatron.ngram.row_store import RowReader, RowStore
from overtok_megatron.ngram.sharded_tables import ShardedTables, TableReader, slice_row_ids
from overtok_megatron.parallel.devices import CPU
from overtok_megatron.parallel.splits import named_seed
from overtok_megatron.parallel.uploading import Upload


def row_space(model: ModelConfig, over: OverEncodingConfig) -> RowSpace:
    """The tables that a validated, enabled over-encoding section asks for."""
    assert over.enabled and over.table_rows is not None
    added = [TableGroup(tuple(one.orders), one.num_slices, one.table_rows, one.frozen) for one in over.added]
    return RowSpace(
        ngram_order=over.ngram_order,
        num_slices=over.num_slices,
        table_rows=over.table_rows,
        width=row_width(model, over),
        added=tuple(added),
        frozen=over.frozen,
    )


def build_family(config: RunConfig, eod_id: int, kernels: RowKernels) -> TableFamily:
    """The family of tables that the configuration describes. eod_id: the token that ends a document."""
    over = config.over_encoding
    return NgramHash(
        space=row_space(config.model, over),
        base=hash_base(config),
        pad_id=over.pad_id,
        boundary=over.boundary,
        eod_id=eod_id,
        kernels=kernels,
    )


def build_row_store(
    config: RunConfig,
    family: TableFamily,
    *,
    device: torch.device,
    kernels: RowKernels,
    group: dist.ProcessGroup | None = None,
) -> RowStore:
    """This rank's rows of a family with their initial values. device: where they lie; group: None = all rows are here."""
    over = config.over_encoding
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    return RowStore(
        *owned_range(family.total_rows, rank, size, over.ranks_per_host),
        family.width,
        std=over.init_std,
        seed=family_seed(config.training.seed, family.seed_name),
        device=device,
        dtype=ROW_DTYPES[over.row_dtype],
        kernels=kernels,
    )


def build_table_reader(
    config: RunConfig, family: TableFamily, store: RowReader, *, device: torch.device, kernels: Kernels
) -> TableReader:
    """Tables to be read, over a store that holds all rows. device: where the model computes, with its kernels."""
    return TableReader(
        family,
        store,
        FlatExchange((0, store.stop), None, kernels=store.kernels),
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

    eod_id: the token that ends a document. The other arguments are those of `build_family_tables`. All ranks must call this.
    """
    family = build_family(config, eod_id, kernels.rows)
    return build_family_tables(
        config, family, device=device, kernels=kernels, group=group, sequence_slice=sequence_slice
    )


def build_family_tables(
    config: RunConfig,
    family: TableFamily,
    *,
    device: torch.device,
    kernels: Kernels,
    group: dist.ProcessGroup | None = None,
    sequence_slice: tuple[int, int] = (0, 1),
) -> ShardedTables:
    """This rank's tables of any family, stored, exchanged and updated as the over-encoding section says.

    device: where the model computes, with its kernels. group: the table group, which is the world; None = all rows are here.
    sequence_slice: (index, count): into how many slices every sequence is cut, and which of them this rank looks up. Initial
    rows and rounding noise follow from the run's seed and the family's `seed_name`. All ranks must call this.
    """
    on_host = config.over_encoding.storage == "host"
    host_kernels = kernels.rows if device == CPU else choose_row_kernels(config.training.kernels, CPU)
    store_device, store_kernels = (CPU, host_kernels) if on_host else (device, kernels.rows)
    store = build_row_store(config, family, device=store_device, kernels=store_kernels, group=group)
    dtype = DTYPES[config.training.precision]
    prefetch = None
    # One rank on the CPU would gain nothing: the thread would plan on the cores that the model computes on.
    if on_host or group is not None or device != CPU:
        prefetch = Prefetch(
            partial(slice_row_ids, family.with_kernels(host_kernels), sequence_slice, CPU),
            # the thread's exchange has process groups of its own
            _exchange(config, family, group, host_kernels, backend="gloo", name="tables ahead", pin_rows=device != CPU),
            Upload(device),
            partial(store.read, dtype=dtype) if on_host else None,
        )
    return ShardedTables(
        family,
        store,
        _exchange(config, family, group, store_kernels, backend="gloo" if store_device != device else None),
        optimizer=_row_optimizer(config, family, store),
        dtype=dtype,
        device=device,
        kernels=kernels.rows,
        group=group,
        sequence_slice=sequence_slice,
        prefetch=prefetch,
    )


def family_seed(seed: int, seed_name: str) -> int:
    """The seed of a family's initial rows and rounding noise: of the run where the name is empty, else another of 63 bits."""
    return named_seed(seed, seed_name) if seed_name else seed


def _row_optimizer(config: RunConfig, family: TableFamily, store: RowStore) -> RowOptimizer:
    over = config.over_encoding
    return RowOptimizer(
        over.optimizer,
        store.rows,
        weight_decay=over.weight_decay,
        betas=over.betas,
        eps=over.eps,
        state_dtype=ROW_DTYPES[over.state_dtype],
        seed=family_seed(config.training.seed, family.seed_name),
        kernels=store.kernels,
    )


def _exchange(
    config: RunConfig,
    family: TableFamily,
    group: dist.ProcessGroup | None,
    kernels: RowKernels,
    **groups: Any,
) -> Exchange[Any]:
    over = config.over_encoding
    return make_exchange(
        family.total_rows,
        group,
        ranks_per_host=over.ranks_per_host,
        kernels=kernels,
        gradient_dtype=ROW_DTYPES[over.gradient_dtype],
        trained_rows=family.trained_rows,
        **groups,
    )

"""A configuration's model and tables on the CPU, in this process, with the kernels that the configuration names."""

from typing import Any

import torch

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.kernels.choice import Kernels, choose_kernels
from overtok_megatron.model.assembly import build_transformer
from overtok_megatron.model.transformer import Transformer
from overtok_megatron.ngram.building import build_family, build_row_store, build_table_reader, build_tables
from overtok_megatron.ngram.row_store import RowReader
from overtok_megatron.ngram.sharded_tables import ShardedTables, TableReader

CPU = torch.device("cpu")


def kernels_of(config: RunConfig) -> Kernels:
    return choose_kernels(config.training.kernels, CPU)


def cpu_model(config: RunConfig, **options: Any) -> Transformer:
    """The whole model, or with `tensor_group` a tensor-parallel rank's part of it."""
    return build_transformer(config, device=CPU, kernels=kernels_of(config), **options)


def cpu_tables(config: RunConfig, eod_id: int, **options: Any) -> ShardedTables:
    """Tables to train."""
    return build_tables(config, eod_id, device=CPU, kernels=kernels_of(config), **options)


def cpu_reader(config: RunConfig, eod_id: int, store: RowReader | None = None) -> TableReader:
    """Tables to read, over a store or else over rows with their initial values."""
    kernels = kernels_of(config)
    family = build_family(config, eod_id, kernels.rows)
    store = store or build_row_store(config, family, device=CPU, kernels=kernels.rows)
    return build_table_reader(config, family, store, device=CPU, kernels=kernels)

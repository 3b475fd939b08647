"""Over-encoding tables of some ranks in one process, trained a little, and what a checkpoint holds of them."""

from pathlib import Path
from typing import Any

import torch

from overtok_megatron.checkpoint.tables import TableWriter
from overtok_megatron.kernels.rows import RowKernels, RowRule
from overtok_megatron.ngram.exchange import FlatExchange
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.ngram.row_space import RowSpace
from overtok_megatron.ngram.row_store import RowStore
from overtok_megatron.ngram.sharded_tables import ShardedTables
from overtok_megatron.parallel.splits import split_range

CPU = torch.device("cpu")
WIDTH = 6


def make_tables(
    *,
    rank: int = 0,
    ranks: int = 1,
    table_rows: int = 40,
    optimizer: RowRule = "adam",
    width: int = WIDTH,
    std: float = 0.0,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
) -> ShardedTables:
    """One rank's tables without its processes: saving and loading talk to nobody."""
    space = RowSpace(ngram_order=2, num_slices=2, table_rows=table_rows, width=width)
    store = RowStore(*split_range(space.total_rows, ranks, rank), width, std=std, seed=1, device=CPU, dtype=dtype)
    rows = RowOptimizer(optimizer, store.rows, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, state_dtype=state_dtype)
    return ShardedTables(
        NgramHash(space=space, base=50, pad_id=0, boundary="reset", eod_id=0),
        store,
        FlatExchange((0, space.total_rows), None),
        optimizer=rows,
        dtype=torch.float32,
        device=CPU,
        kernels=RowKernels(),
    )


def save_tables(folder: Path, tables: ShardedTables) -> list[str]:
    """A full save at once; the names of its files."""
    return list(TableWriter(tables, 0).start_save(folder)())


def trained_tables(ranks: int, **settings: Any) -> list[ShardedTables]:
    """All ranks' tables after three updates of about half of the rows."""
    generator = torch.Generator().manual_seed(0)
    result = [make_tables(rank=rank, ranks=ranks, std=1.0, **settings) for rank in range(ranks)]
    for _ in range(3):
        for tables in result:
            (rows,) = torch.where(torch.rand(tables.store.num_rows, generator=generator) < 0.3)
            grad = torch.randn(len(rows), tables.store.rows.weight.shape[1], generator=generator)
            tables.optimizer.update(rows, grad, 0.1)
    return result


def columns(parts: list[ShardedTables]) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint of tables holds, over all ranks."""
    names = parts[0].optimizer.state.keys()
    state = {name: torch.cat([tables.optimizer.state[name] for tables in parts]) for name in names}
    weight = torch.cat([tables.store.rows.weight for tables in parts])
    return state | {"weight": weight, "touched": torch.cat([tables.store.flags for tables in parts]) > 0}

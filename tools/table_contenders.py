"""What `benchmark.py tables` compares: look-ups in tables with their backward and update, ours and others'.

Each maker takes ids [N, T] int64 (rows [rows t, rows (t + 1)) of one row space are table t), the rows of a table, the width w
and the gradient [N, T, w] float32, and returns one step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.ngram.embedding import OverEncoding, OverTables, gather_rows
from overtok_megatron.ngram.exchange import RowExchange
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.optimizer import build_row_optimizer
from overtok_megatron.ngram.sizing import RowSpace
from overtok_megatron.ngram.table import TableShard


def our_tables(ids: Tensor, rows: int, width: int, grad: Tensor) -> tuple[Callable[[], object], Tensor]:
    """A training step of this project's tables (exchange, gather, backward, row-wise update), and the rows themselves."""
    kernels = choose_kernels("auto", ids.device).rows
    total = ids.shape[-1] * rows
    shard = TableShard(0, total, width, std=0.02, seed=0, device=ids.device)
    optimizer = build_row_optimizer(
        "rowwise_adagrad", shard.weight, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, state_dtype=torch.float32,
        kernels=kernels,
    )  # fmt: skip
    module = OverEncoding(ids.shape[-1] * width, ids.shape[-1], combine="sum")
    space = RowSpace(3, 2, rows, width)
    exchange = RowExchange((0, total), None, kernels)
    tables = OverTables(module, NgramHash(space, 2, 0, "ignore", 0), shard, optimizer, exchange, dtype=torch.float32)

    def step() -> None:
        slots = tables.begin_rows(ids)
        assert tables.step is not None
        gather_rows(tables.step, slots).backward(grad)
        tables.collect(1.0)
        tables.apply(0.01, 1.0)

    return step, shard.weight


def fbgemm_tables(ids: Tensor, rows: int, width: int, grad: Tensor) -> Callable[[], object] | None:
    """fbgemm's table-batched embedding with exact row-wise Adagrad; None where it is not installed."""
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except ImportError:
        return None
    cuda = ids.device.type == "cuda"
    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    layer = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, width, *place)] * ids.shape[-1],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        eps=1e-8,
        pooling_mode=PoolingMode.SUM,  # of bags of one
    )
    own = (ids - rows * torch.arange(ids.shape[-1], device=ids.device)).t().contiguous().flatten()
    offsets = torch.arange(own.numel() + 1, device=ids.device)
    flat = grad.flatten(1)
    return lambda: layer(own, offsets).backward(flat)


def torch_tables(ids: Tensor, rows: int, width: int, grad: Tensor, *, sparse: bool) -> Callable[[], object]:
    """nn.Embedding with SparseAdam, or dense with AdamW."""
    total = ids.shape[-1] * rows
    layer = torch.nn.Embedding(total, width, sparse=sparse, device=ids.device)
    kind: Any = torch.optim.SparseAdam if sparse else torch.optim.AdamW
    optimizer = kind(layer.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        layer(ids).backward(grad)
        optimizer.step()

    return step


def traffic(ids: Tensor, weight: Tensor, grad: Tensor) -> Callable[[], object]:
    """The machine's limit: distinct rows read, modified and written, look-ups written and their gradients read, no work."""
    distinct, out = ids.unique(), torch.empty_like(grad)

    def step() -> None:
        touched = weight.index_select(0, distinct)
        weight.index_copy_(0, distinct, touched.mul_(1.0))
        out.copy_(grad)

    return step

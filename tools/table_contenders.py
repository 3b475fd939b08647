"""What `benchmark.py tables` compares: look-ups in tables with their backward and update, ours and others'.

Each maker takes rows [N, T] int64, of each of T tables of `size` rows, the width w and the gradient [N, T, w] float32, and
returns one step.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.rows import RowStep, StoredRows
from overtok_megatron.ngram.exchange import FlatExchange
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.ngram.row_space import RowSpace
from overtok_megatron.ngram.row_store import RowStore
from overtok_megatron.ngram.sharded_tables import ShardedTables


@dataclass(frozen=True)
class Needs:
    """Bytes that each contender takes at most, its step's buffers included.

    rows: of all tables; width: w; look_ups: N per step; distinct: different rows among them.
    """

    rows: int
    width: int
    look_ups: int
    distinct: int

    def _gradients(self) -> int:
        """The one gradient that all share, and its copy in bfloat16."""
        return self.look_ups * self.width * (4 + 2)

    def ours(self, dtype: torch.dtype) -> int:
        """Rows, state and flags; per look-up its gathered row and six numbers of 64 bits, per distinct row its sums, twice,
        and what torch's operators take where the compiled loops are absent."""
        stored = self.rows * ((self.width + 1) * dtype.itemsize + 1)
        step = self.look_ups * (self.width * dtype.itemsize + 6 * 8) + self.distinct * self.width * 4 * 6
        return self._gradients() + stored + step

    def fbgemm(self) -> int:
        """Rows and one value of state per row, float32; per look-up its row, its gradient and the sorted numbers."""
        return self.rows * (self.width + 1) * 4 + self.look_ups * (self.width * 4 * 2 + 8 * 8)

    def torch_tables(self, *, sparse: bool) -> int:
        """Rows and two moments of the same size, float32; the gradient as large again where it is dense, with two
        intermediate results; sparse: its rows as they come, made unique, and what SparseAdam makes of them."""
        values = self.rows * self.width
        step = self.look_ups * self.width * 4 * 10
        return values * 4 * (3 if sparse else 6) + step


def has_fbgemm() -> bool:
    """Whether fbgemm is installed."""
    return importlib.util.find_spec("fbgemm_gpu") is not None


def row_ids(rows: Tensor, space: RowSpace) -> Tensor:
    """Row ids [N, T] of the tables' rows [N, T] in our row space."""
    return torch.stack([space.row_ids_of_table(table, own) for table, own in enumerate(rows.unbind(1))], dim=1)


def our_tables(
    rows: Tensor, space: RowSpace, grad: Tensor, dtype: torch.dtype
) -> tuple[Callable[[], object], ShardedTables]:
    """A training step of this project's tables: distinct rows, look-up, backward, row-wise Adagrad.

    dtype: of the stored rows and their optimizer's state, float32 or bfloat16; look-ups and gradients are of grad's.
    """
    device, ids = rows.device, row_ids(rows, space)
    kernels = choose_kernels("auto", device).rows
    store = RowStore(0, space.total_rows, space.width, std=0.0, seed=0, device=device, dtype=dtype, kernels=kernels)
    store.rows.weight[ids.unique()] = 0.02  # so that the pages are in memory, as after some training
    optimizer = RowOptimizer(
        "rowwise_adagrad", store.rows, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, state_dtype=dtype, kernels=kernels
    )
    tables = ShardedTables(
        NgramHash(space=space, base=2, pad_id=0, boundary="ignore", eod_id=0),
        store,
        FlatExchange((0, space.total_rows), None, kernels=kernels),
        optimizer=optimizer, dtype=grad.dtype, device=device, kernels=kernels,
    )  # fmt: skip

    def step() -> None:
        fetched = tables.fetch_row_ids(ids, training=True)
        fetched.gather().backward(grad)
        tables.update_rows(tables.reduce_gradients(fetched, 1.0), 0.01, 1.0)

    return step, tables


def fbgemm_tables(rows: Tensor, size: int, grad: Tensor) -> dict[str, Callable[[], object]]:
    """fbgemm's table-batched embedding with exact row-wise Adagrad, by its name; nothing where it is not installed."""
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except ImportError:
        return {}
    cuda = rows.device.type == "cuda"
    location = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    layer = SplitTableBatchedEmbeddingBagsCodegen(
        [(size, grad.shape[2], *location)] * rows.shape[1],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        eps=1e-8,
        pooling_mode=PoolingMode.SUM,  # of bags of one
    )
    own = rows.t().contiguous().flatten()
    offsets = torch.arange(own.numel() + 1, device=rows.device)
    flat = grad.flatten(1)
    return {"fbgemm": lambda: layer(own, offsets).backward(flat)}


def torch_tables(rows: Tensor, size: int, grad: Tensor, *, sparse: bool) -> Callable[[], object]:
    """nn.Embedding with SparseAdam, or dense with AdamW."""
    count = rows.shape[1]
    layer = torch.nn.Embedding(count * size, grad.shape[2], sparse=sparse, device=rows.device)
    kind: Any = torch.optim.SparseAdam if sparse else torch.optim.AdamW
    optimizer = kind(layer.parameters(), lr=0.01)
    ids = rows + size * torch.arange(count, device=rows.device)

    def step() -> None:
        optimizer.zero_grad()
        layer(ids).backward(grad)
        optimizer.step()

    return step


def limit(tables: ShardedTables, rows: Tensor, space: RowSpace, grad: Tensor) -> Callable[[], object]:
    """The lower bound set by memory traffic: every row read and every look-up written, every gradient read, every row read,
    modified and written in place. No ids are sorted, no gradients are summed, and there is no optimizer state."""
    kernels, stored = tables.kernels, tables.store.rows
    assert isinstance(stored, StoredRows)
    found = kernels.unique(row_ids(rows, space), space.total_rows)
    changes = grad.new_ones(found.ids.numel(), grad.shape[2], dtype=torch.float32)
    step = RowStep(rule="sgd", rate=1e-3, decay=1.0, betas=(0.0, 0.0), eps=0.0, grad_factor=1.0, noise=0)

    def work() -> None:
        kernels.gather(stored, found.ids, found.slots, grad.dtype, found.sorted_lookups)
        grad.sum()
        kernels.update(stored, {}, found.ids, changes, step)

    return work

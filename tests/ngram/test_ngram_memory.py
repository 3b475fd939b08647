"""Contract C3 measured: a step's memory beside the tables follows its look-ups, never the size of the tables."""

import pytest
import torch

from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.ngram.exchange import FlatExchange
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.ngram.row_space import RowSpace
from overtok_megatron.ngram.row_store import RowStore
from overtok_megatron.ngram.sharded_tables import ShardedTables
from overtok_megatron.training.measuring import peak_memory
from support.distributed_harness import run_ranks

CPU = torch.device("cpu")
WIDTH = 64


def peak_of(power: int, most: int) -> tuple[int, int]:
    """(bytes of the tables and their state, peak bytes of steps with so many distinct rows beyond what was there before)."""
    torch.set_num_threads(1)
    space = RowSpace(ngram_order=3, num_slices=2, table_rows=2**power, width=WIDTH)
    kernels = choose_kernels("auto", CPU).rows
    store = RowStore(0, space.total_rows, WIDTH, std=0.02, seed=0, device=CPU, dtype=torch.bfloat16, kernels=kernels)
    optimizer = RowOptimizer(
        "rowwise_adagrad", store.rows, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, state_dtype=torch.float32,
        kernels=kernels,
    )  # fmt: skip
    optimizer.state["square_sum"].fill_(1e-3)  # so that its pages are there, and those of the flags
    store.flags.fill_(1)
    tables = ShardedTables(
        NgramHash(space=space, base=2, pad_id=0, boundary="ignore", eod_id=0),
        store,
        FlatExchange((0, space.total_rows), None, kernels=kernels),
        optimizer=optimizer, dtype=torch.float32, device=CPU, kernels=kernels,
    )  # fmt: skip
    held = sum(column.nbytes for column in tables.columns().values())
    before = 0
    for turn, distinct in enumerate((2**8, most, most)):
        generator = torch.Generator().manual_seed(turn)
        start = int(torch.randint(0, space.total_rows - 40 * distinct, (), generator=generator))
        ids = torch.arange(start, start + 40 * distinct, 40).repeat(2)  # spread; each looked up twice
        fetched = tables.fetch_row_ids(ids, training=True)
        fetched.gather().square().sum().backward()
        tables.update_rows(tables.reduce_gradients(fetched, 1.0), 0.01, 1.0)
        before = before or peak_memory(CPU)  # after a small step: what comes with the first use of anything is there
    return held, peak_memory(CPU) - before


def test_a_steps_memory_follows_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is given back: the peak is what was in use
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # nothing is rounded up to huge pages
    small, large = (run_ranks(1, peak_of, power, 2**15, fresh=True)[0] for power in (19, 21))
    assert large[0] > 3.9 * small[0] > 1e9  # the tables grow by 800 MB
    assert large[1] == pytest.approx(small[1], rel=0.1)
    more = run_ranks(1, peak_of, 19, 2**15 * 3 // 2, fresh=True)[0]
    assert 1.4 < more[1] / small[1] < 1.6  # half as many tokens more

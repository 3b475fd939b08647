"""The Triton kernels on a GPU: the same checks as on Triton's interpreter, and a step of whole tables."""

from collections.abc import Callable

import pytest
import torch
from gpu_checks.row_checks import CHECKS

from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.ngram.exchange import FlatExchange
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.ngram.row_space import RowSpace
from overtok_megatron.ngram.row_store import RowStore
from overtok_megatron.ngram.sharded_tables import ShardedTables

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("check", CHECKS)
def test_the_kernels_do_what_torch_does(check: Callable[[RowKernels, torch.device], None]) -> None:
    kernels = choose_kernels("auto", CUDA).rows
    assert type(kernels) is not RowKernels
    check(kernels, CUDA)


def trained(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The rows [m, w] after some steps on made tokens."""
    space = RowSpace(ngram_order=3, num_slices=2, table_rows=5003, width=32)
    kernels = choose_kernels("auto", device).rows
    store = RowStore(0, space.total_rows, 32, std=0.02, seed=1, device=device, dtype=dtype, kernels=kernels)
    optimizer = RowOptimizer(
        "rowwise_adagrad",
        store.rows,
        weight_decay=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
        state_dtype=dtype,
        kernels=kernels,
    )
    tables = ShardedTables(
        NgramHash(space=space, base=97, pad_id=0, boundary="reset", eod_id=3, kernels=kernels),
        store,
        FlatExchange((0, space.total_rows), None, kernels=kernels),
        optimizer=optimizer, dtype=torch.float32, device=device, kernels=kernels,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        fetched = tables.fetch_rows(torch.randint(0, 97, (1, 4, 128), generator=generator).to(device), training=True)
        fetched.gather().sin().sum().backward()
        tables.update_rows(tables.reduce_gradients(fetched, 1.0), 0.01, 1.0)
    return store.rows.weight.cpu()


def test_steps_of_tables_equal_those_on_cpu() -> None:
    torch.testing.assert_close(
        trained(CUDA, torch.float32), trained(torch.device("cpu"), torch.float32), rtol=1e-4, atol=1e-6
    )


def test_the_same_run_gives_the_same_bits() -> None:
    assert torch.equal(trained(CUDA, torch.bfloat16), trained(CUDA, torch.bfloat16))

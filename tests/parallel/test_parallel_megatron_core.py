"""Split layers and cross entropy against megatron-core's own, on the same weights, over gloo on two ranks.

Its tensors are [s, b, h], ours [b, s, h]. float32: a column-parallel product and an embedding are the same operations, so
forward is exact there; sums over ranks and the order of additions in a backward product differ by rounding.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_harness import run_ranks
from torch import Tensor

from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.parallel.collectives import copy_to_group
from overtok_megatron.parallel.cross_entropy import IGNORED, linear_cross_entropy
from overtok_megatron.parallel.linear import ColumnParallelLinears, RowParallelLinear
from overtok_megatron.parallel.sharding import split_range
from overtok_megatron.parallel.vocabulary import VocabParallelEmbedding

pytest.importorskip("megatron.core", reason="the oracle, in the test extra")

BATCH, SEQ, WIDTH, INNER, VOCAB = 3, 8, 16, 24, 40


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _turn(x: Tensor) -> Tensor:
    """[b, s, h] to [s, b, h] and back."""
    return x.transpose(0, 1).contiguous()


def _own(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    start, stop = split_range(x.shape[dim], dist.get_world_size(group), dist.get_rank(group))
    return x.narrow(dim, start, stop - start).clone()


def _compare(ours: Tensor | None, theirs: Tensor | None, what: str, exact: bool = False) -> None:
    assert ours is not None, what
    assert theirs is not None, what
    if exact:
        assert torch.equal(ours, theirs), what
    else:
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, msg=lambda text: f"{what}: {text}")


def _megatron(sequence_parallel: bool) -> dict[str, Any]:
    from megatron.core.model_parallel_config import ModelParallelConfig

    config = ModelParallelConfig(
        tensor_model_parallel_size=dist.get_world_size(),
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    return {"config": config, "init_method": torch.nn.init.zeros_}


def _linears(group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    """Column-parallel into row-parallel, the two halves of every block."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.tensor_parallel.layers import RowParallelLinear as TheirRow

    column = ColumnParallelLinears(WIDTH, {"up": INNER}, group=group, sequence_parallel=sequence_parallel)
    row = RowParallelLinear(INNER, WIDTH, group=group, sequence_parallel=sequence_parallel)
    column.reset(seed=1, name="column", std=0.3)
    row.reset(seed=1, name="row", std=0.3)
    settings = _megatron(sequence_parallel)
    their_column = ColumnParallelLinear(WIDTH, INNER, bias=False, gather_output=False, **settings)
    their_row = TheirRow(INNER, WIDTH, bias=False, input_is_parallel=True, skip_bias_add=False, **settings)
    their_column.weight.data.copy_(column.up)
    their_row.weight.data.copy_(row.weight)
    x, upstream = _random(BATCH, SEQ, WIDTH, seed=2), _random(BATCH, SEQ, WIDTH, seed=3)
    if sequence_parallel:
        x, upstream = _own(x, group, 1), _own(upstream, group, 1)
    ours, theirs = x.clone().requires_grad_(), _turn(x).requires_grad_()
    middle = column(ours)
    their_middle, _ = their_column(theirs)
    _compare(middle, _turn(their_middle), "column, forward", exact=True)
    out = row(middle)
    their_out, _ = their_row(their_middle)
    _compare(out, _turn(their_out), "row, forward")
    out.backward(upstream)
    their_out.backward(_turn(upstream))
    _compare(ours.grad, _turn(theirs.grad), "input")  # type: ignore[arg-type]  # None fails in _compare's words
    _compare(column.up.grad, their_column.weight.grad, "column, weight")
    _compare(row.weight.grad, their_row.weight.grad, "row, weight")


def _embedding(group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding as Theirs

    ours = VocabParallelEmbedding(VOCAB, WIDTH, group=group, sequence_parallel=sequence_parallel)
    ours.reset(seed=1, name="word", std=0.3)
    theirs = Theirs(VOCAB, WIDTH, reduce_scatter_embeddings=sequence_parallel, **_megatron(sequence_parallel))
    theirs.weight.data.copy_(ours.weight)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(4))
    upstream = _random(BATCH, SEQ, WIDTH, seed=5)
    if sequence_parallel:
        upstream = _own(upstream, group, 1)
    out, their_out = ours(tokens), theirs(tokens)  # theirs turns its output only where it scatters it
    turn = _turn if sequence_parallel else torch.clone
    _compare(out, turn(their_out), "embedding, forward", exact=True)
    out.backward(upstream)
    their_out.backward(turn(upstream))
    _compare(ours.weight.grad, theirs.weight.grad, "embedding, weight")


def _cross_entropy(group: dist.ProcessGroup, kernels: str) -> None:
    """The fused head against a product and megatron-core's vocabulary-parallel cross entropy of its logits."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    weight = _own(_random(VOCAB, WIDTH, seed=6), group, 0)
    hidden = _random(BATCH * SEQ, WIDTH, seed=7)
    targets = torch.randint(0, VOCAB, (BATCH * SEQ,), generator=torch.Generator().manual_seed(8))
    skipped = torch.arange(BATCH * SEQ) % 5 == 0
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    start, _ = split_range(VOCAB, dist.get_world_size(group), dist.get_rank(group))
    objective, summed = linear_cross_entropy(
        copy_to_group(ours[0], group),
        ours[1],
        targets.masked_fill(skipped, IGNORED),
        vocab_start=start,
        group=group,
        z_loss=0.0,
        kernels=choose_kernels(kernels, torch.device("cpu")),
    )
    logits = F.linear(copy_to_tensor_model_parallel_region(theirs[0]), theirs[1])
    losses = vocab_parallel_cross_entropy(logits, targets)
    total = losses.masked_fill(skipped, 0.0).sum()
    _compare(summed, total.detach(), "cross entropy")
    _compare(objective.detach(), total.detach(), "objective")
    objective.backward()
    total.backward()
    _compare(ours[0].grad, theirs[0].grad, "hidden")
    _compare(ours[1].grad, theirs[1].grad, "head, weight")


def compare_with_megatron_core() -> int:
    """One rank's work; how many comparisons of pieces were made."""
    from megatron.core import parallel_state

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]  # where its buffers go
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    group = parallel_state.get_tensor_model_parallel_group()
    for sequence_parallel in (False, True):
        _linears(group, sequence_parallel)
        _embedding(group, sequence_parallel)
    for kernels in ("torch", "auto"):
        _cross_entropy(group, kernels)
    dist.destroy_process_group()
    return 6


def test_layers_agree_with_megatron_core() -> None:
    assert run_ranks(2, compare_with_megatron_core) == [6, 6]

"""Every split layer against the unsharded one: outputs and all gradients, from the same seed, on 2 and 3 ranks.

float64, so that only a wrong term can exceed the tolerance: sums that cross ranks differ in order, by about 1e-15.
"""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from overtok_megatron.parallel.collectives import group_rank, group_size
from overtok_megatron.parallel.linear import MergedColumnParallelLinear, RowParallelLinear
from overtok_megatron.parallel.splits import (
    ParameterSplit,
    full_shape,
    initialise,
    largest_part,
    own_part,
    split_range,
    splits_of,
)
from overtok_megatron.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead
from support.distributed_harness import run_ranks

BATCH, SEQ, WIDTH = 2, 6, 5  # SEQ goes over 2 and 3 ranks
OUTPUTS = {"q": 7, "k": 4, "v": 10}  # neither 2 nor 3 divides all of them
INPUTS = 11
VOCABULARIES = (101, 6, 2, 1)  # the last two leave ranks without a row


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _own(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    start, stop = split_range(x.shape[dim], group_size(group), group_rank(group))
    return x.narrow(dim, start, stop - start)


def _close(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    assert actual is not None, what
    assert expected is not None, what
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda text: f"{what}: {text}")


def _ready(layer: Any) -> Any:
    layer.reset(seed=5, name="layer", std=0.5)
    return layer.double()  # keeps the parameters and their metadata


def _weights_agree(split: nn.Module, whole: nn.Module, group: dist.ProcessGroup, what: str) -> None:
    """Initial weights bit for bit, and gradients, are the slices that the metadata names."""
    reference = dict(whole.named_parameters())
    for name, weight in split.named_parameters():
        splits, full = splits_of(weight), reference[name]
        assert splits, f"{what} {name}"
        assert full_shape(weight) == tuple(full.shape)
        assert weight.tensor_model_parallel  # type: ignore[attr-defined]  # the mark that DeepSpeed looks for
        assert splits_of(full) == ()
        assert not hasattr(full, "tensor_model_parallel")
        assert torch.equal(weight, own_part(full, splits)), f"{what} {name}"
        assert full.grad is not None
        _close(weight.grad, own_part(full.grad, splits), f"{what} grad of {name}")


def _check_column(group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    what = f"column, sequence parallel {sequence_parallel}"
    split = _ready(MergedColumnParallelLinear(WIDTH, OUTPUTS, group=group, sequence_parallel=sequence_parallel))
    whole = _ready(MergedColumnParallelLinear(WIDTH, OUTPUTS))
    full_input = _random(BATCH, SEQ, WIDTH).requires_grad_()
    upstream = [_random(BATCH, SEQ, size, seed=i) for i, size in enumerate(OUTPUTS.values(), start=1)]
    expected = whole(full_input).split(whole.sizes, dim=-1)
    torch.autograd.backward(expected, upstream)
    mine = (_own(full_input, group, 1) if sequence_parallel else full_input).detach().clone().requires_grad_()
    found = split(mine).split(split.sizes, dim=-1)
    torch.autograd.backward(found, [_own(grad, group, 2) for grad in upstream])
    for i, name in enumerate(OUTPUTS):
        _close(found[i], _own(expected[i], group, 2), f"{what} output {name}")
    assert full_input.grad is not None
    grad = _own(full_input.grad, group, 1) if sequence_parallel else full_input.grad
    _close(mine.grad, grad, f"{what} grad of input")
    _weights_agree(split, whole, group, what)


def _check_row(group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    what = f"row, sequence parallel {sequence_parallel}"
    split = _ready(RowParallelLinear(INPUTS, WIDTH, group=group, sequence_parallel=sequence_parallel))
    whole = _ready(RowParallelLinear(INPUTS, WIDTH))
    full_input = _random(BATCH, SEQ, INPUTS).requires_grad_()
    upstream = _random(BATCH, SEQ, WIDTH, seed=1)
    expected = whole(full_input)
    expected.backward(upstream)
    mine = _own(full_input, group, 2).detach().clone().requires_grad_()
    found = split(mine)
    found.backward(_own(upstream, group, 1) if sequence_parallel else upstream)
    _close(found, _own(expected, group, 1) if sequence_parallel else expected, f"{what} output")
    assert full_input.grad is not None
    _close(mine.grad, _own(full_input.grad, group, 2), f"{what} grad of input")
    _weights_agree(split, whole, group, what)


def _check_embedding(group: dist.ProcessGroup, sequence_parallel: bool, vocab: int) -> None:
    what = f"embedding of {vocab}, sequence parallel {sequence_parallel}"
    split = _ready(VocabParallelEmbedding(vocab, WIDTH, group=group, sequence_parallel=sequence_parallel))
    whole = _ready(VocabParallelEmbedding(vocab, WIDTH))
    tokens = torch.randint(0, vocab, (BATCH, SEQ), generator=torch.Generator().manual_seed(3))
    tokens[0, 0], tokens[1, -1] = 0, vocab - 1  # the two ends of the vocabulary
    upstream = _random(BATCH, SEQ, WIDTH, seed=1)
    expected = whole(tokens)
    expected.backward(upstream)
    found = split(tokens)
    found.backward(_own(upstream, group, 1) if sequence_parallel else upstream)
    # exact: all but one rank add a zero
    assert torch.equal(found, _own(expected, group, 1) if sequence_parallel else expected), what
    _weights_agree(split, whole, group, what)


def _check_head(group: dist.ProcessGroup, vocab: int) -> None:
    split = _ready(VocabParallelHead(vocab, WIDTH, group=group))
    whole = _ready(VocabParallelHead(vocab, WIDTH))
    hidden = _random(BATCH, SEQ, WIDTH)
    logits = split.gather(hidden @ split.weight.t())
    assert logits.shape == (BATCH, SEQ, vocab), "no padding may reach the logits"
    _close(logits, hidden @ whole.weight.t(), f"gathered logits of {vocab}")
    embedding = _ready(VocabParallelEmbedding(vocab, WIDTH, group=group))
    tied = VocabParallelHead(vocab, WIDTH, group=group, tied=embedding)
    assert tied.weight is embedding.weight
    assert (tied.vocab_start, tied.vocab_stop) == (embedding.start, embedding.stop)


def _check_layers() -> int:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    for sequence_parallel in (False, True):
        _check_column(group, sequence_parallel)
        _check_row(group, sequence_parallel)
        for vocab in VOCABULARIES:
            _check_embedding(group, sequence_parallel, vocab)
    for vocab in VOCABULARIES:
        _check_head(group, vocab)
    shown = repr(MergedColumnParallelLinear(WIDTH, OUTPUTS, group=group))
    assert f"rank {group_rank(group)} of {group_size(group)}" in shown
    assert str(OUTPUTS) in shown
    dist.destroy_process_group()
    return group_size(None)


@pytest.mark.parametrize("world", [2, 3])
def test_split_layers_equal_the_whole(world: int) -> None:
    assert run_ranks(world, _check_layers) == [1] * world


@given(size=st.integers(0, 500), parts=st.integers(1, 20))
def test_ranges_join_without_gap_and_differ_by_one(size: int, parts: int) -> None:
    ranges = [split_range(size, parts, index) for index in range(parts)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == size
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    widths = {stop - start for start, stop in ranges}
    assert max(widths) - min(widths) <= 1
    # what one rank knows of the others without asking
    assert {largest_part(*ranges[index], index) for index in range(parts)} == {max(widths)}


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def test_initial_weights_move_no_global_stream() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    initialise(_weight(7, 3), 0.02, 1234, "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    def drawn(seed: int, name: str) -> Tensor:
        torch.manual_seed(hash(name))  # must not matter
        weight = _weight(40, 30)
        initialise(weight, 0.5, seed, name)
        return weight.detach()

    first = drawn(1, "a")
    assert torch.equal(first, drawn(1, "a"))
    assert not torch.equal(first, drawn(2, "a"))
    assert not torch.equal(first, drawn(1, "b"))
    assert abs(first.std().item() - 0.5) < 0.05


def test_a_slice_is_cut_from_the_full_draw() -> None:
    whole, part = _weight(10, 4), _weight(10, 1)
    initialise(whole, 0.02, 9, "w")
    part.splits = (ParameterSplit(1, 4, 2, 3),)  # type: ignore[attr-defined]  # what mark_split records
    initialise(part, 0.02, 9, "w")
    assert torch.equal(part, whole[:, 2:3])


def test_a_slice_along_two_dimensions() -> None:
    whole, part = _weight(10, 4), _weight(3, 1)
    initialise(whole, 0.02, 9, "w")
    part.splits = (ParameterSplit(0, 10, 4, 7), ParameterSplit(1, 4, 2, 3))  # type: ignore[attr-defined]
    initialise(part, 0.02, 9, "w")
    assert torch.equal(part, whole[4:7, 2:3])


def test_a_weight_in_bfloat16_is_the_rounded_float32_draw() -> None:
    exact, rounded = _weight(6, 6), nn.Parameter(torch.empty(6, 6, dtype=torch.bfloat16))
    initialise(exact, 0.02, 9, "w")
    initialise(rounded, 0.02, 9, "w")
    assert torch.equal(rounded, exact.bfloat16())

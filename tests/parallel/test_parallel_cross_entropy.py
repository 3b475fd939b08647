"""The fused projection and cross entropy against float64 torch, whole and over split vocabularies, loss and gradients.

Errors are relative, gradients by norm. float32: 1e-6. bfloat16: the logits are rounded (2^-9 relative), and so are the
gradient of the logits and the results, which gives about 2e-3 for each; 1e-2 is allowed.
"""

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from overtok_megatron.kernels.choice import Kernels, choose_kernels
from overtok_megatron.parallel import cross_entropy as module
from overtok_megatron.parallel.collectives import copy_to_group, group_rank, group_size
from overtok_megatron.parallel.cross_entropy import ChunkBound, chunk_bound
from overtok_megatron.parallel.splits import split_range
from support.distributed_harness import run_ranks

WIDTH = 16
linear_cross_entropy = functools.partial(module.linear_cross_entropy, kernels=Kernels())
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    tokens: int = 53
    vocab: int = 101
    dtype: torch.dtype = torch.float32
    z_loss: float = 0.0
    ignored: float = 0.2  # share of targets that are not scored
    chunk: int = 7  # tokens: several chunks, the last one short
    multiple: int = 1  # of which the columns of a chunk are one
    upstream: float = 0.37


CASES = [
    Case(),
    Case(z_loss=0.01),
    Case(chunk=1000),
    Case(tokens=14, ignored=0.0),
    Case(ignored=1.0, z_loss=0.1),
    Case(tokens=1, chunk=1, ignored=0.0),
    Case(vocab=2, z_loss=0.01),
    Case(vocab=1, z_loss=0.01),
    Case(dtype=torch.bfloat16),
    Case(dtype=torch.bfloat16, z_loss=0.01),
    Case(dtype=torch.bfloat16, vocab=2),
    Case(multiple=8, z_loss=0.01),
    Case(multiple=8, vocab=2),
    Case(multiple=8, dtype=torch.bfloat16),
]


def small_chunks(tokens: int, multiple: int = 1) -> ChunkBound:
    return ChunkBound(values=1 << 30, tokens=tokens, even=False, multiple=multiple)


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(case.tokens, WIDTH, generator=generator).to(case.dtype)
    weight = (0.5 * torch.randn(case.vocab, WIDTH, generator=generator)).to(case.dtype)
    targets = torch.randint(0, case.vocab, (case.tokens,), generator=generator)
    targets[torch.rand(case.tokens, generator=generator) < case.ignored] = -100
    return hidden, weight, targets


def _expected(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Objective, cross entropy, and the objective's gradients, in float64 from torch's own functions."""
    hidden, weight, targets = _inputs(case)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = F.linear(hidden, weight)
    cross_entropy = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    objective = cross_entropy + case.z_loss * (logits.logsumexp(1).square() * (targets != -100)).sum()
    (objective * case.upstream).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return objective.detach(), cross_entropy.detach(), hidden.grad, weight.grad


def _error(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    assert found.shape == expected.shape
    scale = expected.norm().clamp(min=1e-3)  # where nothing is scored, all is zero
    return ((found.double() - expected).norm() / scale).item()


def _check(case: Case, group: dist.ProcessGroup | None) -> None:
    start, stop = split_range(case.vocab, group_size(group), group_rank(group))
    hidden, weight, targets = _inputs(case)
    hidden.requires_grad_()
    part = weight[start:stop].clone().requires_grad_()
    objective, cross_entropy = linear_cross_entropy(
        copy_to_group(hidden, group),
        part,
        targets,
        vocab_start=start,
        group=group,
        z_loss_weight=case.z_loss,
        bound=small_chunks(case.chunk, case.multiple),
    )
    assert objective.dtype == cross_entropy.dtype == torch.float32
    assert not cross_entropy.requires_grad
    (objective * case.upstream).backward()
    expected = _expected(case)
    results = (objective.detach(), cross_entropy, hidden.grad, part.grad)
    wanted = (*expected[:3], expected[3][start:stop])
    for what, found, right in zip(("objective", "loss", "grad hidden", "grad weight"), results, wanted, strict=True):
        error = _error(found, right)
        assert error < TOLERANCE[case.dtype], f"{what} off by {error:.1e} in {case}, rank {group_rank(group)}"
    if case.ignored == 1.0:
        assert hidden.grad is not None
        assert not hidden.grad.any()
        assert objective.item() == 0.0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_vocabulary(case: Case) -> None:
    _check(case, None)


def _check_split(cases: list[Case]) -> list[float]:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    for case in cases:
        _check(case, group)
    losses = []
    for case in cases:  # every rank must print the same loss, to the last bit
        hidden, weight, targets = _inputs(case)
        start, stop = split_range(case.vocab, group_size(group), group_rank(group))
        with torch.no_grad():
            losses.append(
                linear_cross_entropy(hidden, weight[start:stop], targets, vocab_start=start, group=group)[1].item()
            )
    dist.destroy_process_group()
    return losses


@pytest.mark.parametrize("world", [2, 3])
def test_split_vocabulary(world: int) -> None:
    losses = run_ranks(world, _check_split, CASES)
    assert all(each == losses[0] for each in losses)


def _check_default_chunks(vocab: int, tokens: int) -> float:
    """Chunk sizes as shipped: shards of unequal width must still make the same number of collective calls."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    hidden, weight, targets = _inputs(Case(vocab=vocab, tokens=tokens))
    start, stop = split_range(vocab, group_size(group), group_rank(group))
    bound = ChunkBound(values=64, tokens=64, even=False, multiple=1)
    part = weight[start:stop]
    loss = linear_cross_entropy(hidden, part, targets, vocab_start=start, group=group, bound=bound)[1].item()
    dist.destroy_process_group()
    return loss


def test_unequal_shards_cut_their_tokens_alike() -> None:
    case = Case(vocab=32 + 33, tokens=53)  # 64 values: 1 token a chunk for 33 rows, 2 for 32
    wanted = _expected(case)[1].item()
    for loss in run_ranks(2, _check_default_chunks, case.vocab, case.tokens, timeout=60):
        assert abs(loss - wanted) < 1e-5 * wanted


def _check_large(names: tuple[str, ...]) -> list[float]:
    """Vocabularies of the size of real ones against float64; the losses, of which all ranks must have the same bits."""
    group = None
    if names[0] == "split":
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    losses = []
    for vocab, z_loss, dtype in itertools.product((8_193, 100_278), (0.0, 1e-3), (torch.float32, torch.bfloat16)):
        case = Case(tokens=97, vocab=vocab, z_loss=z_loss, dtype=dtype)
        expected = _expected(case)
        start, stop = split_range(vocab, group_size(group), group_rank(group))
        for kernels in map(choose_kernels, names[1:], itertools.repeat(torch.device("cpu"))):
            hidden, weight, targets = _inputs(case)
            part = weight[start:stop].clone().requires_grad_()
            hidden.requires_grad_()
            given = {"vocab_start": start, "group": group, "z_loss_weight": z_loss, "kernels": kernels}
            # With fewer rows the float32 product of a chunk, torch's own, is off by more than the limit on some threads.
            given["bound"] = small_chunks(33, 8)
            objective, cross_entropy = module.linear_cross_entropy(copy_to_group(hidden, group), part, targets, **given)
            (objective * case.upstream).backward()
            with torch.no_grad():
                unrecorded = module.linear_cross_entropy(hidden, part, targets, **given)
            for found, without, right in zip((objective, cross_entropy), unrecorded, expected[:2], strict=True):
                assert abs(found.item() - right.item()) < (1e-6 if dtype == torch.float32 else 1e-3) * right.item()
                assert abs(without.item() - found.item()) <= 1e-6 * found.item()
            for found, right in ((hidden.grad, expected[2]), (part.grad, expected[3][start:stop])):
                assert found is not None
                limit = 1e-5 if dtype == torch.float32 else 1e-2
                assert (found.double() - right).abs().max() < limit * right.abs().max(), (case, kernels.name)
            losses += [objective.item(), cross_entropy.item()]
    if group is not None:
        dist.destroy_process_group()
    return losses


def test_large_vocabularies() -> None:
    _check_large(("whole", "torch", "auto"))


@pytest.mark.parametrize("world", [2, 3])
def test_large_vocabularies_over_ranks(world: int) -> None:
    losses = run_ranks(world, _check_large, ("split", "torch", "auto"))
    assert all(each == losses[0] for each in losses)


def _check_target_outside(vocab: int) -> None:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    start, stop = split_range(vocab, group_size(group), group_rank(group))
    for outside, multiple in itertools.product((vocab, vocab + 1, -1), (1, 8)):  # also where a rank's padding is
        hidden, weight, targets = _inputs(Case(vocab=vocab))
        targets[3] = outside
        given = {"vocab_start": start, "group": group, "bound": small_chunks(7, multiple)}
        objective, cross_entropy = linear_cross_entropy(hidden, weight[start:stop].requires_grad_(), targets, **given)
        assert objective.isnan(), (outside, multiple)
        assert cross_entropy.isnan(), (outside, multiple)
    dist.destroy_process_group()


def test_a_target_that_no_rank_holds_shows_as_nan() -> None:
    run_ranks(2, _check_target_outside, 9)


def test_chunks_of_a_cpu_fit_in_its_cache() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        bound = chunk_bound("cpu", dtype)
        assert bound.columns(100_278) == 100_278
        assert [bound.chunk_tokens(10**6, shard) for shard in (100_278, 8192, 1, 0)] == [41, 512, 2**22, 2**22]
        assert bound.chunk_tokens(10, 2**23) == 1


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_chunks_of_a_gpu_have_thousands_of_tokens_and_at_most_a_gibibyte(dtype: torch.dtype, size: int) -> None:
    bound = chunk_bound("cuda", dtype)
    for shard, tokens in itertools.product(
        (0, 1, 7, 8193, 16_000, 32_000, 100_278, 262_144), (1, 9, 4096, 8192, 8193, 65_537)
    ):
        step, columns = bound.chunk_tokens(tokens, shard), bound.columns(shard)
        assert shard <= columns < shard + 16 // size
        assert columns * size % 16 == 0
        assert 1 <= step <= min(8192, tokens)
        assert step * columns * size <= 2**30
        chunks = -(-tokens // step)
        assert chunks == 1 or (step + 1) * chunks > tokens >= step * (chunks - 1), "the chunks are not about equal"
        assert (chunks - 1) * min(8192, 2**30 // max(1, columns * size)) < tokens, (
            "there are more chunks than are needed"
        )
    assert chunk_bound("cuda", torch.bfloat16).chunk_tokens(8192, 100_278) == 4096
    assert chunk_bound("cuda", torch.bfloat16).chunk_tokens(8192, 32_000) == 8192


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_product_does_not_read_what_it_is_written_over(dtype: torch.dtype) -> None:
    left, right = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype)
    total = torch.full((5, 3), torch.nan)
    module._add_product(total, left, right, first=True)
    module._add_product(total, left, right, first=False)
    torch.testing.assert_close(total, 2 * (left @ right).float())


def test_a_second_backward_pass_is_refused() -> None:
    """The first one overwrote what it had saved."""
    hidden, weight, targets = _inputs(Case())
    objective, _ = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        objective.backward()


def test_no_gradient_work_where_none_is_wanted() -> None:
    hidden, weight, targets = _inputs(Case())
    weight.requires_grad_()
    with torch.no_grad():
        objective, _ = linear_cross_entropy(hidden, weight, targets)
    assert not objective.requires_grad
    assert not linear_cross_entropy(hidden, weight.detach(), targets)[0].requires_grad


def test_a_target_outside_of_the_vocabulary_shows_as_nan() -> None:
    hidden, weight, targets = _inputs(Case(vocab=9))
    targets[3] = 9
    objective, cross_entropy = linear_cross_entropy(hidden, weight, targets)
    assert objective.isnan()
    assert cross_entropy.isnan()


def test_no_tokens_give_zero() -> None:
    hidden = torch.empty(0, WIDTH, requires_grad=True)
    objective, cross_entropy = linear_cross_entropy(hidden, torch.randn(5, WIDTH), torch.empty(0, dtype=torch.int64))
    objective.backward()
    assert (objective.item(), cross_entropy.item()) == (0.0, 0.0)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.full((3, WIDTH), 50.0, requires_grad=True)
    weight = torch.cat([torch.ones(1, WIDTH), -torch.ones(1, WIDTH), torch.zeros(2, WIDTH)])
    objective, _ = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]))
    objective.backward()
    assert objective.item() == pytest.approx(1600.0 + 800.0)
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()

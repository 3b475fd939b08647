"""The fused projection and cross entropy against float64 torch, whole and over split vocabularies, loss and gradients.

Errors are relative, gradients by norm. float32: 1e-6. bfloat16: the logits are rounded (2^-9 relative), and so are the
gradient of the logits and the results, which gives about 2e-3 for each; 1e-2 is allowed.
"""

import functools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.parallel import cross_entropy as module
from overtok_megatron.parallel.collectives import copy_to_group, group_rank, group_size
from overtok_megatron.parallel.cross_entropy import ChunkBound
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
        bound=small_chunks(case.chunk),
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

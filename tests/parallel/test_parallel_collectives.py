"""Every collective against its algebra, forward and backward, on real ranks. Small integers: exact in every dtype."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import overtok_megatron
from overtok_megatron.parallel.collectives import (
    all_gather_sequence,
    copy_to_group,
    gather_from_group,
    group_rank,
    group_size,
    reduce_from_group,
    reduce_scatter_sequence,
)
from support.distributed_harness import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
WHOLE = (2, 6, 3)  # dim 1 goes over 2 and 3 ranks


def _values(seed: int, world: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """What each rank holds, known to all of them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-8, 9, shape, generator=generator).to(dtype) for _ in range(world)]


def _part(x: Tensor, world: int, rank: int, dim: int) -> Tensor:
    size = x.shape[dim] // world
    return x.narrow(dim, rank * size, size)


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


Law = tuple[Callable[..., Tensor], bool, bool, Callable[..., Tensor], Callable[..., Tensor]]
# name -> function, is the input a slice, is the output a slice, expected output, expected gradient of the input
LAWS: dict[str, Law] = {
    "copy": (
        lambda x, group, dim: copy_to_group(x, group), False, False,
        lambda xs, rank, dim: xs[rank],
        lambda gs, rank, dim: _total(gs),
    ),
    "reduce": (
        lambda x, group, dim: reduce_from_group(x, group), False, False,
        lambda xs, rank, dim: _total(xs),
        lambda gs, rank, dim: gs[rank],
    ),
    "gather": (
        gather_from_group, True, False,
        lambda xs, rank, dim: torch.cat(xs, dim),
        lambda gs, rank, dim: _part(gs[rank], len(gs), rank, dim),
    ),
    "all_gather_sequence": (
        all_gather_sequence, True, False,
        lambda xs, rank, dim: torch.cat(xs, dim),
        lambda gs, rank, dim: _part(_total(gs), len(gs), rank, dim),
    ),
    "reduce_scatter_sequence": (
        reduce_scatter_sequence, False, True,
        lambda xs, rank, dim: _part(_total(xs), len(xs), rank, dim),
        lambda gs, rank, dim: torch.cat(gs, dim),
    ),
}  # fmt: skip


def _refusal() -> str:
    with pytest.raises(AssertionError) as caught:
        reduce_scatter_sequence(torch.zeros(2, 5), dist.group.WORLD, 1)
    return str(caught.value)


def _check_laws(dtypes: tuple[torch.dtype, ...]) -> tuple[list[str], str]:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    rank, world = group_rank(group), group_size(group)
    checked = []
    for name, (function, from_slice, to_slice, forward, backward) in LAWS.items():
        for dtype in dtypes:
            for dim, transposed in ((1, False), (1, True), (-2, False)):
                sliced = (WHOLE[0], WHOLE[1] // world, WHOLE[2])
                xs = _values(1, world, sliced if from_slice else WHOLE, dtype)
                gs = _values(2, world, sliced if to_slice else WHOLE, dtype)
                own = xs[rank].clone()
                if transposed:  # the same values, not contiguous
                    own = own.transpose(0, 2).contiguous().transpose(0, 2)
                leaf = own.requires_grad_()
                upstream = gs[rank].clone()
                result = function(leaf, group, dim)
                result.backward(upstream)
                where = f"{name} {dtype} dim {dim} transposed {transposed} rank {rank} of {world}"
                torch.testing.assert_close(result, forward(xs, rank, dim), rtol=0, atol=0, msg=f"forward of {where}")
                assert leaf.grad is not None
                torch.testing.assert_close(
                    leaf.grad, backward(gs, rank, dim), rtol=0, atol=0, msg=f"backward of {where}"
                )
                # out of place: neither the input nor the gradient that arrived has been written to
                assert torch.equal(leaf, xs[rank]), where
                assert torch.equal(upstream, gs[rank]), where
                checked.append(name)
    refusal = _refusal()
    dist.destroy_process_group()
    return checked, refusal


@pytest.mark.parametrize("world", [2, 3])
def test_forward_and_backward_follow_the_table_and_unequal_slices_are_refused(world: int) -> None:
    for checked, refusal in run_ranks(world, _check_laws, DTYPES):
        assert len(checked) == len(LAWS) * len(DTYPES) * 3
        assert refusal == f"dimension 1 of (2, 5) does not divide over {world} ranks"


@pytest.mark.parametrize("name", LAWS)
def test_without_a_group_nothing_happens(name: str) -> None:
    x: Any = torch.randn(2, 6, 3, requires_grad=True)
    assert LAWS[name][0](x, None, 1) is x


def test_group_of_none_is_one_rank() -> None:
    assert (group_rank(None), group_size(None)) == (0, 1)


COMMUNICATING = re.compile(
    "all_reduce|all_gather|all_to_all|reduce_scatter|broadcast|barrier|send|recv|gather|scatter|reduce"
)


def _communicates(node: ast.AST) -> bool:
    """Whether this is a call of one of torch.distributed's collectives."""
    function = node.func if isinstance(node, ast.Call) else None
    of_dist = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "dist"
    return of_dist and COMMUNICATING.match(function.attr) is not None  # type: ignore[union-attr]


def test_every_collective_runs_in_a_span() -> None:
    """But those of `overtok doctor`, which measures collectives outside of any run."""
    found, without = 0, []
    for path in Path(overtok_megatron.__file__).parent.rglob("*.py"):
        if path.parent.name == "doctor":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        spans = [
            node for node in ast.walk(tree)
            if isinstance(node, ast.With) and ast.unparse(node.items[0].context_expr).startswith("profiler_span(")
        ]  # fmt: skip
        inside = {id(node) for span in spans for node in ast.walk(span)}
        calls = [node for node in ast.walk(tree) if _communicates(node)]
        found += len(calls)
        without += [f"{path.name}:{node.lineno}" for node in calls if id(node) not in inside]  # type: ignore[attr-defined]
    assert found > 5
    assert not without

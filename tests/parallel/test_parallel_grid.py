"""Rank arithmetic without processes, then the groups made from it and DeepSpeed's view of them on four real ranks."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from overtok_megatron.parallel.grid import AXES, GridShape, ProcessGrid
from overtok_megatron.training.deepspeed.topology import DeepSpeedTopology
from support.distributed_harness import run_ranks

sizes = st.integers(1, 4)


def test_tensor_is_innermost_and_pipe_outermost() -> None:
    shape = GridShape(pipe=2, data=3, tensor=4)
    assert shape.world_size == 24
    assert shape.coordinates(0) == {"pipe": 0, "data": 0, "context": 0, "tensor": 0}
    assert shape.coordinates(1) == {"pipe": 0, "data": 0, "context": 0, "tensor": 1}
    assert shape.coordinates(4) == {"pipe": 0, "data": 1, "context": 0, "tensor": 0}
    assert shape.coordinates(12) == {"pipe": 1, "data": 0, "context": 0, "tensor": 0}
    assert shape.ranks_along(6, "tensor") == [4, 5, 6, 7]
    assert shape.ranks_along(6, "data") == [2, 6, 10]
    assert shape.ranks_along(6, "pipe") == [6, 18]
    assert shape.ranks_along(6, "pipe", "data") == [2, 6, 10, 14, 18, 22]


def test_context_lies_between_data_and_tensor() -> None:
    shape = GridShape(data=2, context=3, tensor=2)
    assert shape.coordinates(9) == {"pipe": 0, "data": 1, "context": 1, "tensor": 1}
    assert shape.ranks_along(9, "context") == [7, 9, 11]
    assert shape.ranks_along(9, "data", "context") == [1, 3, 5, 7, 9, 11]


def test_the_ends_of_a_pipeline() -> None:
    shape = GridShape(pipe=4, data=2)
    assert shape.pipe_ends(shape.ranks_along(3, "pipe")) == [1, 7]
    assert GridShape(data=2).pipe_ends([0]) == [0]


@given(pipe=sizes, data=sizes, context=sizes, tensor=sizes)
def test_coordinates_are_inverted_by_rank_at(pipe: int, data: int, context: int, tensor: int) -> None:
    shape = GridShape(pipe=pipe, data=data, context=context, tensor=tensor)
    assert [shape.rank_at(shape.coordinates(rank)) for rank in range(shape.world_size)] == list(range(shape.world_size))


@given(pipe=sizes, data=sizes, context=sizes, tensor=sizes, axes=st.sets(st.sampled_from(AXES), min_size=1))
def test_groups_part_the_world(pipe: int, data: int, context: int, tensor: int, axes: Any) -> None:
    shape = GridShape(pipe=pipe, data=data, context=context, tensor=tensor)
    groups = shape.all_groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(shape.world_size))
    assert {len(group) for group in groups} == {math.prod(shape.size(axis) for axis in axes)}
    for group in groups:
        assert group == sorted(group)
        assert all(shape.ranks_along(rank, *axes) == group for rank in group)


def test_a_rank_outside_of_the_world_is_refused() -> None:
    with pytest.raises(AssertionError):
        GridShape(data=2, tensor=2).coordinates(4)


def test_one_process_needs_no_groups() -> None:
    grid = ProcessGrid.single()
    assert (grid.tensor_group, grid.table_group, grid.groups) == (None, None, {})
    assert (grid.rank, grid.tensor_rank, grid.data_rank) == (0, 0, 0)
    with pytest.raises(AssertionError):
        DeepSpeedTopology(grid)


def _members(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def _grid_facts(shapes: list[GridShape]) -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    facts = []
    for shape in shapes:
        grid = ProcessGrid.create(shape)
        mpu = DeepSpeedTopology(grid)
        total = torch.tensor([float(grid.rank)])
        dist.all_reduce(total, group=mpu.get_data_parallel_group())  # the group works, whatever its size
        facts.append(
            {
                "tensor": _members(grid.tensor_group),
                "data": _members(grid.group("data", "context")),
                "context": _members(grid.context_group),
                "replica": _members(grid.replica_group),
                "ends": _members(grid.ends_group),
                "batch": _members(grid.batch_group),
                "source": grid.batch_source,
                "table": _members(grid.table_group),
                "mpu": (
                    mpu.get_model_parallel_rank(),
                    mpu.get_model_parallel_world_size(),
                    _members(mpu.get_model_parallel_group()),
                    mpu.get_data_parallel_rank(),
                    mpu.get_data_parallel_world_size(),
                    _members(mpu.get_data_parallel_group()),
                ),
                "aliases": (
                    mpu.get_tensor_model_parallel_rank(),
                    mpu.get_tensor_model_parallel_world_size(),
                    _members(mpu.get_tensor_model_parallel_group()),
                ),
                "data_ranks": mpu.get_data_parallel_group_ranks(),
                "tensor_source": mpu.get_tensor_model_parallel_src_rank(),
                "data_sum": total.item(),
            }
        )
    dist.destroy_process_group()
    return facts


def _wanted(shape: GridShape, rank: int, *axes: Any) -> list[int] | None:
    ranks = shape.ranks_along(rank, *axes)
    return ranks if len(ranks) > 1 else None


def test_groups_of_real_processes() -> None:
    shapes = [
        GridShape(data=2, tensor=2),
        GridShape(data=4),
        GridShape(tensor=4),
        GridShape(pipe=2, tensor=2),
        GridShape(data=2, context=2),
        GridShape(pipe=4),
    ]
    for rank, facts in enumerate(run_ranks(4, _grid_facts, shapes)):
        for shape, found in zip(shapes, facts, strict=True):
            model, data = shape.ranks_along(rank, "tensor"), shape.ranks_along(rank, "data", "context")
            assert found["tensor"] == _wanted(shape, rank, "tensor"), (rank, shape)
            assert found["context"] == _wanted(shape, rank, "context"), (rank, shape)
            assert found["data"] == _wanted(shape, rank, "data", "context"), (rank, shape)
            assert found["replica"] == _wanted(shape, rank, "pipe", "tensor"), (rank, shape)
            assert found["table"] == [0, 1, 2, 3]
            assert found["mpu"] == (model.index(rank), len(model), model, data.index(rank), len(data), data)
            assert found["aliases"] == found["mpu"][:3]
            assert found["data_ranks"] == data
            assert found["tensor_source"] == model[0]
            assert found["data_sum"] == sum(data)
    for rank, facts in enumerate(run_ranks(4, _grid_facts, [GridShape(pipe=4), GridShape(pipe=2, tensor=2)])):
        long, short = facts
        assert long["ends"] == ([0, 3] if rank in (0, 3) else None)
        assert short["ends"] == [rank % 2, rank % 2 + 2]
        assert long["batch"] == short["batch"] == [0, 1, 2, 3]
        assert (long["source"], short["source"]) == (0, 0)

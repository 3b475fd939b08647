"""Rank arithmetic without processes, then the groups made from it and DeepSpeed's view of them on four real ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_ranks
from hypothesis import given
from hypothesis import strategies as st

from overtok_megatron.parallel.grid import GridShape, ProcessGrid
from overtok_megatron.parallel.topology import DeepSpeedTopology

AXES = ("pipe", "data", "model")
sizes = st.integers(1, 4)


def test_model_is_innermost_and_pipe_outermost() -> None:
    shape = GridShape(pipe=2, data=3, model=4)
    assert shape.world_size == 24
    assert shape.coordinates(0) == {"pipe": 0, "data": 0, "model": 0}
    assert shape.coordinates(1) == {"pipe": 0, "data": 0, "model": 1}
    assert shape.coordinates(4) == {"pipe": 0, "data": 1, "model": 0}
    assert shape.coordinates(12) == {"pipe": 1, "data": 0, "model": 0}
    assert shape.ranks_along("model", 6) == [4, 5, 6, 7]
    assert shape.ranks_along("data", 6) == [2, 6, 10]
    assert shape.ranks_along("pipe", 6) == [6, 18]


@given(pipe=sizes, data=sizes, model=sizes)
def test_coordinates_are_inverted_by_rank_at(pipe: int, data: int, model: int) -> None:
    shape = GridShape(pipe, data, model)
    assert [shape.rank_at(shape.coordinates(rank)) for rank in range(shape.world_size)] == list(range(shape.world_size))


@given(pipe=sizes, data=sizes, model=sizes, axis=st.sampled_from(AXES))
def test_groups_of_an_axis_part_the_world(pipe: int, data: int, model: int, axis: Any) -> None:
    shape = GridShape(pipe, data, model)
    groups = shape.all_groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(shape.world_size))
    assert {len(group) for group in groups} == {shape.size(axis)}
    for group in groups:
        assert all(shape.ranks_along(axis, rank) == group for rank in group)
        assert [shape.coordinates(rank)[axis] for rank in group] == list(range(shape.size(axis)))


def test_a_rank_outside_of_the_world_is_refused() -> None:
    with pytest.raises(AssertionError):
        GridShape(1, 2, 2).coordinates(4)


def test_one_process_needs_no_groups() -> None:
    grid = ProcessGrid.single()
    assert (grid.tensor_group, grid.data_group, grid.table_group, grid.engine_groups) == (None, None, None, None)
    assert (grid.rank, grid.tensor_rank, grid.data_rank) == (0, 0, 0)
    with pytest.raises(AssertionError):
        DeepSpeedTopology(grid)


def _members(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def _grid_facts(shapes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    facts = []
    for sizes_ in shapes:
        grid = ProcessGrid.create(GridShape(*sizes_))
        mpu = DeepSpeedTopology(grid)
        total = torch.tensor([float(grid.rank)])
        dist.all_reduce(total, group=mpu.get_data_parallel_group())  # the group works, whatever its size
        facts.append(
            {
                "tensor": _members(grid.tensor_group),
                "data": _members(grid.data_group),
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


def test_groups_of_real_processes() -> None:
    shapes = [(1, 2, 2), (1, 4, 1), (1, 1, 4), (2, 1, 2)]
    for rank, facts in enumerate(run_ranks(4, _grid_facts, shapes)):
        for sizes_, found in zip(shapes, facts, strict=True):
            shape = GridShape(*sizes_)
            model, data = shape.ranks_along("model", rank), shape.ranks_along("data", rank)
            assert found["tensor"] == (model if len(model) > 1 else None), (rank, shape)
            assert found["data"] == (data if len(data) > 1 else None), (rank, shape)
            assert found["table"] == [0, 1, 2, 3]
            assert found["mpu"] == (model.index(rank), len(model), model, data.index(rank), len(data), data)
            assert found["aliases"] == found["mpu"][:3]
            assert found["data_ranks"] == data
            assert found["tensor_source"] == model[0]
            assert found["data_sum"] == sum(data)

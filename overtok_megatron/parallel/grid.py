"""The process grid: rank arithmetic as pure functions, and the groups made from it, which are never globals."""

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

Axis = Literal["pipe", "data", "model"]


@dataclass(frozen=True)
class GridShape:
    """Sizes of the axes. Ranks run pipe-major, then data, with model innermost: `rank_at` is the formula."""

    pipe: int
    data: int
    model: int

    @property
    def world_size(self) -> int:
        return self.pipe * self.data * self.model

    def coordinates(self, rank: int) -> dict[Axis, int]:
        """Place of a rank on every axis."""
        assert 0 <= rank < self.world_size
        return {
            "pipe": rank // (self.data * self.model),
            "data": rank // self.model % self.data,
            "model": rank % self.model,
        }

    def rank_at(self, place: dict[Axis, int]) -> int:
        return (place["pipe"] * self.data + place["data"]) * self.model + place["model"]

    def size(self, axis: Axis) -> int:
        return {"pipe": self.pipe, "data": self.data, "model": self.model}[axis]

    def ranks_along(self, axis: Axis, rank: int) -> list[int]:
        """The ranks that differ from `rank` only on `axis`, itself included, in order."""
        place = self.coordinates(rank)
        return [self.rank_at({**place, axis: index}) for index in range(self.size(axis))]

    def all_groups(self, axis: Axis) -> list[list[int]]:
        """Every group of an axis once, by first rank."""
        return [self.ranks_along(axis, rank) for rank in range(self.world_size) if self.coordinates(rank)[axis] == 0]


@dataclass(frozen=True)
class ProcessGrid:
    """This process's place and groups. A group of one rank is None: the layers then take the plain path.

    tensor_group: ranks that split one layer. data_group: ranks that hold the same shard for other data. table_group:
    the whole world, over which the n-gram tables are sharded. engine_groups: the same tensor and data groups where
    DeepSpeed needs them even with one member; None without a process group.
    """

    shape: GridShape
    rank: int
    tensor_group: dist.ProcessGroup | None
    data_group: dist.ProcessGroup | None
    table_group: dist.ProcessGroup | None
    engine_groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None

    @property
    def tensor_rank(self) -> int:
        return self.shape.coordinates(self.rank)["model"]

    @property
    def data_rank(self) -> int:
        return self.shape.coordinates(self.rank)["data"]

    @classmethod
    def single(cls) -> "ProcessGrid":
        """One process, no process group."""
        return cls(GridShape(1, 1, 1), 0, None, None, None, None)

    @classmethod
    def create(cls, shape: GridShape) -> "ProcessGrid":
        """Make all groups; collective over the world, whose size must be the shape's."""
        rank, world = dist.get_rank(), dist.get_world_size()
        assert world == shape.world_size, (world, shape)

        def own_group(axis: Axis) -> dist.ProcessGroup:
            mine = None
            for ranks in shape.all_groups(axis):  # every rank makes every group, in the same order
                group = dist.new_group(ranks)
                if rank in ranks:
                    mine = group
            assert mine is not None
            return mine

        tensor, data = own_group("model"), own_group("data")
        return cls(
            shape,
            rank,
            tensor if shape.model > 1 else None,
            data if shape.data > 1 else None,
            dist.group.WORLD if world > 1 else None,
            (tensor, data),
        )

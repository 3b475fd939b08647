"""The process grid: rank arithmetic as pure functions, and the groups made from it, which are never globals."""

from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import Any, Literal

import torch.distributed as dist

Axis = Literal["pipe", "data", "context", "tensor"]
# How long a rank waits for a message outside a training step: meanwhile another rank may hash or write its files.
CONTROL_TIMEOUT = timedelta(hours=12)
AXES: tuple[Axis, ...] = ("pipe", "data", "context", "tensor")  # outermost first: tensor-parallel ranks are neighbours


@dataclass(frozen=True, kw_only=True)
class GridShape:
    """Sizes of the axes. Ranks run pipe-major, then data, context, with tensor innermost: `rank_at` is the formula."""

    pipe: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def world_size(self) -> int:
        return self.pipe * self.data * self.context * self.tensor

    def size(self, axis: Axis) -> int:
        return int(getattr(self, axis))

    def coordinates(self, rank: int) -> dict[Axis, int]:
        """Place of a rank on every axis."""
        assert 0 <= rank < self.world_size
        place: dict[Axis, int] = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, self.size(axis))
        return {axis: place[axis] for axis in AXES}

    def rank_at(self, place: dict[Axis, int]) -> int:
        rank = 0
        for axis in AXES:
            rank = rank * self.size(axis) + place[axis]
        return rank

    def ranks_along(self, rank: int, *axes: Axis) -> list[int]:
        """The ranks that differ from `rank` only on `axes`, itself included, in order."""
        place = self.coordinates(rank)
        spans = [range(self.size(axis)) for axis in AXES if axis in axes]
        ordered = [axis for axis in AXES if axis in axes]
        return [self.rank_at({**place, **dict(zip(ordered, spot, strict=True))}) for spot in product(*spans)]

    def all_groups(self, *axes: Axis) -> list[list[int]]:
        """Every group along `axes` once, by first rank."""
        places = ((rank, self.coordinates(rank)) for rank in range(self.world_size))
        return [self.ranks_along(rank, *axes) for rank, place in places if not any(place[axis] for axis in axes)]

    def pipe_ends(self, ranks: list[int]) -> list[int]:
        """Those of `ranks` that are on the first or the last pipeline stage."""
        return [rank for rank in ranks if self.coordinates(rank)["pipe"] in (0, self.pipe - 1)]


@dataclass(frozen=True)
class ProcessGrid:
    """This process's place and groups. A group of one rank is None: the layers then take the plain path.

    tensor_group: ranks that split one layer. context_group: ranks that split a sequence. data_group: ranks that hold the
    same shard, for other data or another part of the sequence, over which gradients are averaged. replica_group: ranks
    that together hold one copy of the weights. ends_group: the first and the last pipeline stage's rank of the same
    place, None for a rank in the middle of a pipeline. batch_group: the ranks that see the same samples, which are all of
    one pipeline. table_group: the whole world, over which the n-gram tables are sharded. engine_groups: the tensor and data
    groups where DeepSpeed needs them even with one member; None without a process group. control_group: the whole world
    over gloo, with a long time limit, whatever the run's device: for `gather_objects` and `wait_for_all`.
    """

    shape: GridShape
    rank: int
    tensor_group: dist.ProcessGroup | None
    context_group: dist.ProcessGroup | None
    data_group: dist.ProcessGroup | None
    replica_group: dist.ProcessGroup | None
    ends_group: dist.ProcessGroup | None
    batch_group: dist.ProcessGroup | None
    table_group: dist.ProcessGroup | None
    engine_groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None
    control_group: dist.ProcessGroup | None

    def place(self, axis: Axis) -> int:
        """This rank's coordinate on an axis."""
        return self.shape.coordinates(self.rank)[axis]

    @property
    def tensor_rank(self) -> int:
        return self.place("tensor")

    @property
    def data_rank(self) -> int:
        return self.place("data")

    @property
    def is_first_stage(self) -> bool:
        return self.place("pipe") == 0

    @property
    def is_last_stage(self) -> bool:
        return self.place("pipe") == self.shape.pipe - 1

    @property
    def batch_source(self) -> int:
        """The rank that reads this pipeline's samples and hands them to the others of batch_group."""
        return self.shape.rank_at({"pipe": 0, "data": self.data_rank, "context": 0, "tensor": 0})

    def gather_objects(self, value: Any) -> list[Any]:
        """One picklable object from every rank, on every rank, in rank order; all ranks must call this."""
        if self.control_group is None:
            return [value]
        values: list[Any] = [None] * self.shape.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def wait_for_all(self) -> None:
        """Return when every rank has called this."""
        if self.control_group is not None:
            dist.barrier(group=self.control_group)

    @classmethod
    def single(cls) -> "ProcessGrid":
        """One process, no process group."""
        return cls(GridShape(), 0, None, None, None, None, None, None, None, None, None)

    @classmethod
    def create(cls, shape: GridShape) -> "ProcessGrid":
        """Make all groups; collective over the world, whose size must be the shape's."""
        rank, world = dist.get_rank(), dist.get_world_size()
        assert world == shape.world_size, (world, shape)

        def own_group(name: str, groups: list[list[int]]) -> dist.ProcessGroup | None:
            mine = None
            for ranks in groups:  # every rank makes every group, in the same order
                group = dist.new_group(ranks, group_desc=name)
                if rank in ranks:
                    mine = group
            return mine

        def split_group(name: str, groups: list[list[int]]) -> dist.ProcessGroup | None:
            return own_group(name, groups) if len(groups[0]) > 1 else None

        tensor = own_group("tensor", shape.all_groups("tensor"))
        data = own_group("data", shape.all_groups("data", "context"))
        assert tensor is not None and data is not None
        return cls(
            shape,
            rank,
            tensor if shape.tensor > 1 else None,
            split_group("context", shape.all_groups("context")),
            data if shape.data * shape.context > 1 else None,
            split_group("replica", shape.all_groups("pipe", "tensor")),
            split_group("pipeline ends", [shape.pipe_ends(ranks) for ranks in shape.all_groups("pipe")]),
            split_group("batch", shape.all_groups("pipe", "context", "tensor")),
            own_group("tables", [list(range(world))]) if world > 1 else None,
            (tensor, data),
            dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT, group_desc="control") if world > 1 else None,
        )

"""The process grid: rank arithmetic as pure functions, and the process groups made from it, which are never globals."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from typing import Any, Literal

import torch.distributed as dist

from overtok_megatron.parallel.spans import profiler_span

Axis = Literal["pipe", "data", "context", "tensor"]
# How long a rank waits for a message outside a training step: meanwhile another rank may hash or write its files.
CONTROL_TIMEOUT = timedelta(hours=12)
AXES: tuple[Axis, ...] = ("pipe", "data", "context", "tensor")  # outermost first: tensor-parallel ranks are neighbours


@dataclass(frozen=True, kw_only=True)
class GridShape:
    """Sizes of the axes. data: the parts of a batch, each seen by other ranks. context: the slices of a sequence.

    Ranks run pipe-major, then data, context, with tensor innermost: `rank_at` is the formula."""

    pipe: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def world_size(self) -> int:
        return self.ranks(*AXES)

    def size(self, axis: Axis) -> int:
        return int(getattr(self, axis))

    def ranks(self, *axes: Axis) -> int:
        """How many ranks a group along `axes` has."""
        return math.prod(self.size(axis) for axis in axes)

    def coordinates(self, rank: int) -> dict[Axis, int]:
        """The coordinate of a rank on every axis."""
        assert 0 <= rank < self.world_size
        reversed_coordinates: dict[Axis, int] = {}
        for axis in reversed(AXES):
            rank, reversed_coordinates[axis] = divmod(rank, self.size(axis))
        return {axis: reversed_coordinates[axis] for axis in AXES}

    def rank_at(self, coordinates: dict[Axis, int]) -> int:
        rank = 0
        for axis in AXES:
            rank = rank * self.size(axis) + coordinates[axis]
        return rank

    def ranks_along(self, rank: int, *axes: Axis) -> list[int]:
        """The ranks that differ from `rank` on `axes` only, itself included, in rising order."""
        own = self.coordinates(rank)
        varied = [axis for axis in AXES if axis in axes]
        spans = [range(self.size(axis)) for axis in varied]
        return [self.rank_at({**own, **dict(zip(varied, values, strict=True))}) for values in product(*spans)]

    def all_groups(self, *axes: Axis) -> list[list[int]]:
        """Every group along `axes` once, sorted by first rank."""
        coordinates = ((rank, self.coordinates(rank)) for rank in range(self.world_size))
        return [self.ranks_along(rank, *axes) for rank, own in coordinates if not any(own[axis] for axis in axes)]

    def pipe_ends(self, ranks: list[int]) -> list[int]:
        """Those of `ranks` that are on the first or on the last pipeline stage."""
        return [rank for rank in ranks if self.coordinates(rank)["pipe"] in (0, self.pipe - 1)]


# The axes of every group that a run uses, in the order in which all ranks make them, and its name in profiler traces.
GROUPS: dict[tuple[Axis, ...], str] = {
    ("tensor",): "tensor",
    ("data", "context"): "data",  # ranks with the same weights; DeepSpeed averages gradients over them
    ("context",): "context",
    ("pipe", "tensor"): "replica",
    ("pipe", "context", "tensor"): "batch",
    AXES: "tables",
}
# Groups over gloo whatever the run's device: a thread broadcasts tokens in host memory over it (training/token_feed.py).
_ON_THE_HOST: tuple[tuple[Axis, ...], ...] = (("pipe", "context", "tensor"),)
# DeepSpeed asks for these groups even where they have one rank.
_NEEDED_ALONE: tuple[tuple[Axis, ...], ...] = (("tensor",), ("data", "context"))


@dataclass(frozen=True, kw_only=True)
class ProcessGrid:
    """This process's coordinates and groups.

    groups: those of `GROUPS` that have more than one rank, and those that DeepSpeed needs; empty without a process group.
    ends_group: the ranks of the first and of the last pipeline stage that share all other coordinates; None for a rank in
    the middle of a pipeline, and without a pipeline. control_group: the whole world over gloo, with a long time limit, for
    `gather_objects` and `wait_for_all`, whatever the run's device.
    """

    shape: GridShape = field(default_factory=GridShape)
    rank: int = 0
    groups: Mapping[tuple[Axis, ...], dist.ProcessGroup] = field(default_factory=dict)
    ends_group: dist.ProcessGroup | None = None
    control_group: dist.ProcessGroup | None = None

    def group(self, *axes: Axis) -> dist.ProcessGroup | None:
        """The ranks that differ from this one on `axes` only; None if it is the only one: layers then take the plain path."""
        return self.groups[axes] if self.shape.ranks(*axes) > 1 else None

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The ranks that split one layer."""
        return self.group("tensor")

    @property
    def context_group(self) -> dist.ProcessGroup | None:
        """The ranks that split a sequence."""
        return self.group("context")

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The ranks that together hold one copy of the weights."""
        return self.group("pipe", "tensor")

    @property
    def batch_group(self) -> dist.ProcessGroup | None:
        """The ranks that see the same samples, which are those of one pipeline; for tensors in host memory.

        The thread of the token feed alone may use it, because all ranks must call the collectives of a group in one order.
        """
        return self.group("pipe", "context", "tensor")

    @property
    def table_group(self) -> dist.ProcessGroup | None:
        """The whole world, over which the n-gram tables are sharded."""
        return self.group(*AXES)

    def coordinate(self, axis: Axis) -> int:
        """This rank's coordinate on an axis."""
        return self.shape.coordinates(self.rank)[axis]

    @property
    def tensor_rank(self) -> int:
        return self.coordinate("tensor")

    @property
    def data_rank(self) -> int:
        """Which part of a batch this rank sees; the same on the context ranks, which see slices of the same samples."""
        return self.coordinate("data")

    @property
    def is_first_stage(self) -> bool:
        return self.coordinate("pipe") == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coordinate("pipe") == self.shape.pipe - 1

    @property
    def batch_source(self) -> int:
        """The rank that reads this pipeline's samples and hands them to the others of batch_group."""
        return self.shape.rank_at({"pipe": 0, "data": self.data_rank, "context": 0, "tensor": 0})

    def gather_objects(self, value: Any) -> list[Any]:
        """One picklable object from every rank, on every rank, in rank order; all ranks must call this."""
        if self.control_group is None:
            return [value]
        values: list[Any] = [None] * self.shape.world_size
        with profiler_span("all-gather of objects", self.control_group):
            dist.all_gather_object(values, value, group=self.control_group)
        return values

    def wait_for_all(self) -> None:
        """Return when every rank has called this."""
        if self.control_group is not None:
            with profiler_span("barrier", self.control_group):
                dist.barrier(group=self.control_group)

    @classmethod
    def single(cls) -> "ProcessGrid":
        """One process, no process group."""
        return cls()

    @classmethod
    def create(cls, shape: GridShape) -> "ProcessGrid":
        """Make all groups; all ranks must call this, and their number must be the shape's."""
        world = dist.get_world_size()
        assert world == shape.world_size, (world, shape)
        groups = {  # every rank makes every group, in the same order
            axes: _own_group(name, shape.all_groups(*axes), backend="gloo" if axes in _ON_THE_HOST else None)
            for axes, name in GROUPS.items()
            if shape.ranks(*axes) > 1 or axes in _NEEDED_ALONE
        }
        ends = [shape.pipe_ends(ranks) for ranks in shape.all_groups("pipe")]
        ends_group = _own_group("pipeline ends", ends) if shape.pipe > 1 else None
        control = None
        if world > 1:
            control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT, group_desc="control")
        return cls(
            shape=shape,
            rank=dist.get_rank(),
            groups={axes: group for axes, group in groups.items() if group is not None},
            ends_group=ends_group,
            control_group=control,
        )


def _own_group(name: str, groups: list[list[int]], *, backend: str | None = None) -> dist.ProcessGroup | None:
    """Make a group of each list of ranks, on all ranks in the same order; returns the one that this rank is in.

    backend: None = that of the run.
    """
    own = None
    for ranks in groups:
        group = dist.new_group(ranks, backend=backend, group_desc=name)
        if dist.get_rank() in ranks:
            own = group
    return own

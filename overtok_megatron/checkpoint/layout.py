"""The layout of a checkpoint: how many ranks wrote it along each axis, and in which form it holds the optimizer state.

A manifest stores the layout as numbers by configuration key: `pipeline_parallel_size`, `data_parallel_size`,
`context_parallel_size`, `tensor_parallel_size` and `zero_stage`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from overtok_megatron.config.wording import short

_AXES = ("pipeline", "data", "context", "tensor")
_WEIGHTS_ONLY_AXES = ("data", "context", "tensor", "pipeline")  # their order in manifests of weights only
_LAST_ZERO_STAGE = 3


class LayoutKind(Enum):
    """In which form a checkpoint holds its dense parameters and their optimizer state."""

    WRITTEN_BY_RANKS = "written by ranks"  # each rank's part of the state, in DeepSpeed's files
    WHOLE = "whole"  # whole parameters with their whole state, which are not in DeepSpeed's files
    WEIGHTS_ONLY = "weights only"  # whole parameters without state


_KIND_NUMBERS = {LayoutKind.WHOLE: -1, LayoutKind.WEIGHTS_ONLY: -2}  # what manifests hold instead of a ZeRO stage


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    """pipeline, data, context, tensor: the number of ranks along each axis; zero_stage is None if DeepSpeed wrote no state.

    Whole parameters still lie in several files: `pipeline` is then the number of files, and the other sizes are 1.
    """

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    zero_stage: int | None = None
    kind: LayoutKind = LayoutKind.WRITTEN_BY_RANKS

    def __post_init__(self) -> None:
        assert (self.zero_stage is not None) == (self.kind is LayoutKind.WRITTEN_BY_RANKS)

    @property
    def model_parallel_ranks(self) -> int:
        """The number of files of dense weights: one per pipeline stage and tensor rank."""
        return self.pipeline * self.tensor

    @property
    def data_ranks(self) -> int:
        """The number of ranks over which ZeRO partitions the state of one model-parallel rank."""
        return self.data * self.context

    def file_number(self, stage: int, tensor_rank: int) -> int:
        """The number, from 0, of the file that a pipeline stage's tensor rank wrote: its model-parallel rank."""
        return stage * self.tensor + tensor_rank

    def file_numbers(self, stage: int) -> range:
        """The numbers of the files that all tensor ranks of a pipeline stage wrote, in the order of these ranks."""
        return range(self.file_number(stage, 0), self.file_number(stage + 1, 0))

    def to_numbers(self) -> dict[str, int]:
        """The layout as a manifest stores it."""
        axes = _WEIGHTS_ONLY_AXES if self.kind is LayoutKind.WEIGHTS_ONLY else _AXES
        sizes = {_key(axis): getattr(self, axis) for axis in axes}
        return {**sizes, "zero_stage": _KIND_NUMBERS.get(self.kind, self.zero_stage)}

    @classmethod
    def from_numbers(cls, values: Any) -> "CheckpointLayout":
        """The layout that a manifest's numbers mean. Raises ValueError naming the first that is missing, unknown or wrong."""
        if not isinstance(values, Mapping):
            raise ValueError(f"layout: {short(repr(values))} is not a mapping of sizes")
        lowest = {**dict.fromkeys(map(_key, _AXES), 1), "zero_stage": min(_KIND_NUMBERS.values())}
        for key in sorted(lowest.keys() ^ values.keys()):
            raise ValueError(f"layout: {short(key)} is {'missing' if key in lowest else 'unknown'}")
        for key, least in lowest.items():
            number = values[key]
            if type(number) is not int or number < least or (key == "zero_stage" and number > _LAST_ZERO_STAGE):
                raise ValueError(f"layout: {key} is {short(repr(number))}")
        zero_stage, sizes = values["zero_stage"], {axis: values[_key(axis)] for axis in _AXES}
        for kind, number in _KIND_NUMBERS.items():
            if zero_stage == number:
                return cls(**sizes, kind=kind)
        return cls(**sizes, zero_stage=zero_stage)


def _key(axis: str) -> str:
    return f"{axis}_parallel_size"

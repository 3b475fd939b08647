"""How a parameter is split: metadata that is set in one place, and initial weights that do not depend on the split.

Checkpoints, clipping and conversion read `splits_of`. Names of parameters are never matched to find out how one is split.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from overtok_megatron.config.derived import part_start
from overtok_megatron.parallel.collectives import group_rank, group_size


@dataclass(frozen=True)
class ParameterSplit:
    """This rank holds entries [start, stop) of the `size` along dimension `dim` of a parameter."""

    dim: int
    size: int
    start: int
    stop: int


def split_bounds(size: int, parts: int) -> tuple[int, ...]:
    """Where each of `parts` contiguous parts of `size` entries begins, and the end: `parts + 1` ascending numbers.

    The first `size % parts` parts have one entry more than the others, so any size goes over any number of parts; without
    padding, and a part may be empty.
    """
    return tuple(part_start(size, parts, index) for index in range(parts + 1))


def split_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """[start, stop) of one part of `split_bounds`."""
    return part_start(size, parts, index), part_start(size, parts, index + 1)


def largest_part(start: int, stop: int, index: int) -> int:
    """Size of the largest part that `split_range` makes, computed from any one part.

    The first part is the largest. For others, start = index * base + min(index, remainder), so start / index rounded up is
    base + (remainder > 0).
    """
    return stop - start if index == 0 else -(-start // index)


def mark_split(
    parameter: nn.Parameter, *, dim: int, full_shape: tuple[int, ...], group: dist.ProcessGroup | None
) -> None:
    """Record that `parameter` is this rank's part along `dim` over `group`; records nothing for group None.

    A parameter may be split several times, along several dimensions. Also sets `tensor_model_parallel`, without which
    DeepSpeed's norm leaves out the parts of all ranks but the first.
    """
    if group is None:
        return
    start, stop = split_range(full_shape[dim], group_size(group), group_rank(group))
    assert parameter.shape[dim] == stop - start, (tuple(parameter.shape), full_shape)
    splits = (*splits_of(parameter), ParameterSplit(dim, full_shape[dim], start, stop))
    parameter.splits = splits  # type: ignore[attr-defined]  # metadata on the parameter
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # the name that DeepSpeed looks for


def splits_of(parameter: nn.Parameter) -> tuple[ParameterSplit, ...]:
    """How a parameter is split; empty = every rank of the tensor group holds all of it."""
    splits: tuple[ParameterSplit, ...] = getattr(parameter, "splits", ())
    return splits


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the full parameter of which this rank holds a part."""
    shape = list(parameter.shape)
    for split in splits_of(parameter):
        shape[split.dim] = split.size
    return tuple(shape)


def own_part(full: Tensor, splits: Sequence[ParameterSplit]) -> Tensor:
    """The part, a view, of a full tensor that belongs to the rank whose splits these are."""
    for split in splits:
        full = full.narrow(split.dim, split.start, split.stop - split.start)
    return full


def mark_tied_copy(parameter: nn.Parameter) -> None:
    """Record that `parameter` is a copy of a weight of another pipeline stage, which counts it in the norm and saves it.

    The name of the attribute is the one that DeepSpeed's norms look for.
    """
    parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]


def is_tied_copy(parameter: nn.Parameter) -> bool:
    """Whether `mark_tied_copy` was called for it."""
    return getattr(parameter, "ds_pipe_replicated", False)


def named_seed(seed: int, name: str) -> int:
    """A seed of 63 bits for what is called `name`: the first bytes of the SHA-256 of (seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one weight, seeded by (seed, name). Global random states are unchanged."""
    return torch.Generator().manual_seed(named_seed(seed, name))


@torch.no_grad()
def initialise(parameter: nn.Parameter, std: float, seed: int, name: str) -> None:
    """Fill with this rank's part of the full weight, which is drawn from normal(0, std) and is the same for every split."""
    full: Tensor = torch.empty(full_shape(parameter)).normal_(0.0, std, generator=named_generator(seed, name))
    parameter.copy_(own_part(full, splits_of(parameter)))

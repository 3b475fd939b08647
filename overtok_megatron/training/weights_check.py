"""Whether ranks that should hold the same dense weights do: a checksum of each weight, compared every some steps.

Compared are the data- and context-parallel replicas of every weight, and over the tensor-parallel ranks the weights that are
not split. What can be found depends on who makes the weights:

| ZeRO | what is found |
| --- | --- |
| 0 | every rank updates its own copy, so that a flipped bit in weights, master weights, moments or reduced gradients stays |
| 1, 2 | weights come anew from the owner of each part in every step: a flip or a failed copy since the last all-gather |
| 3 | nothing: no rank has a copy of another's weights |

A wrong value that goes through a collective reaches all ranks alike, and cannot be found by comparing: a flip in a gradient
before it is reduced, in an activation, or under ZeRO 1 and 2 in the owner's master weights. Rows of tables have one owner each.
"""

import logging
import socket
from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from overtok_megatron.errors import WeightsError
from overtok_megatron.parallel.collectives import all_reduce_in_place
from overtok_megatron.parallel.grid import Axis
from overtok_megatron.parallel.splits import splits_of
from overtok_megatron.training.engine import TrainingEngine

log = logging.getLogger(__name__)

_CHUNK = 1 << 20  # words that are handled at once: 24 MiB beside the weights
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd, with bits all over, as signed numbers: of a word's position in its chunk, and from one chunk to the next.
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
_NEXT_CHUNK = 0xD6E8FEB86659FD93 - (1 << 64)
_REPLICAS: tuple[Axis, ...] = ("data", "context")


def checksum(values: Tensor) -> Tensor:
    """An int64 scalar of a contiguous tensor's bits, on its device: the same bits on every device.

    The sum, modulo 2^64, of its words times odd factors that depend on their positions: sums of integers do not depend on their
    order. One flipped bit always changes it, since an odd factor times a power of two below 2^64 is not 0.
    """
    words = values.detach().reshape(-1).view(_WORDS[values.element_size()])
    positions = torch.arange(min(_CHUNK, words.numel()), device=values.device)
    factors = (positions * _FACTOR) | 1
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for chunk in words.split(_CHUNK):
        total = total * _NEXT_CHUNK + (chunk.to(torch.int64) * factors[: chunk.numel()]).sum()
    return total


class WeightsCheck:
    """Compares the weights of one engine over its ranks, all of which must call `run`.

    interval: of steps; None = it is off. Under ZeRO 3, and where no rank has a copy, it is off, and the first rank says so.
    """

    def __init__(self, engine: TrainingEngine, interval: int | None) -> None:
        self._engine = engine
        self._grid = engine.grid
        self._interval = interval
        if interval is None:
            return
        why = ""
        if engine.config.parallel.zero_stage == 3:
            why = "under ZeRO 3 no rank has a copy of another's weights"
        elif self._grid.shape.ranks(*_REPLICAS, "tensor") == 1:
            why = "in this layout no rank has a copy of another's weights"
        if why:
            self._interval = None
            if self._grid.rank == 0:
                log.warning("training.weights_check_interval: %d, but weights are not checked: %s", interval, why)

    def due(self, step: int, *, saved: bool) -> bool:
        """Whether to check after optimizer step `step`; saved: whether it will be saved, which is not done unchecked."""
        return self._interval is not None and (saved or step % self._interval == 0)

    def run(self, step: int) -> None:
        """Raise WeightsError on all ranks where some of them hold other bits than the rest. A WAIT FOR THE DEVICE."""
        parameters = dict(self._engine.model.named_parameters())
        if not parameters:
            sums = torch.zeros(0, dtype=torch.int64, device=self._engine.device)
        else:
            sums = torch.stack([checksum(parameter) for parameter in parameters.values()])
        whole = [index for index, parameter in enumerate(parameters.values()) if not splits_of(parameter)]
        differs = self._differs(sums, _REPLICAS) or self._differs(sums[whole], ("tensor",))
        if any(self._grid.gather_objects(differs)):
            self._raise(step, parameters, sums.tolist())

    def _differs(self, sums: Tensor, axes: tuple[Axis, ...]) -> bool:
        """Whether any of the sums is not the same on all ranks along `axes`."""
        group = self._grid.group(*axes)
        if group is None or sums.numel() == 0:
            return False
        extremes = torch.stack([sums, ~sums])  # the largest of ~x is ~ of the smallest x
        all_reduce_in_place(extremes, group, of="checksums", op=dist.ReduceOp.MAX)
        return not bool(torch.equal(extremes[0], ~extremes[1]))

    def _raise(self, step: int, parameters: dict[str, nn.Parameter], sums: list[int]) -> None:
        own = {name: (total, bool(splits_of(parameters[name]))) for name, total in zip(parameters, sums, strict=True)}
        found = self._grid.gather_objects((socket.gethostname(), own))
        shape = self._grid.shape
        groups: list[tuple[list[int], bool]] = [(ranks, False) for ranks in shape.all_groups(*_REPLICAS)]
        groups += [(ranks, True) for ranks in shape.all_groups("tensor")]
        lines = []
        for ranks, only_whole in groups:
            names = [name for name, (_, split) in found[ranks[0]][1].items() if not (only_whole and split)]
            for name in names:
                values = {rank: found[rank][1][name][0] for rank in ranks}
                if len(set(values.values())) > 1:
                    lines.append(_line(name, values, {rank: found[rank][0] for rank in ranks}))
                    break  # one weight says which ranks it is
        lines = sorted(set(lines))
        raise WeightsError(
            *(
                f"after step {step} {line}; nothing of it is saved, start again from the last checkpoint"
                for line in lines
            )
        )


def _line(name: str, values: dict[int, int], hosts: dict[int, str]) -> str:
    """Which ranks hold another value of a weight than most; where no value is held by most, all of them."""

    def told(ranks: Iterable[int]) -> str:
        return " and ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks)

    (usual, count), *_ = Counter(values.values()).most_common(1)
    if 2 * count <= len(values):
        return f"{name} is not the same on {told(values)}, which should hold the same weights"
    odd = [rank for rank, value in values.items() if value != usual]
    return f"{name} on {told(odd)} is not what the {count} other ranks hold that should hold the same weights"

"""What the heads for later tokens need in a step: targets, inputs, and how many positions each head scores.

A target is shifted on whole sequences, before they are cut into the slices of context ranks. A position scores the tokens that
the stream has, and with attention within documents those of its own document only.

Shapes: A micro-batches per step, b micro batch, s sequence, k = 1 + D' further tokens of a sample, D' how many tokens after
the next one the heads look ahead, D how many of the tokens after a position some of them read as inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from overtok_megatron.config import derived
from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.model.assembly import attention_boundary
from overtok_megatron.model.documents import document_ids
from overtok_megatron.model.heads import LaterTokens
from overtok_megatron.parallel.collectives import all_reduce_in_place
from overtok_megatron.parallel.grid import ProcessGrid


def later_targets(tokens: Tensor, further: int, end: int | None = None) -> list[Tensor]:
    """tokens int64 [b, s + 1 + D'] -> for j = 1 .. D' = `further` the token t + 1 + j of each position t, int64 [b, s].

    IGNORE_INDEX past the end of the stream, and where `end`, the token that ends a document, is given, in another document than
    that of position t. `end` belongs to the document that it ends.
    """
    length = tokens.shape[1] - 1 - further
    documents = None if end is None else document_ids(tokens, end)
    found = []
    for ahead in range(2, 2 + further):
        target = tokens[:, ahead : ahead + length]
        if documents is not None:
            same = documents[:, ahead : ahead + length] == documents[:, :length]
            target = torch.where(same, target, IGNORE_INDEX)
        found.append(target)
    return found


def as_inputs(tokens: Tensor) -> Tensor:
    """Tokens int64 of any shape, with token 0 in place of those that the stream does not have."""
    return torch.where(tokens == IGNORE_INDEX, 0, tokens)


def later_inputs(tokens: Tensor, length: int, depth: int) -> list[Tensor]:
    """tokens int64 [b, s + k] -> for i = 1 .. D = `depth` the token t + i of each position t, int64 [b, s], s = `length`.

    Past the end of the stream token 0 stands in.
    """
    known = as_inputs(tokens)
    return [known[:, ahead : ahead + length] for ahead in range(1, 1 + depth)]


class LaterTokensOfStep(NamedTuple):
    """micro_batches: for each what the heads take; empty on ranks without heads.

    own_counts float64 [D']: this rank's share of the positions that the targets score; over all ranks each is counted once.
    """

    micro_batches: list[LaterTokens]
    own_counts: Tensor


class LaterTokensReader:
    """Makes `LaterTokensOfStep` of the tokens of each step, for the heads of one rank."""

    def __init__(self, config: RunConfig, grid: ProcessGrid, device: torch.device, eod_id: int) -> None:
        self._grid = grid
        self._device = device
        self._further = derived.further_tokens(config)
        self._depth = config.multi_token_prediction.depth
        self._end = attention_boundary(config, eod_id)
        self._num_tokens = derived.tokens_per_step(config)

    def read(self, tokens: Tensor) -> LaterTokensOfStep | None:
        """tokens int64 [A, b, s + k] on the device, whole sequences; None where the model has no heads for later tokens.

        All ranks must call this: it sums the positions over ranks. Nothing waits for the device.
        """
        if self._further == 0:
            return None
        counts = torch.zeros(self._further, dtype=torch.float64, device=self._device)
        micro_batches: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
        if self._grid.is_last_stage:
            sequences = tokens.flatten(0, 1)  # [A b, s + k]
            targets = later_targets(sequences, self._further, self._end)
            if self._grid.tensor_rank == 0 and self._grid.coordinate("context") == 0:  # others have the same sequences
                counts += torch.stack([(target != IGNORE_INDEX).sum() for target in targets])
            inputs = later_inputs(sequences, targets[0].shape[1], self._depth)
            # Of each target and input, the slices [b, s / context ranks] of all micro-batches.
            own = [self._own_slice(whole).split(tokens.shape[1]) for whole in (*targets, *inputs)]
            for of_batch in zip(*own, strict=True):
                micro_batches.append((of_batch[: self._further], of_batch[self._further :]))
        total = counts.clone()
        all_reduce_in_place(total, self._grid.table_group, of="scored positions")  # the group is the whole world
        scales = torch.where(total > 0, self._num_tokens / total.clamp(min=1), 0.0).float()
        return LaterTokensOfStep([LaterTokens(*both, scales) for both in micro_batches], counts)

    def _own_slice(self, whole: Tensor) -> Tensor:
        """[b, s] -> [b, s / context ranks]: the positions of this context rank."""
        return whole.chunk(self._grid.shape.context, dim=-1)[self._grid.coordinate("context")]

"""Over-decoding: output tables 2 .. n beside the main head, of which table j predicts the token j ahead.

All read the hidden state that the main head multiplies. Since the tables are independent given it, their product is one softmax
over the joint vocabulary of n tokens (arXiv 2501.16975, section 3). Each goes through the fused head in turn, so that logits of
few positions and one table exist at once. The tables are never tied, neither to the main head nor to each other.

Shapes: b batch, s this context rank's slice of the sequence, s_shard the part of s that a tensor-parallel rank holds under
sequence parallelism (else s), d hidden, r low rank (r = d without one), v_shard this rank's part of the vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.heads import LaterLosses, LaterTokens
from overtok_megatron.parallel.collectives import all_gather_sequence, copy_to_group
from overtok_megatron.parallel.cross_entropy import linear_cross_entropy
from overtok_megatron.parallel.splits import initialise
from overtok_megatron.parallel.vocabulary import VocabParallelHead


class OverDecodingTable(VocabParallelHead):
    """One output table, [v_shard, r]; with a low rank a projection [r, d] before it, which every rank holds in full."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        low_rank: int | None,
        kernels: Kernels,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__(vocab_size, hidden_size if low_rank is None else low_rank, group=group)
        self.kernels = kernels
        self.sequence_parallel = sequence_parallel
        self.projection = None if low_rank is None else nn.Parameter(torch.empty(low_rank, hidden_size))

    def reset(self, seed: int, name: str, std: float) -> None:
        super().reset(seed, name, std)
        if self.projection is not None:
            initialise(self.projection, std, seed, f"{name}.projection")

    def projected(self, normed: Tensor, gathered: Tensor) -> Tensor:
        """What the table multiplies, [b, s, r]: `gathered` itself without a low rank, else made of this rank's `normed`."""
        if self.projection is None:
            return gathered
        if not self.sequence_parallel:
            return copy_to_group(F.linear(normed, self.projection), self.group)
        # Each rank projects its own positions, so that r values of each travel and not d; the projection's gradient is summed.
        return all_gather_sequence(F.linear(normed, copy_to_group(self.projection, self.group)), self.group, dim=1)

    def forward(self, normed: Tensor, gathered: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The summed cross entropy of targets int64 [b, s], with a gradient and without one; float32 scalars.

        normed [b, s_shard, d], gathered [b, s, d]: as in `LaterHead`.
        """
        return linear_cross_entropy(
            self.projected(normed, gathered).flatten(0, 1),  # [b s, r]
            self.weight,
            targets.flatten(),
            vocab_start=self.vocab_start,
            group=self.group,
            kernels=self.kernels,
        )

    def logits(self, normed: Tensor, gathered: Tensor) -> Tensor:
        """-> [b, s, V] in the model's dtype, all of the vocabulary on every rank. normed, gathered: as in `forward`."""
        return self.gather(F.linear(self.projected(normed, gathered), self.weight))


class OverDecoding(nn.Module):
    """Tables 2 .. n. loss_weights: of the loss of each in the objective."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        loss_weights: Sequence[float],
        low_rank: int | None = None,
        kernels: Kernels,
        tensor_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.loss_weights = tuple(loss_weights)
        tables = {
            str(ahead): OverDecodingTable(
                vocab_size,
                hidden_size,
                low_rank=low_rank,
                kernels=kernels,
                group=tensor_group,
                sequence_parallel=sequence_parallel,
            )
            for ahead in range(2, 2 + len(self.loss_weights))
        }
        self.tables = nn.ModuleDict(tables)  # by j, the number of tokens that a table looks ahead

    def reset(self, seed: int, std: float) -> None:
        """Draw initial weights, named by table, so that no other weight depends on how many tables there are."""
        for ahead, table in self.tables.items():
            assert isinstance(table, OverDecodingTable)
            table.reset(seed, f"over_decoding.tables.{ahead}", std)

    def forward(self, normed: Tensor, gathered: Tensor, later: LaterTokens) -> LaterLosses:
        """The losses of all tables. normed [b, s_shard, d], gathered [b, s, d]: as in `LaterHead`."""
        objective = torch.zeros((), dtype=torch.float32, device=normed.device)
        cross_entropies: dict[str, Tensor] = {}
        for index, (ahead, table) in enumerate(self.tables.items()):
            own, cross_entropy = table(normed, gathered, later.targets[index])
            objective = objective + self.loss_weights[index] * later.scales[index] * own
            cross_entropies[f"over_decoding_{ahead}"] = cross_entropy
        return LaterLosses(objective, cross_entropies)

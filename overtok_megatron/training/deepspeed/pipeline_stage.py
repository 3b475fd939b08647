"""One stage of the model as DeepSpeed's pipeline engine wants it: the same layers, names and weights as the whole model's.

Knows no data and no optimizer. Shapes: b batch, s sequence, d hidden, T tables.
"""

import contextlib
import io
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from overtok_megatron.model.block import run_blocks
from overtok_megatron.model.documents import document_ids
from overtok_megatron.model.transformer import Layers
from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.parallel.collectives import reduce_from_group
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.parallel.splits import mark_pipeline_replica


class MicroBatch(NamedTuple):
    """What a rank handles of one micro-batch: of the input tokens `whole` int64 [b, s] its context-parallel slice `inputs`
    and their targets int64 [b, s / ranks], and the rows that it fetched for them (None where it looks nothing up)."""

    whole: Tensor
    inputs: Tensor
    fetched: FetchedRows | None
    targets: Tensor


class StageResults(NamedTuple):
    """What a rank's stage found, one entry per micro-batch: summed cross entropies, on the last stage only; router statistics
    [blocks of this stage, F], with experts only; and sums of this stage's auxiliary losses by name, the same on all of its
    tensor-parallel ranks."""

    losses: list[Tensor]
    router_stats: list[Tensor]
    auxiliary_losses: list[dict[str, Tensor]]

    def add(self, loss: Tensor | None, stats: Tensor | None, auxiliary_losses: dict[str, Tensor]) -> None:
        if loss is not None:
            self.losses.append(loss)
        if stats is not None:
            self.router_stats.append(stats)
        self.auxiliary_losses.append(auxiliary_losses)


class _Attached(torch.autograd.Function):
    """| forward | x | backward | g, and a constant for the loss beside it | : a loss that no later stage sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, ctx.share), None


class PipelineStage(PipelineModule):
    """This rank's stage. Input of the first: tokens int64 [b, s]; between stages hidden [b, s, d].

    Parameters are called as in `Transformer`, whatever the stage, so that nothing that goes by names (checkpoints, the
    optimizer's groups) knows of pipelines. The last stage's output is the mean objective of a micro-batch. Losses of
    routers on the stages before it are no part of that number; their gradients are those of a model in one piece.

    eod_id: as in `Transformer`. What stages know of a micro-batch beside its hidden states they are told before it,
    in `expect`, so that nothing else travels between them.
    """

    def __init__(
        self,
        layers: Layers,
        blocks_per_stage: list[int],
        grid: ProcessGrid,
        *,
        tied: bool,
        z_loss: float,
        num_micro_batches: int,
        sequence_parallel: bool,
        eod_id: int | None = None,
    ) -> None:
        # plain values and a tuple only: modules can be attributes after DeepSpeed's constructor has begun
        self._layers = layers
        self._counts = [*blocks_per_stage]
        self._counts[0] += 1  # the embedding
        self._counts[-1] += 1  # the head
        self._place = grid
        self._tied = tied
        self._z_loss = z_loss
        self._num_micro_batches = num_micro_batches
        self._sequence_parallel = sequence_parallel
        self._eod_id = eod_id
        self._expected: deque[MicroBatch] = deque()
        self._results = StageResults([], [], [])
        shape = grid.shape
        topology = PipeModelDataParallelTopology(
            num_pp=shape.pipe, num_mp=shape.tensor, num_dp=shape.data * shape.context
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers
            super().__init__([None] * sum(self._counts), topology=topology)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = [sum(self._counts[:stage]) for stage in range(len(self._counts) + 1)]
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _build(self) -> None:
        self.embedding = self._layers.embedding
        self.blocks = nn.ModuleDict({str(index): block for index, block in self._layers.blocks.items()})
        self.head = self._layers.head
        first, last = self._place.is_first_stage, self._place.is_last_stage
        layers = [*([self.embedding] if first else []), *self.blocks.values(), *([self.head] if last else [])]
        self.forward_funcs = layers  # what DeepSpeed's checkpoints hold, a file a layer

    def _index_tied_modules(self) -> dict[str, Any]:
        """The word embedding and its copy beside the head: equal from the start, their gradients summed before a step."""
        if not self._tied or self.embedding is None:
            return {}
        word = self.embedding.word
        if not self._place.is_first_stage:
            mark_pipeline_replica(word.weight)
        ranks = self._place.shape.pipe_ends(self._place.shape.ranks_along(self._place.rank, "pipe"))
        return {"word": {"ranks": ranks, "group": self._place.ends_group, "weight_attr": ["weight"], "module": word}}

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        """Equal already; without autograd, which would otherwise note DeepSpeed's broadcast as part of the forward pass."""
        super()._synchronize_tied_weights()

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """What the engine sums over the ends; not registered a second time, which would change its name."""
        return [(comm["module"].weight, comm["group"]) for comm in self.tied_comms.values()]

    def expect(self, batches: Sequence[MicroBatch]) -> None:
        """Name the micro-batches to come; every stage runs them in order."""
        self._expected = deque(batches)
        self._results = StageResults([], [], [])

    def forward(self, x: Any) -> Tensor:
        """This stage's layers on what the engine hands over; the loss on the last.

        The loss is a part of the forward pass, not DeepSpeed's `loss_fn` behind it: with bf16 the engine clears gradients
        when backward reaches the module's output, and what ran behind it would lose its own.
        """
        batch = self._expected.popleft()
        documents = None if self._eod_id is None else document_ids(batch.whole, self._eod_id)
        if self._place.is_first_stage:
            assert self.embedding is not None
            x = self.embedding(x, batch.fetched)
        tokens = x.shape[0] * x.shape[1]
        hidden, routing = run_blocks(self.blocks.values(), x, documents=documents)
        if self.head is None:
            if routing is None:
                return hidden
            tensor_group = self._place.tensor_group if self._sequence_parallel else None
            router_loss = reduce_from_group(routing.loss.detach(), tensor_group)  # as the head does of its own stage's
            self._results.add(None, routing.stats, {"router": router_loss})
            slices = self._place.shape.tensor if self._sequence_parallel else 1
            attached: Tensor = _Attached.apply(hidden, routing.loss, 1.0 / (tokens * slices * self._num_micro_batches))
            return attached
        z_loss = self._z_loss if self.training else 0.0
        result = self.head.losses(hidden, batch.targets, z_loss, routing)
        self._results.add(result.main_loss, result.router_stats, result.auxiliary_losses)
        return result.objective / batch.targets.numel()

    def take_results(self) -> StageResults:
        """What the micro-batches since expect() gave."""
        assert not self._expected, "micro-batches that never arrived"
        results, self._results = self._results, StageResults([], [], [])
        return results

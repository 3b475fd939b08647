"""One stage of the model in the form of DeepSpeed's pipeline engine, with the layers, names and weights of `Transformer`.

Loading of data and the optimizer are elsewhere. Shapes: b batch, s this context rank's slice of the sequence, s_shard the
part of s that a tensor-parallel rank holds under sequence parallelism (else s), d hidden.
"""

import contextlib
import io
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from overtok_megatron.kernels.documents import Documents
from overtok_megatron.model.block import run_blocks
from overtok_megatron.model.documents import document_ids
from overtok_megatron.model.feed_forward import Routing
from overtok_megatron.model.heads import ForwardResult
from overtok_megatron.model.transformer import Layers
from overtok_megatron.parallel.collectives import reduce_from_group
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.parallel.splits import mark_tied_copy
from overtok_megatron.training.micro_batch import MicroBatch, StageResults, with_own_kind_of_gradient


class _AddLossGradient(torch.autograd.Function):
    """| forward | x | backward | g for x, `share` for `loss` |

    Returns x unchanged; backward also gives `loss` the gradient `share`, so that this stage's router loss is trained although
    the last stage computes the objective.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, ctx.share), None


class _WithZeroGradients(torch.autograd.Function):
    """| forward | x | backward | g for x, zeros for `weights` | : each weight gets a gradient, used or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.weights = weights
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(weight.new_zeros(()).expand_as(weight) for weight in ctx.weights)


class PipelineStage(PipelineModule):
    """This rank's stage. Input of the first stage: tokens int64 [b, s]; between stages: hidden [b, s_shard, d].

    Parameters have the names that they have in `Transformer`, on every stage, so that whatever goes by names (checkpoints,
    the optimizer's groups) need not know of pipelines. The output of the last stage is the mean objective of a micro-batch.
    Router losses of the stages before it are not part of that number, but their gradients are those of an undivided model.

    `layers.shared` names the parts of the embedding that both ends hold: equal from the start, their gradients are summed
    over both before each step, they are counted once in the norm and saved once.

    eod_id, z_loss_weight: as in `Transformer`. num_later_heads: how many modules for later tokens the last stage holds.
    `expect` tells each stage in advance what it needs of a micro-batch besides hidden states, so that nothing else travels
    between stages.
    """

    def __init__(
        self,
        layers: Layers,
        blocks_per_stage: list[int],
        grid: ProcessGrid,
        *,
        z_loss_weight: float,
        num_micro_batches: int,
        sequence_parallel: bool,
        eod_id: int | None = None,
        num_later_heads: int = 0,
    ) -> None:
        # Plain values and a tuple only: a module cannot become an attribute before DeepSpeed's constructor has run.
        self._layers = layers
        self._counts = [*blocks_per_stage]
        self._counts[0] += 1  # the embedding
        self._counts[-1] += 1 + num_later_heads  # the head, and what is beside it
        self._process_grid = grid  # DeepSpeed keeps a grid of its own in _grid
        self._z_loss_weight = z_loss_weight
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
        self.over_decoding = self._layers.over_decoding
        self.multi_token = self._layers.multi_token
        first, last = self._process_grid.is_first_stage, self._process_grid.is_last_stage
        heads = [head for head in (self.head, self.over_decoding, self.multi_token) if head is not None]
        layers = [*([self.embedding] if first else []), *self.blocks.values(), *(heads if last else [])]
        self.forward_funcs = layers  # what DeepSpeed's checkpoints hold, one file per layer

    def _index_tied_modules(self) -> dict[str, Any]:
        """What DeepSpeed calls tied modules: the shared parts of the embedding, on the stages that hold them."""
        grid = self._process_grid
        ranks = grid.shape.pipe_ends(grid.shape.ranks_along(grid.rank, "pipe"))
        tied: dict[str, Any] = {}
        for part in self._layers.shared:  # in the same order on both ends
            module = getattr(self.embedding, part, None)
            if module is None:
                continue
            if not grid.is_first_stage:
                for parameter in module.parameters():
                    mark_tied_copy(parameter)
            names = [name for name, _ in module.named_parameters()]
            tied[part] = {"ranks": ranks, "group": grid.ends_group, "weight_attr": names, "module": module}
        return tied

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        """Broadcast what loading a checkpoint read on the first stage. Without autograd, which would record the broadcast."""
        super()._synchronize_tied_weights()

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """The weights whose gradients the engine sums over both ends.

        DeepSpeed's form looks in `tied_modules`; registering a part there as well would change the names of its parameters.
        """
        return [
            (comm["module"].get_parameter(name), comm["group"])
            for comm in self.tied_comms.values()
            for name in comm["weight_attr"]
        ]

    def _copies_beside_the_head(self) -> list[nn.Parameter]:
        """Copies on the last stage that the head does not hold itself, so that a backward pass may leave them out."""
        if self._process_grid.is_first_stage or self.embedding is None or self.head is None:
            return []
        of_head = {id(parameter) for parameter in self.head.parameters()}
        return [parameter for parameter in self.embedding.parameters() if id(parameter) not in of_head]

    def expect(self, batches: Sequence[MicroBatch]) -> None:
        """Announce the micro-batches to come; every stage runs them in this order."""
        self._expected = deque(batches)
        self._results = StageResults([], [], [])

    def forward(self, x: Any) -> Tensor:
        """Run this stage's layers on what the engine hands over; the last stage returns the loss.

        The loss is part of the forward pass instead of DeepSpeed's `loss_fn` after it: with bf16 the engine clears gradients
        when backward reaches the module's output, which would lose the gradients of what ran after it.
        """
        batch = self._expected.popleft()
        documents = None if self._eod_id is None else Documents(document_ids(batch.full_inputs, self._eod_id))
        if self._process_grid.is_first_stage:
            assert self.embedding is not None
            x = self.embedding(x, batch.fetched)
        hidden, routing = run_blocks(self.blocks.values(), x, documents=documents)
        if self.head is None:
            return self._with_router_loss(hidden, routing)
        result = self.forward_losses(hidden, batch, routing, documents)
        self._results.add(result.main_loss, result.router_stats, result.auxiliary_losses)
        objective = with_own_kind_of_gradient(result.objective) if self.training else result.objective
        return self._with_all_copies(objective / batch.targets.numel())

    def forward_losses(
        self, hidden: Tensor, batch: MicroBatch, routing: Routing | None, documents: Documents | None
    ) -> ForwardResult:
        """The losses of a micro-batch, on the last stage. routing: of this stage's blocks."""
        assert self.head is not None
        z_loss_weight = self._z_loss_weight if self.training else 0.0
        heads = self._layers.later_heads(batch.later, batch.fetched, documents)
        return self.head.forward_losses(
            hidden, batch.targets, z_loss_weight=z_loss_weight, routing=routing, later_heads=heads
        )

    def _with_router_loss(self, hidden: Tensor, routing: Routing | None) -> Tensor:
        """What a stage without the head hands on; backward through it adds the gradient of the routers' losses."""
        if routing is None:
            return hidden
        tensor_group = self._process_grid.tensor_group if self._sequence_parallel else None
        router_loss = reduce_from_group(routing.loss.detach(), tensor_group)  # as the head does for its own stage
        self._results.add(None, routing.stats, {"router": router_loss})
        slices = self._process_grid.shape.tensor if self._sequence_parallel else 1
        tokens = hidden.shape[0] * hidden.shape[1] * slices
        # As the objective of the last stage, which is divided by the tokens there, and by the micro-batches in DeepSpeed.
        share = 1.0 / (tokens * self._num_micro_batches)
        with_gradient: Tensor = _AddLossGradient.apply(hidden, routing.loss, share)
        return with_gradient

    def _with_all_copies(self, objective: Tensor) -> Tensor:
        """The same objective, whose backward in the last micro-batch of a step gives every copy on this stage a gradient.

        The sum over both ends is a collective: where a copy took part in no backward pass of the step and had none, the
        other end would wait for ever, or with bf16 DeepSpeed would fail.
        """
        copies = self._copies_beside_the_head()
        if self._expected or not copies or not torch.is_grad_enabled():
            return objective
        covered: Tensor = _WithZeroGradients.apply(objective, *copies)
        return covered

    def take_results(self) -> StageResults:
        """What the micro-batches since `expect` gave."""
        assert not self._expected, "micro-batches that never arrived"
        results, self._results = self._results, StageResults([], [], [])
        return results

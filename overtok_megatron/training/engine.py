"""DeepSpeed around the model, the tables around DeepSpeed: one training step, one evaluation. Knows no files, no logs.

Only this file and pipeline.py import deepspeed. Shapes: A micro-batches of a step, b micro batch, s sequence, T tables.
"""

import contextlib
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.config import deepspeed_config, derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import DivergedError
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.model.assembly import build_run_layers, build_transformer
from overtok_megatron.model.transformer import Stage, Transformer
from overtok_megatron.ngram.building import build_tables
from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.ngram.sharded_tables import RowGradients, ShardedTables
from overtok_megatron.parallel.collectives import named
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.training.deepspeed.checkpoint_files import EngineFiles
from overtok_megatron.training.deepspeed.joint_norm import JointNorm, StepNorms
from overtok_megatron.training.deepspeed.optimizer_state import load_engine_file
from overtok_megatron.training.deepspeed.pipeline_stage import MicroBatch, PipelineStage, StageResults
from overtok_megatron.training.deepspeed.topology import DeepSpeedTopology
from overtok_megatron.training.routing import RouterFigures


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did, the same on every rank. Norms are before clipping; loss is the mean cross entropy.

    stop: some rank was asked to stop after this step. router: figures of experts' routers by name (routing.py).
    """

    loss: float
    grad_norm: float
    table_grad_norm: float
    stop: bool
    unique_rows: int
    looked_up_rows: int
    exchange_bytes: int
    router: dict[str, float]


class TrainingEngine:
    """A model in training: dense parameters under DeepSpeed, tables beside it."""

    def __init__(self, config: RunConfig, grid: ProcessGrid, device: torch.device, eod_id: int) -> None:
        self.config = config
        self.grid = grid
        self.device = device
        self.stop_asked = False
        self.num_micro_batches = derived.accumulation_steps(config, grid.shape.world_size)
        self.kernels = choose_kernels(config.training.kernels, device)
        model = self._build_model(eod_id)
        self.tables: ShardedTables | None = None
        if config.over_encoding.enabled:
            shape = grid.shape  # the ranks that see a sequence divide it among them: context slices, then tensor slices
            own_slice = grid.place("context") * shape.tensor + grid.tensor_rank, shape.context * shape.tensor
            self.tables = build_tables(
                config,
                eod_id,
                device=device,
                kernels=self.kernels,
                group=grid.table_group,
                sequence_slice=own_slice,
            )
        self.router = RouterFigures(config, grid, device)
        self.optimizer = self._build_optimizer(model)
        self.engine = self._start_deepspeed(model)
        if type(self.engine.optimizer).__name__.startswith("FP16_"):
            # These two step once on zero gradients to make Adam's state, which would put its bias correction a step ahead.
            self.optimizer.state.clear()
        self.model: Transformer | PipelineStage = self.engine.module
        self.engine.checkpoint_engine = self.engine_files = EngineFiles(self.engine.checkpoint_engine, load_engine_file)
        self.norm = JointNorm(self.engine, grid, config.optimizer.gradient_clipping)

    def _start_deepspeed(self, model: Transformer | PipelineStage) -> Any:
        """DeepSpeed's engine. Raises ConfigError where it cannot read what the user's `deepspeed` section adds."""
        config, grid = self.config, self.grid
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory at every turn
                return deepspeed.initialize(
                    model=model,
                    optimizer=self.optimizer,
                    config=deepspeed_config.derive(config, grid.shape.world_size),
                    mpu=None if grid.shape.pipe > 1 else DeepSpeedTopology(grid),
                    dist_init_required=False,
                )[0]
        except Exception as error:  # DeepSpeed's reader raises errors of any kind
            if not config.deepspeed or isinstance(error, RuntimeError | OSError | MemoryError):
                raise
            raise deepspeed_config.refused_by_deepspeed(config, error) from error

    def _build_model(self, eod_id: int) -> Transformer | PipelineStage:
        config, grid = self.config, self.grid
        groups: dict[str, Any] = {
            "kernels": self.kernels,
            "group": grid.tensor_group,
            "context_group": grid.context_group,
        }
        if grid.shape.pipe == 1:
            return build_transformer(config, device=self.device, eod_id=eod_id, **groups)
        counts = derived.blocks_per_stage(config)
        layers = build_run_layers(config, device=self.device, stage=Stage.of(grid.place("pipe"), counts), **groups)
        return PipelineStage(
            layers,
            counts,
            grid,
            tied=config.model.tie_word_embeddings,
            z_loss=config.training.z_loss,
            num_micro_batches=self.num_micro_batches,
            sequence_parallel=config.parallel.sequence_parallel,
            eod_id=eod_id if config.data.document_attention == "within" else None,
        )

    def _build_optimizer(self, model: Transformer | PipelineStage) -> torch.optim.Optimizer:
        """Weight decay on matrices; not on norms, nor on the word embedding unless it is the head as well (OLMo2)."""
        settings = self.config.optimizer
        word = None if model.embedding is None else model.embedding.word.weight
        free = [
            p for p in model.parameters() if p.ndim < 2 or (p is word and not self.config.model.tie_word_embeddings)
        ]
        spared = {id(parameter) for parameter in free}
        decayed = [parameter for parameter in model.parameters() if id(parameter) not in spared]
        groups = [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in ((decayed, settings.weight_decay), (free, 0.0))
            if parameters  # a stage may hold only an embedding, and DeepSpeed flattens no empty group
        ]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.optimizer_order = [names[id(parameter)] for parameter in [*decayed, *free]]
        adamw = self.kernels.choose_adamw(offloaded=self.config.parallel.offload_optimizer == "cpu")
        # step() sets the rate; until then it is 0, so that nothing DeepSpeed does at start moves a weight
        return adamw(groups, 0.0, settings.betas, settings.eps)

    def step(self, tokens: Tensor, learning_rate: float) -> StepResult:
        """One optimizer step on this pipeline's tokens [A, b, s + 1] int64.

        Raises DivergedError, on every rank, where the gradient norm is not finite; nothing of this state is to be saved.
        """
        assert tokens.shape[0] == self.num_micro_batches
        # 1. Fetch the rows of all micro-batches: the only exchange of rows in this step.
        inputs, targets = tokens[..., :-1], tokens[..., 1:]  # [A, b, s]
        fetched = self._fetch_rows(inputs)
        batches = self._micro_batches(inputs, targets, fetched)

        # 2. Forward and backward of all micro-batches. 3. Reduce gradients and 4. clip and update the dense parameters:
        # DeepSpeed does both behind the last backward pass, and row gradients are sent to their owners within it, when its
        # norm asks for their share (deepspeed/joint_norm.py calls `reduce_rows`).
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.norm.begin_step(partial(self._reduce_rows, fetched))
        results = self._train_pipeline(batches) if self.is_pipeline else self._train(batches)
        norms = self.norm.finish_step()
        if not math.isfinite(norms.joint):
            raise DivergedError(
                f"gradient norm is {norms.joint} at optimizer step {self.engine.global_steps}: stopped before"
                " a checkpoint could be written; lower optimizer.learning_rate or resume from the last one"
            )

        # 4. Update the rows, clipped by the same norm.
        if self.tables is not None and norms.rows is not None:
            rate = learning_rate * derived.table_rate_factor(self.config)
            self.tables.update_rows(norms.rows, rate, norms.clip_factor)

        # 5. Report: one small reduction over all ranks.
        return self._reduce_metrics(results, self._table_counts(fetched), norms)

    def prefetch(self, tokens: Tensor) -> None:
        """Announce the tokens [A, b, s + 1] of a coming step, in the order of the steps, where rows are fetched ahead."""
        if self.tables is not None:
            self.tables.announce(self._looked_up(tokens[..., :-1]))

    @property
    def is_pipeline(self) -> bool:
        return self.grid.shape.pipe > 1

    def _looked_up(self, inputs: Tensor) -> Tensor | None:
        """Those tokens whose n-grams this rank looks up: all inputs [A, b, s] on the first stage, none elsewhere."""
        return inputs if self.grid.is_first_stage else None

    def _fetch_rows(self, inputs: Tensor, *, training: bool = True) -> FetchedRows | None:
        """Fetch the rows of all micro-batches, for which every rank is needed; None without tables."""
        if self.tables is None:
            return None
        return self.tables.fetch_rows(self._looked_up(inputs), training=training)

    def _reduce_rows(self, fetched: FetchedRows | None) -> RowGradients | None:
        """Send row gradients to their owners: the mean over the ranks with other tokens, of a loss that is the mean over the
        micro-batches already."""
        if self.tables is None or fetched is None:
            return None
        return self.tables.reduce_gradients(fetched, 1.0 / (self.grid.shape.data * self.grid.shape.context))

    def _micro_batches(self, inputs: Tensor, targets: Tensor, fetched: FetchedRows | None) -> list[MicroBatch]:
        """By micro-batch what this rank handles of inputs and targets [A, b, s], which are those of all context ranks."""
        ranks, place = self.grid.shape.context, self.grid.place("context")
        own = fetched if self.grid.is_first_stage else None
        return [
            MicroBatch(whole, whole.chunk(ranks, dim=-1)[place], None if own is None else own[i], target)
            for i, (whole, target) in enumerate(zip(inputs, targets.chunk(ranks, dim=-1)[place], strict=True))
        ]

    def _train(self, batches: list[MicroBatch]) -> StageResults:
        """Forward and backward of all micro-batches; DeepSpeed reduces, clips and updates behind the last of them."""
        results = StageResults([], [])
        for batch in batches:
            result = self.engine(batch.inputs, batch.fetched, batch.targets, self.config.training.z_loss)
            self.engine.backward(result.objective / batch.targets.numel())
            self.engine.step()
            results.add(result.main_loss, result.router_stats)
        return results

    def _train_pipeline(self, batches: list[MicroBatch]) -> StageResults:
        """As `_train`, through all stages."""
        assert isinstance(self.model, PipelineStage)
        self.model.expect(batches)
        self.engine.train_batch(iter([(batch.inputs, batch.targets) for batch in batches]))
        return self.model.take_results()

    def _evaluate_pipeline(self, batches: list[MicroBatch]) -> StageResults:
        assert isinstance(self.model, PipelineStage)
        self.engine.reset_activation_shape()  # its buffers remember the last batch's
        self.model.expect(batches)
        pairs = iter([(batch.inputs, batch.targets) for batch in batches])
        self.engine.eval_batch(pairs, num_micro_batches=len(batches), reduce_output=None, bcast_loss=False)
        return self.model.take_results()

    def _table_counts(self, fetched: FetchedRows | None) -> list[int]:
        """This rank's distinct rows, look-ups, and bytes sent."""
        if self.tables is None or fetched is None:
            return [0, 0, 0]
        return [fetched.rows.count, fetched.slots.numel(), self.tables.payload_bytes(fetched)]

    def _reduce_metrics(self, results: StageResults, counts: list[int], norms: StepNorms) -> StepResult:
        """The step's metrics over all ranks, and whether any of them was asked to stop: one small reduction."""
        tokens = self.config.training.global_batch_size * self.config.data.seq_length
        stop = float(self.stop_asked)
        own = torch.tensor([self._own_loss(results.losses), stop, *counts], dtype=torch.float64, device=self.device)
        values = torch.cat([own, self.router.own(results.router_stats)])
        self._sum_over_ranks(values)
        values = values.cpu()
        total, stops, unique, looked_up, sent = values[: own.numel()].tolist()
        return StepResult(
            loss=total / tokens,
            grad_norm=norms.joint,
            table_grad_norm=norms.tables,
            stop=stops > 0,
            unique_rows=int(unique),
            looked_up_rows=int(looked_up),
            exchange_bytes=int(sent),
            router=self.router.of_step(values[own.numel() :]),
        )

    def _own_loss(self, losses: list[Tensor]) -> float:
        """Tensor-parallel ranks of the last stage hold the same sums: the first one's count."""
        if not losses or self.grid.tensor_rank > 0:
            return 0.0
        return float(torch.stack(losses).double().sum())

    def _sum_over_ranks(self, values: Tensor) -> None:
        if self.grid.table_group is not None:  # the whole world
            with named("all-reduce of figures", self.grid.table_group):
                dist.all_reduce(values, group=self.grid.table_group)

    def dense_state(self) -> dict[str, Tensor]:
        """This tensor-parallel rank's dense weights by name, whole also under ZeRO 3; the tied head appears once."""
        if self.config.parallel.zero_stage < 3:
            return {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        state = {}
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter):
                state[name] = parameter.detach().cpu().clone()
        return state

    def ngram_norms(self, fetched: FetchedRows) -> dict[str, float]:
        """Mean L2 norms of what each n-gram order adds to the embedding, by metric name, on a stage that has the embedding."""
        assert self.tables is not None and self.model.embedding is not None
        projection = self.model.embedding.over_encoding
        assert projection is not None
        norms = projection.order_norms(fetched, self.tables.family.orders)
        return {f"tables/norm_{order}gram": norm for order, norm in norms.items()}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
        """Mean cross entropy and the number of scored tokens over batches of (inputs, targets) [b, s] int64.

        Every rank must bring batches of the same shapes; a target of -100 is not scored.
        """
        self.engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for group in _alike(batches, self.grid.shape.pipe):  # as many at once as keep every stage busy
            inputs, targets = (torch.stack(tensors) for tensors in zip(*group, strict=True))
            batches_here = self._micro_batches(inputs, targets, self._fetch_rows(inputs, training=False))
            losses = (
                self._evaluate_pipeline(batches_here).losses
                if self.is_pipeline
                else [self.engine(batch.inputs, batch.fetched, batch.targets).main_loss for batch in batches_here]
            )
            if losses and self.grid.tensor_rank == 0:
                count = torch.stack([(batch.targets >= 0).sum() for batch in batches_here]).sum()
                sums += torch.stack([torch.stack(losses).double().sum(), count.double()])
        self.engine.train()
        if self.is_pipeline:
            self.engine.reset_activation_shape()
        self._sum_over_ranks(sums)
        total, count = sums.tolist()
        return total / count, int(count)


def _alike(batches: Iterable[tuple[Tensor, Tensor]], most: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Batches of one shape that follow each other, up to `most` at once."""
    for _, same in groupby(batches, key=lambda batch: batch[0].shape):
        while group := list(islice(same, most)):
            yield group

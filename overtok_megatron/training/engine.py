"""DeepSpeed around the model, the tables around DeepSpeed: one training step, one evaluation. Knows no files, no logs.

Only this file and pipeline.py import deepspeed. Shapes: A micro-batches of a step, b micro batch, s sequence, T tables.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.config import deepspeed_config, derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import DivergedError
from overtok_megatron.kernels.choice import choose_adamw
from overtok_megatron.model.assembly import build_run_layers, build_transformer
from overtok_megatron.ngram.building import build_tables
from overtok_megatron.model.transformer import Stage, Transformer
from overtok_megatron.ngram.sharded_tables import ShardedTables
from overtok_megatron.parallel.collectives import named
from overtok_megatron.parallel.devices import backend_of
from overtok_megatron.parallel.grid import GridShape, ProcessGrid
from overtok_megatron.training.deepspeed.topology import DeepSpeedTopology
from overtok_megatron.training.deepspeed.joint_norm import JointNorm
from overtok_megatron.training.deepspeed.optimizer_state import load_engine_file
from overtok_megatron.training.deepspeed.checkpoint_files import EngineFiles
from overtok_megatron.training.deepspeed.pipeline_stage import PipelineStage
from overtok_megatron.training.routing import RouterFigures

MicroBatch = tuple[Tensor, Tensor | None, Tensor]  # inputs, slots, targets


def start_processes(config: RunConfig, device: torch.device) -> ProcessGrid:
    """Join the process group that the launcher described, over the backend of the run's device, and build the grid."""
    # DeepSpeed logs much and calls collectives by old names; neither concerns a user.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    # DeepSpeed would compile a shared-memory all-reduce (half a minute, and a compiler) that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = deepspeed.accelerator.get_accelerator().device_name().split(":")[0]
    assert accelerator == device.type, f"DeepSpeed was imported for {accelerator}, the run is on {device}"
    deepspeed.init_distributed(dist_backend=backend_of(device), verbose=False)
    parallel = config.parallel
    shape = GridShape(
        pipe=parallel.pipeline_parallel_size,
        data=derived.data_parallel_size(config, dist.get_world_size()),
        context=parallel.context_parallel_size,
        model=parallel.tensor_parallel_size,
    )
    return ProcessGrid.create(shape)


@dataclass(frozen=True)
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
        self.micro_batches = derived.accumulation_steps(config, grid.shape.world_size)
        model = self._build_model(eod_id)
        encoder = None if model.embedding is None else model.embedding.over_encoding
        self.tables: ShardedTables | None = None
        if config.over_encoding.enabled:
            shape = grid.shape  # the ranks that see a sequence divide it among them: context slices, then tensor slices
            own_slice = grid.place("context") * shape.tensor + grid.tensor_rank, shape.context * shape.tensor
            self.tables = build_tables(
                config, encoder, eod_id, device=device, group=grid.table_group, sequence_slice=own_slice
            )
        self.router = RouterFigures(config, grid, device)
        self.optimizer = self._build_optimizer(model)
        self.engine = self._start_deepspeed(model)
        if type(self.engine.optimizer).__name__.startswith("FP16_"):
            # These two step once on zero gradients to make Adam's state, which would put its bias correction a step ahead.
            self.optimizer.state.clear()
        self.model: Transformer | PipelineStage = self.engine.module
        self.engine.checkpoint_engine = self.engine_files = EngineFiles(self.engine.checkpoint_engine, load_engine_file)
        table_square = None if self.tables is None else self._collect_tables
        self.norm = JointNorm(self.engine, grid, config.optimizer.gradient_clipping, table_square)

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
        groups = {"group": grid.tensor_group, "context_group": grid.context_group}
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
            micro_batches=self.micro_batches,
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
        offloaded = self.config.parallel.offload_optimizer == "cpu"
        adamw = choose_adamw(self.config.training.kernels, self.device, offloaded=offloaded)
        # step() sets the rate; until then it is 0, so that nothing DeepSpeed does at start moves a weight
        return adamw(groups, 0.0, settings.betas, settings.eps)

    def _collect_tables(self) -> Tensor:
        assert self.tables is not None
        # The loss is already divided by the micro-batches; the mean over the ranks with other tokens is still to be taken.
        return self.tables.collect(1.0 / (self.grid.shape.data * self.grid.shape.context))

    def step(self, tokens: Tensor, learning_rate: float) -> StepResult:
        """One optimizer step on this pipeline's tokens [A, b, s + 1] int64.

        Raises DivergedError, on every rank, where the gradient norm is not finite; nothing of this state is to be saved.
        """
        assert tokens.shape[0] == self.micro_batches
        inputs, targets = tokens[..., :-1], tokens[..., 1:]  # [A, b, s]
        slots = self._begin(inputs)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        parts = self._parts(inputs, slots, targets)
        if self.is_pipeline:
            scored, routed = self._train_pipeline(inputs, parts)
        else:
            done = [self._micro_batch(*part) for part in parts]
            scored = [cross_entropy for cross_entropy, _ in done]
            routed = [figures for _, figures in done if figures is not None]
        grad_norm, table_norm, factor = self.norm.finish()
        if not torch.isfinite(torch.tensor(grad_norm)):
            raise DivergedError(
                f"gradient norm is {grad_norm} at optimizer step {self.engine.global_steps}: stopped before"
                " a checkpoint could be written; lower optimizer.learning_rate or resume from the last one"
            )
        counts = [0, 0, 0]
        if self.tables is not None:
            counts = self._table_counts(slots)
            self.tables.apply(learning_rate * derived.table_rate_factor(self.config), factor)
        return self._joined(scored, routed, counts, grad_norm, table_norm)

    def prefetch(self, tokens: Tensor) -> None:
        """Announce the tokens [A, b, s + 1] of a coming step, in the order of the steps, where rows are fetched ahead."""
        if self.tables is not None:
            self.tables.prefetch(tokens[..., :-1] if self.grid.is_first_stage else None)

    @property
    def is_pipeline(self) -> bool:
        return self.grid.shape.pipe > 1

    def _begin(self, inputs: Tensor, *, training: bool = True) -> Tensor | None:
        """Fetch the rows of all micro-batches, for which every rank is needed; slots on the first stage, else None."""
        if self.tables is None:
            return None
        first = self.grid.is_first_stage
        slots = self.tables.begin(inputs if first else None, training=training)
        return slots if first else None

    def _parts(self, inputs: Tensor, slots: Tensor | None, targets: Tensor) -> list[MicroBatch]:
        """By micro-batch, and of inputs and targets [A, b, s] what this context-parallel rank handles: [b, s / ranks]."""
        ranks, place = self.grid.shape.context, self.grid.place("context")
        inputs, targets = inputs.chunk(ranks, dim=-1)[place], targets.chunk(ranks, dim=-1)[place]
        return [(inputs[i], None if slots is None else slots[i], targets[i]) for i in range(inputs.shape[0])]

    def _micro_batch(self, inputs: Tensor, slots: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Forward and backward of one micro-batch, the optimizer's step after the last; its summed cross entropy, and
        figures of its routers."""
        objective, cross_entropy, figures = self.engine(inputs, slots, targets, self.config.training.z_loss)
        self.engine.backward(objective / targets.numel())
        self.engine.step()
        return cross_entropy, figures

    def _train_pipeline(self, whole: Tensor, parts: list[MicroBatch]) -> tuple[list[Tensor], list[Tensor]]:
        """All micro-batches through the stages and the optimizer's step; summed cross entropies, on the last stage, and
        figures of this stage's routers.

        whole [A, b, s]: the inputs of all context ranks.
        """
        assert isinstance(self.model, PipelineStage)
        self.engine.train_batch(self._fed(whole, parts))
        return self.model.take_scored(), self.model.take_routed()

    def _evaluate_pipeline(self, whole: Tensor, parts: list[MicroBatch]) -> list[Tensor]:
        assert isinstance(self.model, PipelineStage)
        batches = self._fed(whole, parts)
        self.engine.eval_batch(batches, num_micro_batches=len(parts), reduce_output=None, bcast_loss=False)
        return self.model.take_scored()

    def _fed(self, whole: Tensor, parts: list[MicroBatch]) -> Iterator[Any]:
        """What the engine's ends ask for, a micro-batch each: ((tokens, slots), targets). The stage is told the rest here."""
        assert isinstance(self.model, PipelineStage)
        self.model.expect([(tokens, target) for tokens, (*_, target) in zip(whole, parts, strict=True)])
        return iter([((tokens,) if slot is None else (tokens, slot), target) for tokens, slot, target in parts])

    def _table_counts(self, slots: Tensor | None) -> list[int]:
        """This rank's unique rows, rows looked up, and bytes sent."""
        assert self.tables is not None and self.tables.last_plan is not None
        plan = self.tables.last_plan
        return [plan.count, 0 if slots is None else slots.numel(), self.tables.payload_bytes(plan)]

    def _joined(
        self, scored: list[Tensor], routed: list[Tensor], counts: list[int], grad_norm: float, table_norm: float
    ) -> StepResult:
        """The step's figures over all ranks, and whether any of them was asked to stop: one small reduction."""
        tokens = self.config.training.global_batch_size * self.config.data.seq_length
        stop = float(self.stop_asked)
        own = torch.tensor([self._own_loss(scored), stop, *counts], dtype=torch.float64, device=self.device)
        values = torch.cat([own, self.router.own(routed)])
        self._sum_over_ranks(values)
        values = values.cpu()
        total, stops, unique, looked_up, sent = values[: own.numel()].tolist()
        router = self.router.of_step(values[own.numel() :])
        return StepResult(
            total / tokens, grad_norm, table_norm, stops > 0, int(unique), int(looked_up), int(sent), router
        )

    def _own_loss(self, scored: list[Tensor]) -> float:
        """Tensor-parallel ranks of the last stage hold the same sums: the first one's count."""
        if not scored or self.grid.tensor_rank > 0:
            return 0.0
        return float(torch.stack(scored).double().sum())

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

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
        """Mean cross entropy and the number of scored tokens over batches of (inputs, targets) [b, s] int64.

        Every rank must bring batches of the same shapes; a target of -100 is not scored.
        """
        self.engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for group in _alike(batches, self.grid.shape.pipe):  # as many at once as keep every stage busy
            if self.is_pipeline:
                self.engine.reset_activation_shape()  # its buffers remember the last batch's
            inputs, targets = (torch.stack(tensors) for tensors in zip(*group, strict=True))
            parts = self._parts(inputs, self._begin(inputs, training=False), targets)
            scored = (
                self._evaluate_pipeline(inputs, parts)
                if self.is_pipeline
                else [self.engine(*part)[1] for part in parts]
            )
            if scored and self.grid.tensor_rank == 0:
                count = torch.stack([(target >= 0).sum() for *_, target in parts]).sum()
                sums += torch.stack([torch.stack(scored).double().sum(), count.double()])
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

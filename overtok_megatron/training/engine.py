"""DeepSpeed around the model, the tables around DeepSpeed: one training step, one evaluation. Knows no files, no logs.

The only file that imports deepspeed. Shapes: A micro-batches of a step, b micro batch, s sequence, T tables.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from overtok_megatron.config import deepspeed_config, derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import OvertokError
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.model.assembly import build_tables, build_transformer
from overtok_megatron.model.transformer import Transformer
from overtok_megatron.ngram.embedding import OverTables
from overtok_megatron.parallel.grid import GridShape, ProcessGrid
from overtok_megatron.parallel.topology import DeepSpeedTopology
from overtok_megatron.training.clipping import JointNorm
from overtok_megatron.training.engine_files import EngineFiles

# Classes that DeepSpeed pickles into its checkpoints and that hold plain numbers only.
_PLAIN_CLASSES: list[Any] = [LossScaler, ZeroStageEnum, fragment_address, np.dtype, np.ndarray]


def start_processes(tensor_parallel_size: int) -> ProcessGrid:
    """Join the process group that the launcher described, and build the grid."""
    # DeepSpeed logs much and calls collectives by old names; neither concerns a user.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    # DeepSpeed would compile a shared-memory all-reduce (half a minute, and a compiler) that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    world = dist.get_world_size()
    return ProcessGrid.create(GridShape(pipe=1, data=world // tensor_parallel_size, model=tensor_parallel_size))


def local_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank. Norms are before clipping; loss is the mean cross entropy."""

    loss: float
    grad_norm: float
    table_grad_norm: float
    unique_rows: int
    looked_up_rows: int
    exchange_bytes: int


class TrainingEngine:
    """A model in training: dense parameters under DeepSpeed, tables beside it."""

    def __init__(self, config: RunConfig, grid: ProcessGrid, device: torch.device, eod_id: int) -> None:
        self.config = config
        self.grid = grid
        self.device = device
        self.micro_batches = derived.accumulation_steps(config, grid.shape.world_size)
        model = build_transformer(config, device=device, group=grid.tensor_group)
        self.tables: OverTables | None = None
        if config.over_encoding.enabled:
            tensor_slice = (grid.tensor_rank, grid.shape.model)
            self.tables = build_tables(
                config, model, eod_id, device=device, group=grid.table_group, sequence_slice=tensor_slice
            )
        self.optimizer = self._build_optimizer(model)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory at every turn
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=deepspeed_config.derive(config, grid.shape.world_size),
                mpu=DeepSpeedTopology(grid),
                dist_init_required=False,
            )
        if type(self.engine.optimizer).__name__.startswith("FP16_"):
            # These two step once on zero gradients to make Adam's state, which would put its bias correction a step ahead.
            self.optimizer.state.clear()
        self.model: Transformer = self.engine.module
        self.engine.checkpoint_engine = self.engine_files = EngineFiles(self.engine.checkpoint_engine, _PLAIN_CLASSES)
        table_square = None if self.tables is None else self._collect_tables
        self.norm = JointNorm(self.engine, grid, config.optimizer.gradient_clipping, table_square)

    def _build_optimizer(self, model: Transformer) -> torch.optim.Optimizer:
        """Weight decay on matrices; not on norms, nor on the word embedding unless it is the head as well (OLMo2)."""
        settings = self.config.optimizer
        word = model.embedding.word.weight
        free = [
            p for p in model.parameters() if p.ndim < 2 or (p is word and not self.config.model.tie_word_embeddings)
        ]
        spared = {id(parameter) for parameter in free}
        decayed = [parameter for parameter in model.parameters() if id(parameter) not in spared]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ]
        kernels = choose_kernels(self.config.training.kernels, self.device)
        # step() sets the rate; until then it is 0, so that nothing DeepSpeed does at start moves a weight
        return kernels.adamw(groups, 0.0, settings.betas, settings.eps)

    def _collect_tables(self) -> Tensor:
        assert self.tables is not None
        # The loss is already divided by the micro-batches; the mean over data-parallel ranks is still to be taken.
        return self.tables.collect(1.0 / self.grid.shape.data)

    def step(self, tokens: Tensor, learning_rate: float) -> StepResult:
        """One optimizer step on this rank's tokens [A, b, s + 1] int64.

        Raises OvertokError where the gradient norm is not finite; nothing is saved after that.
        """
        assert tokens.shape[0] == self.micro_batches
        inputs, targets = tokens[..., :-1], tokens[..., 1:]  # [A, b, s]
        slots = None if self.tables is None else self.tables.begin(inputs)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        per_micro_batch = targets[0].numel()
        for index in range(self.micro_batches):
            micro_slots = None if slots is None else slots[index]
            objective, cross_entropy = self.engine(
                inputs[index], micro_slots, targets[index], self.config.training.z_loss
            )
            total += cross_entropy / per_micro_batch
            self.engine.backward(objective / per_micro_batch)
            if index == self.micro_batches - 1:
                self.norm.clip_before_step()
            self.engine.step()
        grad_norm, table_norm, factor = self.norm.finish()
        if not torch.isfinite(torch.tensor(grad_norm)):
            raise OvertokError(
                f"gradient norm is {grad_norm} at optimizer step {self.engine.global_steps}: stopped before"
                " a checkpoint could be written; lower optimizer.learning_rate or resume from the last one"
            )
        counts = (0, 0, 0)
        if self.tables is not None:
            counts = self._table_counts(slots)
            self.tables.apply(learning_rate * self.config.over_encoding.learning_rate_factor, factor)
        return StepResult(self._mean_loss(total / self.micro_batches), grad_norm, table_norm, *counts)

    def _table_counts(self, slots: Tensor | None) -> tuple[int, int, int]:
        assert self.tables is not None and self.tables.last_plan is not None and slots is not None
        plan = self.tables.last_plan
        sent = self.tables.exchange.payload_bytes(plan, 4 * self.tables.shard.weight.shape[1])
        counts = torch.tensor([plan.unique.numel(), slots.numel(), sent], dtype=torch.int64, device=self.device)
        if self.grid.table_group is not None:
            dist.all_reduce(counts, group=self.grid.table_group)
        unique, looked_up, sent = counts.tolist()
        return unique, looked_up, sent

    def _mean_loss(self, loss: Tensor) -> float:
        if self.grid.data_group is not None:
            dist.all_reduce(loss, group=self.grid.data_group)
        return float(loss) / self.grid.shape.data

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

        Every rank must bring the same number of batches; a target of -100 is not scored.
        """
        self.engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for inputs, targets in batches:
            slots = None if self.tables is None else self.tables.begin(inputs.unsqueeze(0), training=False)[0]
            _, cross_entropy = self.engine(inputs, slots, targets)
            sums += torch.stack([cross_entropy.double(), (targets >= 0).sum().double()])
        self.engine.train()
        if self.grid.data_group is not None:
            dist.all_reduce(sums, group=self.grid.data_group)
        total, count = sums.tolist()
        return total / count, int(count)

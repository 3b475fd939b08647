"""DeepSpeed around the model, the tables around DeepSpeed: one training step, one evaluation. Knows no files, no logs.

Not here: what DeepSpeed does inside (deepspeed/), how the parts are built (building.py), the loop (trainer.py).
Shapes: A micro-batches per step, b micro batch, s sequence (whole; each context rank runs a slice of it), k further tokens of
the stream.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby, islice

import torch
from torch import Tensor

from overtok_megatron.config import derived
from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import DivergedError
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.model.heads import ForwardResult
from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.ngram.sharded_tables import RowGradients
from overtok_megatron.parallel.early_reads import EarlyReads
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.training.building import (
    TrainedModule,
    build_dropout,
    build_model,
    build_optimizer,
    build_own_tables,
    names_in_order,
)
from overtok_megatron.training.deepspeed.checkpoint_files import DeepSpeedFiles
from overtok_megatron.training.deepspeed.engine_object import dense_weights, steps_taken
from overtok_megatron.training.deepspeed.joint_norm import JointNorm
from overtok_megatron.training.deepspeed.leaving_out import forget_gradients, leave_out_non_finite_updates
from overtok_megatron.training.deepspeed.optimizers import adapter_of
from overtok_megatron.training.deepspeed.pipeline_stage import PipelineStage
from overtok_megatron.training.deepspeed.starting import start_deepspeed
from overtok_megatron.training.later_tokens import LaterTokensOfStep, LaterTokensReader, as_inputs
from overtok_megatron.training.micro_batch import MicroBatch, StageResults, with_own_kind_of_gradient
from overtok_megatron.training.phase_times import COMPUTE, EXCHANGE, ROW_UPDATE, UPDATE, PhaseTimes
from overtok_megatron.training.step_result import RowCounts, StepReduction, StepResult


class TrainingEngine:
    """A model in training: dense parameters under DeepSpeed, tables beside it.

    All ranks must call `step`, `evaluate` and `dense_weights` together. stop_asked: set it on any rank, and the result of the
    next step says `stop` on all. times: of the phases of this rank's steps. non_finite_micro_batches: after a step without an
    update, those of this rank with a loss that was not finite.
    """

    def __init__(self, config: RunConfig, grid: ProcessGrid, device: torch.device, eod_id: int) -> None:
        self.config = config
        self.grid = grid
        self.device = device
        self.stop_asked = False
        self.num_micro_batches = derived.accumulation_steps(config, grid.shape.world_size)
        kernels = choose_kernels(config.training.kernels, device)
        model = build_model(config, grid, device=device, kernels=kernels, eod_id=eod_id)
        self.tables = build_own_tables(config, grid, device=device, kernels=kernels, eod_id=eod_id)
        self.dropout = build_dropout(config, grid, self.tables, device)
        self.optimizer = build_optimizer(model, config, kernels)
        self.optimizer_order = names_in_order(model, self.optimizer)
        self.deepspeed_engine = start_deepspeed(model, self.optimizer, config, grid)
        self.model: TrainedModule = self.deepspeed_engine.module
        self.deepspeed_files = DeepSpeedFiles(self.deepspeed_engine)
        self.adapter = adapter_of(self.deepspeed_engine, grid, config.optimizer.gradient_clipping)
        if self.adapter.needs_state_reset:
            self.optimizer.state.clear()
        self.joint_norm = JointNorm(self.adapter, device)
        # Behind the hook in which the adapter of the torch optimizer computes the norm, so that the norm is known at the mark.
        early_reads = self.early_reads = EarlyReads(device)
        self.optimizer.register_step_pre_hook(lambda *_: early_reads.mark())
        times = self.times = PhaseTimes(device, _report_interval(config, grid))
        self.optimizer.register_step_pre_hook(lambda *_: times.enter(UPDATE))
        self.optimizer.register_step_post_hook(lambda *_: times.leave())
        self.skips_non_finite = config.training.non_finite == "skip"
        if self.skips_non_finite:
            leave_out_non_finite_updates(self.adapter)
        self.non_finite_micro_batches: list[int] = []
        self.later_tokens = LaterTokensReader(config, grid, device, eod_id)
        self.reduction = StepReduction(config, grid, device)

    @property
    def is_pipeline(self) -> bool:
        return self.grid.shape.pipe > 1

    @property
    def looks_up_rows(self) -> bool:
        """Whether this rank looks n-grams up, because layers of its stage read rows; every rank serves its own rows."""
        if self.tables is None:
            return False
        reads_here = {"embedding": self.grid.is_first_stage or self.num_later_inputs > 0}
        return reads_here[self.tables.family.readout]

    @property
    def num_later_inputs(self) -> int:
        """D, how many tokens after its inputs the layers of this stage read as inputs in training."""
        return self.config.multi_token_prediction.depth if self.grid.is_last_stage else 0

    @property
    def extra_tokens(self) -> int:
        """k, how many tokens of the stream beyond the inputs the heads need: the targets of the last position."""
        return 1 + derived.further_tokens(self.config)

    def inputs_and_targets(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of tokens [.., s + k], and of each the token that follows it, both [.., s] of whole sequences."""
        length = tokens.shape[-1] - self.extra_tokens
        return tokens[..., :length], tokens[..., 1 : length + 1]

    def announce(self, tokens: Tensor) -> None:
        """Tell the tables the tokens [A, b, s + k], in host memory, of a coming step: its exchange is planned meanwhile.

        Steps must be announced in the order in which they come. A step that was not announced is planned when it begins.
        """
        if self.tables is not None:
            self.tables.announce(self._looked_up(tokens), overlap=self.num_later_inputs)

    def step(self, tokens: Tensor, learning_rate: float, *, report_times: bool = False) -> StepResult:
        """One optimizer step on the tokens [A, b, s + k] int64 of this rank's copy of the model.

        report_times: whether the result has the times of all ranks since they were reported last; the same on all ranks.
        Where the joint gradient norm is not finite, and so also where the loss is not, raises DivergedError on every rank, and
        nothing of this state is to be saved; or with training.non_finite: skip no rank changes a weight, a row or a state.
        """
        assert tokens.shape[0] == self.num_micro_batches
        inputs, targets = self.inputs_and_targets(tokens)

        # Phase 1: take the rows, which are under way since the end of the last step where this one was announced. One exchange
        # serves all micro-batches; their forward passes gather without communication.
        fetched = None
        if self.tables is not None:
            with self.times.phase(EXCHANGE):
                fetched = self.tables.fetch_rows(self._looked_up(tokens), overlap=self.num_later_inputs, training=True)
            fetched = self._with_dropout(fetched)
            if self.config.training.train_only is not None:
                fetched.rows.without_gradients()
        later = self.later_tokens.read(tokens)
        micro_batches = self._micro_batches(inputs, targets, fetched, later)

        self._set_learning_rate(learning_rate)
        self.early_reads.begin_step()
        self.joint_norm.begin_step(reduce_rows=lambda: self._reduce_rows(fetched))

        # Phases 2, 3 and 4 START HERE: DeepSpeed runs them in one go, but for the update of rows.
        # Phase 2: forward and backward of every micro-batch. Gradients of dense parameters add up in DeepSpeed's buffers,
        # those of rows in the buffer of `fetched`.
        # Phase 3: reduce gradients. DeepSpeed averages dense gradients over the data and context ranks (ZeRO 2 and 3 in every
        # backward pass), and behind the last backward pass it computes its norm. That norm is patched (deepspeed/optimizers.py
        # calls joint_norm.py): INSIDE it `reduce_rows` sends row gradients to the owners of the rows, because clipping needs
        # one norm of dense parameters and rows.
        # Phase 4: DeepSpeed clips and updates the dense parameters. What is read of the step is known before the update, and is
        # read while a GPU still makes it (early_reads.py).
        with self.times.phase(COMPUTE):  # and within it UPDATE, and in `_reduce_rows` EXCHANGE
            results = self._train_pipeline(micro_batches) if self.is_pipeline else self._train(micro_batches)

        # Phase 3, read back: the norms, and the reduced gradients of the rows that this rank owns.
        with self.early_reads.stream():
            norms = self.joint_norm.finish_step()
        finite = math.isfinite(norms.joint)
        if not finite and not self.skips_non_finite:
            raise DivergedError(
                f"gradient norm is {norms.joint} at optimizer step {steps_taken(self.deepspeed_engine)}: stopped before"
                " a checkpoint could be written; lower optimizer.learning_rate or resume from the last one"
            )

        # Phase 5: report. One small reduction over all ranks. It comes before the update of rows, because the exchange that the
        # update starts waits for the device in the same communicator, and would keep the reduction waiting too.
        with self.early_reads.stream():
            result = self.reduction.reduce(
                results,
                self._row_counts(fetched),
                norms,
                stop_asked=self.stop_asked,
                own_times=self.times.take().numbers() if report_times else (),
                later_counts=None if later is None else later.own_counts,
            )

        # Phase 4, rows: clip by the factor that the dense parameters were clipped by, and update. The rows of the next step,
        # if it was announced, are then sent at once: they travel while the next step's tokens are taken.
        if not finite:
            self._leave_out(results)
        elif self.tables is not None and norms.row_gradients is not None:
            row_rate = learning_rate * derived.table_rate_factor(self.config)
            with self.times.phase(ROW_UPDATE):
                self.tables.update_rows(norms.row_gradients, row_rate, norms.clip_factor)
        if self.tables is not None:
            with self.times.phase(EXCHANGE):
                self.tables.start_next_fetch()
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
        """Mean cross entropy and the number of scored tokens over batches of (inputs, targets) [b, s] int64.

        Every rank must bring batches of the same shapes; a target of IGNORE_INDEX is not scored.
        """
        self.deepspeed_engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for group in _same_shapes(batches, self.grid.shape.pipe):  # as many at once as keep every stage busy
            inputs, targets = (torch.stack(tensors) for tensors in zip(*group, strict=True))
            micro_batches = self._micro_batches(inputs, targets, self._fetch_rows(inputs))
            losses = self._evaluate_pipeline(micro_batches) if self.is_pipeline else self._evaluate(micro_batches)
            if losses and self.grid.tensor_rank == 0:
                scored = torch.stack([(batch.targets != IGNORE_INDEX).sum() for batch in micro_batches]).sum()
                sums += torch.stack([torch.stack(losses).double().sum(), scored.double()])
        self.deepspeed_engine.train()
        if self.is_pipeline:
            self.deepspeed_engine.reset_activation_shape()
        total, count = self.reduction.sum_over_ranks(sums).tolist()
        return total / count, int(count)

    def dense_weights(self) -> dict[str, Tensor]:
        """This tensor-parallel rank's dense weights by name, whole also under ZeRO 3; the tied head appears once."""
        return dense_weights(self.deepspeed_engine)

    def _looked_up(self, tokens: Tensor) -> Tensor | None:
        """Of a step's tokens [A, b, s + k] those whose n-grams this rank's stage reads, [A, b, s + D]; None = it reads none."""
        if not self.looks_up_rows:
            return None
        length = tokens.shape[-1] - self.extra_tokens + self.num_later_inputs
        return as_inputs(tokens[..., :length])

    def _fetch_rows(self, inputs: Tensor) -> FetchedRows | None:
        """The rows of all micro-batches [A, b, s] of an evaluation; all ranks must call this. None without tables."""
        if self.tables is None:
            return None
        return self.tables.fetch_rows(inputs if self.looks_up_rows else None)

    def _with_dropout(self, fetched: FetchedRows) -> FetchedRows:
        """The rows of a training step, with the factors of look-ups that are dropped and of those that are kept."""
        if self.dropout is None or not self.looks_up_rows:
            return fetched
        step = steps_taken(self.deepspeed_engine)
        return replace(
            fetched, factors=self.dropout.factors(step, self.num_micro_batches, overlap=self.num_later_inputs)
        )

    def _micro_batches(
        self,
        inputs: Tensor,
        targets: Tensor,
        fetched: FetchedRows | None,
        later: LaterTokensOfStep | None = None,
    ) -> list[MicroBatch]:
        """This rank's part of each micro-batch of inputs and targets [A, b, s], which hold whole sequences."""
        num_slices, index = self.grid.shape.context, self.grid.coordinate("context")
        here = fetched if self.looks_up_rows else None
        # `targets` were shifted before this cut: the target of a slice's last position is the next slice's first token.
        own_targets = targets.chunk(num_slices, dim=-1)[index]
        later_of = dict(enumerate(later.micro_batches)) if later else {}
        return [
            MicroBatch(
                whole,
                whole.chunk(num_slices, dim=-1)[index],
                None if here is None else here[i],
                target,
                later_of.get(i),
            )
            for i, (whole, target) in enumerate(zip(inputs, own_targets, strict=True))
        ]

    def _set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the dense parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def _train(self, micro_batches: list[MicroBatch]) -> StageResults:
        """Phases 2, 3 and 4 of `step`, without a pipeline."""
        results = StageResults([], [], [])
        for batch in micro_batches:
            result = self._forward(batch)
            # The mean over the micro-batch's tokens. DeepSpeed divides it by the number of micro-batches, its
            # gradient_accumulation_steps. It averages dense gradients over ranks by the end of the last call.
            objective = with_own_kind_of_gradient(result.objective)
            self.deepspeed_engine.backward(objective / batch.targets.numel())
            # Only the last call does anything: it computes the norm, which exchanges ROW GRADIENTS, clips and updates.
            self.deepspeed_engine.step()
            results.add(result.main_loss, result.router_stats, result.auxiliary_losses)
        return results

    def _train_pipeline(self, micro_batches: list[MicroBatch]) -> StageResults:
        """Phases 2, 3 and 4 of `step`, through all stages of a pipeline."""
        assert isinstance(self.model, PipelineStage)
        self.model.expect(micro_batches)
        # Forward and backward of all micro-batches, divided by their number as in `_train`; then the average over ranks; then
        # the norm, which exchanges ROW GRADIENTS; then clipping and update.
        self.deepspeed_engine.train_batch(_tensors(micro_batches))
        return self.model.take_results()

    def _evaluate(self, micro_batches: list[MicroBatch]) -> list[Tensor]:
        """The summed cross entropy of each micro-batch."""
        return [self._forward(batch).main_loss for batch in micro_batches]

    def _forward(self, batch: MicroBatch) -> ForwardResult:
        """The model's losses of a micro-batch, without a pipeline."""
        result: ForwardResult = self.deepspeed_engine(
            batch.inputs, batch.fetched, batch.targets, full_tokens=batch.full_inputs, later=batch.later
        )
        return result

    def _evaluate_pipeline(self, micro_batches: list[MicroBatch]) -> list[Tensor]:
        """As `_evaluate`, on the last stage; nothing on other stages."""
        assert isinstance(self.model, PipelineStage)
        self.deepspeed_engine.reset_activation_shape()  # its buffers remember the shape of the batches before
        self.model.expect(micro_batches)
        self.deepspeed_engine.eval_batch(
            _tensors(micro_batches), num_micro_batches=len(micro_batches), reduce_output=None, bcast_loss=False
        )
        return self.model.take_results().main_losses

    def _reduce_rows(self, fetched: FetchedRows | None) -> RowGradients | None:
        """Send row gradients to their owners; all ranks must call this.

        Gradients are of the mean over micro-batches already (DeepSpeed's gradient_accumulation_steps); the mean over the ranks
        that see other tokens is taken here.
        """
        if self.tables is None or fetched is None:
            return None
        with self.times.phase(EXCHANGE):
            return self.tables.reduce_gradients(fetched, 1.0 / (self.grid.shape.data * self.grid.shape.context))

    def _leave_out(self, results: StageResults) -> None:
        """End a step without an update, and note which micro-batches were to blame. A WAIT FOR THE DEVICE, in such steps."""
        forget_gradients(self.adapter)
        if self.tables is not None:
            self.tables.leave_out_update()
        losses = [list(own.values()) for own in results.auxiliary_losses]
        for index, main_loss in enumerate(results.main_losses):
            losses[index].append(main_loss)
        self.non_finite_micro_batches = [
            index for index, own in enumerate(losses) if not all(math.isfinite(float(loss)) for loss in own)
        ]

    def _row_counts(self, fetched: FetchedRows | None) -> RowCounts:
        """What the tables of this rank did in the step."""
        if self.tables is None or fetched is None:
            return RowCounts()
        return RowCounts(fetched.rows.count, fetched.slots.numel(), self.tables.payload_bytes(fetched))


def _report_interval(config: RunConfig, grid: ProcessGrid) -> int | None:
    """Steps between reports on stragglers; None = there are none, as with one rank, which has nobody to wait for it."""
    return config.training.straggler_report_interval if grid.shape.world_size > 1 else None


def _tensors(micro_batches: list[MicroBatch]) -> Iterator[tuple[Tensor, Tensor]]:
    """What DeepSpeed's pipeline engine takes of micro-batches: inputs and targets."""
    return iter([(batch.inputs, batch.targets) for batch in micro_batches])


def _same_shapes(batches: Iterable[tuple[Tensor, Tensor]], most: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Batches of one shape that follow each other, up to `most` at once."""
    for _, same in groupby(batches, key=lambda batch: batch[0].shape):
        while group := list(islice(same, most)):
            yield group

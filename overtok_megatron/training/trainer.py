"""The run: data, engine, resume, steps, validation, checkpoints, reports. Collective; every rank runs it.

Shapes: A micro-batches a step, b micro batch, s sequence.
"""

import logging
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from overtok_megatron.checkpoint.store import CheckpointStore
from overtok_megatron.checkpoint.weights_only import starting_point
from overtok_megatron.config import counts, derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate
from overtok_megatron.data.batches import TrainBatches, validation_batches
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.run_data import open_run_data
from overtok_megatron.errors import CheckpointError, DivergedError, OvertokError
from overtok_megatron.kernels.dtypes import DTYPES
from overtok_megatron.loss_metrics import validation_figures, validation_losses
from overtok_megatron.parallel.collectives import named
from overtok_megatron.run_folder import RunLock
from overtok_megatron.training import metrics
from overtok_megatron.training.engine import StepResult, TrainingEngine
from overtok_megatron.training.metrics import Reporter
from overtok_megatron.training.peaks import peak_flops
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.resuming import agree, load_state, load_weights
from overtok_megatron.training.saving import Saver
from overtok_megatron.training.schedules import Schedule
from overtok_megatron.training.tracing import Tracer

log = logging.getLogger(__name__)


class Trainer:
    """One run from its first (or resumed) step to its last."""

    def __init__(self, config: RunConfig, *, device: torch.device, num_threads: int) -> None:
        """num_threads: of this rank on the host, where the configuration names none."""
        self.config = config
        torch.set_num_threads(
            config.training.num_threads or num_threads
        )  # a GPU's host tables and offload use them too
        torch.use_deterministic_algorithms(config.training.deterministic)
        self.grid = start_processes(config, device)
        self.first = self.grid.rank == 0
        self.lock = self._lock_folder(Path(config.training.output_directory))
        world = self.grid.shape.world_size
        validate(config, world, lambda key: "resolved")
        self.data = open_run_data(config)
        self.trainer = TrainingEngine(config, self.grid, device, self.data.eod_id)
        self.store = CheckpointStore(Path(config.training.output_directory))
        self.saver = Saver(
            self.trainer,
            self.store,
            eod_id=self.data.eod_id,
            tokenizer_fingerprint=self.data.tokenizer_fingerprint,
            published=self._saved,
        )
        self.consumed = 0  # samples, of which the position in the data follows
        self._announced: deque[Tensor] = deque()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop_after_step)
        self.total_steps = derived.train_iters(config)
        self.schedule = Schedule(
            kind=config.optimizer.schedule,
            peak=config.optimizer.learning_rate,
            minimum=config.optimizer.min_learning_rate,
            warmup_iters=config.optimizer.warmup_iters,
            total_iters=self.total_steps,
            decay_iters=config.optimizer.decay_iters or 0,
        )
        self.batches = TrainBatches(
            self.data.train,
            seq_length=config.data.seq_length,
            micro_batch_size=config.training.micro_batch_size,
            num_micro_batches=self.trainer.num_micro_batches,
            data_parallel_rank=self.grid.data_rank,
            data_parallel_size=self.grid.shape.data,
            seed=config.data.shuffle_seed,
        )
        self.tokens_per_step = config.training.global_batch_size * config.data.seq_length
        self.flops_per_token = counts.flops_per_token(config)
        peak = peak_flops(device, DTYPES[config.training.precision])
        self.peak_flops = metrics.over_ranks(peak.flops, dist.ReduceOp.SUM, device)
        if self.first:
            log.info(
                "model FLOPs utilisation is relative to %.4g TFLOP/s per rank (%s)", peak.flops / 1e12, peak.source
            )

    def _lock_folder(self, folder: Path) -> RunLock:
        """Lock the run's folder for this training; every rank raises CheckpointError where another process writes there."""
        lock = RunLock(folder, "the first rank of a training")
        agree(self.grid, lambda: lock.take_for_ranks() if self.first else None, folder)
        agree(self.grid, lambda: None if self.first else lock.join_ranks(), folder)
        if self.first and (warning := lock.warning()):
            log.warning("%s", warning)
        return lock

    def run(self) -> bool:
        """Train to the end, or to where SIGTERM asked to stop: False then, with a checkpoint of that step.

        Raises OvertokError for what the user can mend; the latest checkpoint then stands.
        """
        try:
            finished = self._train()
            if not self.first:
                self.lock.release()
            self.grid.wait_for_all()  # the first rank lets go last, and leaves a tidy folder
        except (OvertokError, OSError):  # perhaps of this rank alone: when it leaves, the launcher ends the others
            self.saver.settle()
            raise
        finally:
            self.lock.release()
        return finished

    def _train(self) -> bool:
        begin = self._resume()
        if begin >= self.total_steps:
            if self.first:
                log.info("nothing to do: the latest checkpoint is at step %d of %d", begin, self.total_steps)
            return True
        reporter = None
        directory = Path(self.config.training.output_directory)
        if self.first:
            reporter = Reporter(directory, tensorboard=self.config.logging.tensorboard, first_step=begin)
        tracer = Tracer(directory / "traces", self.config.logging.trace_steps, self.config.logging.trace_ranks)
        stop = False
        with tqdm(
            total=self.total_steps,
            initial=begin,
            unit="step",
            desc=directory.name,
            disable=not (self.first and show_bar(self.config)),
            dynamic_ncols=True,
        ) as bar:
            for step in range(begin, self.total_steps):
                done = step + 1
                with tracer.step(done, self.grid.rank):
                    values, stop = self._one_step_or_leave(step)
                if self._due(done, self.config.training.validation_interval) and self.data.validation:
                    values |= self._validate()
                    values |= self._table_figures()
                self.consumed += self.config.training.global_batch_size
                values |= {f"data/epoch/{name}": epoch for name, epoch in self.batches.epochs(self.consumed).items()}
                if reporter is not None:
                    self._report(reporter, done, values)
                    bar.set_postfix(loss=f"{values['train/loss']:.3f}", refresh=False)
                    bar.update()
                if stop or self._due(done, self.config.checkpoint.interval):
                    self._save(done)
                if stop:
                    break
        self.saver.finish()
        if reporter is not None:
            reporter.close()
        if stop and self.first:
            log.warning("asked to stop: step %d of %d is saved", done, self.total_steps)
        return not stop or done == self.total_steps

    def _due(self, done: int, interval: int | None) -> bool:
        return done == self.total_steps or (interval is not None and done % interval == 0)

    def _resume(self) -> int:
        grid, root = self.grid, self.store.root
        for name in agree(grid, lambda: self.store.clean() if self.first else [], root):
            log.warning("removed %s, which an interrupted save left behind", name)
        start = agree(grid, lambda: starting_point(self.config), root)
        if start is None:
            return 0
        path, fresh = start.path, start.fresh
        manifest = load_weights(self.trainer, path) if fresh else load_state(self.trainer, path)
        if manifest.tokenizer_fingerprint != self.data.tokenizer_fingerprint:
            self.data.refuse_tokenizer(path)
        if not fresh and manifest.eod_id != self.data.eod_id:
            raise CheckpointError(
                f"{path}: documents end with token {manifest.eod_id} there and with {self.data.eod_id} in this run; set "
                "tokenizer.eod_token as it was, or start a new run from it by training.initial_checkpoint"
            )
        if self.first:
            log.info("%s %s", "started from the weights of" if fresh else "resumed from", path)
        if fresh:
            return 0
        self.consumed = manifest.consumed_samples
        return manifest.step

    def _one_step_or_leave(self, step: int) -> tuple[dict[str, float], bool]:
        """As `_one_step`, but a run that diverges first completes the checkpoint being written, which is older and sound."""
        try:
            return self._one_step(step)
        except DivergedError:
            try:
                self.saver.finish()
            except CheckpointError as error:
                if self.first:
                    log.error("%s", error)
            raise

    def _one_step(self, step: int) -> tuple[dict[str, float], bool]:
        """Train one step: what to report, and whether to stop after it."""
        begin = time.perf_counter()
        tokens = self._next_tokens(step)  # [A, b, s + 1]
        learning_rate = self.schedule.at(step)
        result = self.trainer.step(tokens, learning_rate)
        seconds = time.perf_counter() - begin
        return self._figures(result, learning_rate, seconds), result.stop

    def _next_tokens(self, step: int) -> Tensor:
        """The tokens of a step; those of the step after it are read and announced, for their rows to be fetched meanwhile."""
        last = step + 1 == self.total_steps
        ahead = [self.consumed] if not self._announced else []
        ahead += [] if last else [self.consumed + self.config.training.global_batch_size]
        for place in ahead:
            tokens = self._tokens(place)
            self.trainer.prefetch(tokens)
            self._announced.append(tokens)
        return self._announced.popleft()

    @property
    def _reads(self) -> bool:
        return self.grid.batch_group is None or self.grid.rank == self.grid.batch_source

    def _tokens(self, consumed: int) -> Tensor:
        """The samples after the first `consumed`, for one step: [A, b, s + 1]."""
        own = torch.from_numpy(self.batches.read(consumed)) if self._reads else None
        return self._shared(own, self.batches.shape)

    def _shared(self, own: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """What one rank of a pipeline has read, int64 of `shape`, on all of its ranks: a collective of the batch group."""
        grid, device = self.grid, self.trainer.device
        tokens = torch.empty(shape, dtype=torch.int64, device=device) if own is None else own.to(device)
        if grid.batch_group is None:
            return tokens
        with named("broadcast of tokens", grid.batch_group):
            dist.broadcast(tokens, src=grid.batch_source, group=grid.batch_group)
        return tokens

    def _figures(self, result: StepResult, learning_rate: float, seconds: float) -> dict[str, float]:
        speed = self.tokens_per_step / seconds
        values = {
            "train/loss": result.loss,
            "train/learning_rate": learning_rate,
            "train/grad_norm": result.grad_norm,
            "speed/tokens_per_second": speed,
            "speed/step_seconds": seconds,
            "speed/tflops_per_rank": speed * self.flops_per_token / self.grid.shape.world_size / 1e12,
            "speed/model_flops_utilisation": speed * self.flops_per_token / self.peak_flops,
            "memory/peak_bytes": float(metrics.peak_memory(self.trainer.device)),
        }
        if self.trainer.tables is not None:
            values |= {
                "train/table_learning_rate": learning_rate * derived.table_rate_factor(self.config),
                "train/table_grad_norm": result.table_grad_norm,
                "tables/unique_rows": float(result.unique_rows),
                "tables/duplicate_share": 1.0 - result.unique_rows / result.looked_up_rows,
                "tables/exchange_bytes": float(result.exchange_bytes),
            }
        return values | {f"router/{name}": value for name, value in result.router.items()}

    def _validate(self) -> dict[str, float]:
        """The figures of every set, one after the other: a collective, in the configuration's order on all ranks."""
        values: dict[str, float] = {}
        for name, dataset in self.data.validation.items():
            loss, tokens = self.trainer.evaluate(self._validation_batches(dataset))
            values |= validation_figures(name, loss, tokens, dataset.manifest.source_bytes)
        return values

    def _validation_batches(self, dataset: IndexedDataset) -> Iterator[tuple[Tensor, Tensor]]:
        shape = self.grid.shape
        for pair in validation_batches(
            dataset,
            self.config.data.seq_length,
            self.config.training.micro_batch_size,
            self.grid.data_rank,
            shape.data,
            multiple=shape.context * shape.tensor,  # the ranks that divide a sequence among them
            read=self._reads,
        ):
            own = torch.from_numpy(np.stack(pair)) if self._reads else None
            both = self._shared(own, (2, *pair[0].shape))
            yield both[0], both[1]

    def _table_figures(self) -> dict[str, float]:
        """Figures that sweep the tables or look at n-grams twice: taken where validation is, not every step."""
        tables = self.trainer.tables
        if tables is None:
            return {}
        touched = metrics.over_ranks(float(tables.num_touched()), dist.ReduceOp.SUM, self.trainer.device)
        tokens = self._tokens(self.consumed)
        sample = tokens[:, :, :-1] if self.grid.is_first_stage else None
        fetched = tables.fetch_rows(None if sample is None else sample[:1])  # every rank, as rows are everywhere
        values = {"tables/touched_share": touched / tables.ngram_hash.space.total_rows}
        if sample is not None:
            values["tables/collision_share"] = tables.ngram_hash.collision_share(sample)
            values |= self.trainer.ngram_norms(fetched)
        return values

    def _report(self, reporter: Reporter, done: int, values: dict[str, float]) -> None:
        losses = validation_losses(values)
        if done % self.config.logging.interval == 0 or done == self.total_steps or losses:
            reporter.write(done, values)
            log.info(metrics.step_line(done, self.total_steps, values))
        for name, loss in losses.items():
            of_set = f" of {name}" if name else ""
            log.info("step %d/%d  validation loss%s %.4f", done, self.total_steps, of_set, loss)

    def _save(self, done: int) -> None:
        begin = time.perf_counter()
        self.saver.save(done, self.consumed)
        if self.first:
            log.info("saving step %d: training waited %.2f s", done, time.perf_counter() - begin)

    def _saved(self, path: Path, seconds: float) -> None:
        """On the thread that completed a checkpoint."""
        log.info("saved %s in %.1f s", path.name, seconds)
        settings = self.config.checkpoint
        if settings.keep_last is not None:
            self.store.prune(settings.keep_last, settings.keep_every)

    def _stop_after_step(self, number: int, _: object) -> None:
        """SIGTERM, or Ctrl-C once: finish the step, save, and leave."""
        self.trainer.stop_asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def show_bar(config: RunConfig) -> bool:
    """Whether the progress bar is drawn: asked for, or `auto` on a terminal."""
    choice = config.logging.progress_bar
    return choice == "on" or (choice == "auto" and sys.stderr.isatty())

"""The loop of a run: resume, then steps, validation, checkpoints and reports. Every rank runs it."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from overtok_megatron.checkpoint.starting_point import starting_point
from overtok_megatron.checkpoint.store import CheckpointStore, Manifest
from overtok_megatron.config import derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate
from overtok_megatron.data.run_data import open_run_data
from overtok_megatron.errors import CheckpointError, DivergedError, OvertokError, WeightsError
from overtok_megatron.loss_metrics import validation_metrics
from overtok_megatron.parallel.spans import under_way
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.run_lock import RunLock
from overtok_megatron.training.agreement import agree
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.leaving import Departure, Leaving
from overtok_megatron.training.phase_times import DATA, SAVE
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.reporting import RunReport
from overtok_megatron.training.resuming import load_checkpoint, load_weights
from overtok_megatron.training.saving import Saver
from overtok_megatron.training.schedules import Schedule
from overtok_megatron.training.skipped_steps import SkippedSteps
from overtok_megatron.training.step_metrics import StepMetrics
from overtok_megatron.training.step_result import StepResult
from overtok_megatron.training.straggler_report import StragglerReport
from overtok_megatron.training.table_metrics import table_metrics
from overtok_megatron.training.token_feed import TokenFeed
from overtok_megatron.training.tracing import Tracer
from overtok_megatron.training.weights_check import WeightsCheck
from overtok_megatron.watching.rank import Watch

log = logging.getLogger(__name__)


class Trainer:
    """One run from its first (or resumed) step to its last. All ranks must call its methods."""

    def __init__(
        self,
        config: RunConfig,
        *,
        device: torch.device,
        num_threads: int,
        watch: Watch | None = None,
        attempt: str = "0",
    ) -> None:
        """num_threads: of this rank on the host, where the configuration names none. watch: is told what this rank does.

        attempt: as in processes.py.
        """
        self.config = config
        self.watch = watch or Watch()
        self.watch.under_way = under_way
        # Beside a GPU, host tables and an offloaded optimizer use these threads.
        torch.set_num_threads(config.training.num_threads or num_threads)
        torch.use_deterministic_algorithms(config.training.deterministic)
        self.folder = Path(config.training.output_directory)
        self.grid = start_processes(config, device, attempt)
        self.first = self.grid.rank == 0
        self.lock = self._lock_folder()
        self.leaving = Leaving(self.grid, RunFolder(self.folder), config.training.exit_after_minutes)
        self.departure: Departure | None = None  # why the run left before its end
        validate(config, self.grid.shape.world_size, lambda key: "resolved")
        self.data = open_run_data(config)
        self.engine = TrainingEngine(config, self.grid, device, self.data.eod_id)
        self.leaving.signalled = self._stop_after_step
        self.store = CheckpointStore(self.folder)
        self.saver = Saver(
            self.engine,
            self.store,
            eod_id=self.data.eod_id,
            tokenizer_fingerprint=self.data.tokenizer_fingerprint,
            data=self.data.fingerprints(),
            published=self._saved,
        )
        self.consumed = 0  # samples so far, which give the position in the data
        self.feed = TokenFeed(
            config,
            self.data,
            self.grid,
            device,
            num_micro_batches=self.engine.num_micro_batches,
            extra_tokens=self.engine.extra_tokens,
        )
        self.skips = SkippedSteps(
            RunFolder(self.folder),
            self.grid,
            limit=config.training.non_finite_limit,
            num_micro_batches=self.engine.num_micro_batches,
            sample_ids=self.feed.sample_ids,
        )
        self.weights_check = WeightsCheck(self.engine, config.training.weights_check_interval)
        self.times = self.engine.times
        self.stragglers = StragglerReport(self.grid, self.times.interval, config.training.straggler_threshold)
        self.total_steps = derived.train_iters(config)
        self.schedule = Schedule.of(config)
        self.step_metrics = StepMetrics(config, device)
        self.tracer = Tracer(RunFolder(self.folder).traces, config.logging.trace_steps, config.logging.trace_ranks)

    def _lock_folder(self) -> RunLock:
        """Lock the run's folder for this training; every rank raises CheckpointError where another process writes there."""
        lock = RunLock(self.folder, "the first rank of a training")
        agree(self.grid, lambda: lock.take_for_ranks() if self.first else None, self.folder)
        agree(self.grid, lambda: None if self.first else lock.join_ranks(), self.folder)
        if self.first and (warning := lock.warning()):
            log.warning("%s", warning)
        return lock

    def run(self) -> bool:
        """Train to the end, or to where a rank was asked to leave: False then, with a checkpoint of that step.

        Raises OvertokError for what the user can mend; the latest checkpoint then stands.
        """
        try:
            finished = self._train()
            self.watch.phase("end", self.total_steps)
            self.feed.finish()
            self.leaving.tidy()
            if not self.first:
                self.lock.release()
            self.grid.wait_for_all()  # the first rank lets go last, and leaves a tidy folder
        except (OvertokError, OSError):  # perhaps of this rank alone: when it leaves, the launcher ends the others
            self.watch.phase("save", self.total_steps)
            self.saver.settle()
            raise
        finally:
            self.times.stop()
            self.lock.release()
        return finished

    def _train(self) -> bool:
        steps_done = self._resume()
        if steps_done >= self.total_steps:
            if self.first:
                log.info("nothing to do: the latest checkpoint is at step %d of %d", steps_done, self.total_steps)
            return True
        self.skips.resume(steps_done)
        tokens_of_steps = self.feed.steps(self.consumed, self.total_steps - steps_done, self.engine.announce)
        with ExitStack() as open_until_end:
            report = None
            if self.first:
                report = RunReport(
                    self.config, steps_done=steps_done, total_steps=self.total_steps, bar=show_bar(self.config)
                )
                open_until_end.callback(report.close)
            for step in range(steps_done, self.total_steps):
                done = step + 1
                self.watch.phase("first step" if step == steps_done else "step", done)
                if step > steps_done:  # the first one compiles kernels
                    self.times.begin_step(done)
                values, stop = self._one_step_or_leave(step, tokens_of_steps)
                if report is not None:
                    report.step(done, values)
                if stop or self._due(done, self.config.checkpoint.interval):
                    self.watch.phase("save", done)
                    with self.times.phase(SAVE):
                        self._save(done)
                if stop:
                    break
        self.saver.finish()
        if not stop or done == self.total_steps:
            return True
        self.departure = self.leaving.agree()
        if self.first and self.departure is not None:
            log.warning(
                "asked to stop by %s: step %d of %d is saved; the same command goes on from there (exit code %d)",
                self.departure.reason,
                done,
                self.total_steps,
                self.departure.exit_code,
            )
        return False

    @property
    def exit_code(self) -> int:
        """Of this process when `run` has returned: 0 where the run has come to its end."""
        return 0 if self.departure is None else self.departure.exit_code

    def _due(self, done: int, interval: int | None) -> bool:
        return done == self.total_steps or (interval is not None and done % interval == 0)

    def _resume(self) -> int:
        """Load what the run starts from, if anything; returns how many steps are done."""
        root = self.store.root
        for name in agree(self.grid, lambda: self.store.clean() if self.first else [], root):
            log.warning("removed %s, which an interrupted save left behind", name)
        start = agree(self.grid, lambda: starting_point(self.config), root)
        if start is None:
            return 0
        path, fresh = start.path, start.fresh
        manifest = load_weights(self.engine, path) if fresh else load_checkpoint(self.engine, path)
        self._check_tokenizer(manifest, path, fresh)
        if self.first:
            whole = "resumed from" if start.own else "goes on, in a run of its own, from"
            log.info("%s %s", "started from the weights of" if fresh else whole, path)
        if fresh:
            return 0
        for line in self.data.changes_since(manifest.data, path) if self.first else ():
            log.warning("%s", line)
        self.consumed = manifest.consumed_samples
        return manifest.step

    def _check_tokenizer(self, manifest: Manifest, path: Path, fresh: bool) -> None:
        """Raise CheckpointError where a checkpoint was trained with another tokenizer, or documents ended otherwise."""
        if manifest.tokenizer_fingerprint != self.data.tokenizer_fingerprint:
            self.data.refuse_tokenizer(path)
        if not fresh and manifest.eod_id != self.data.eod_id:
            raise CheckpointError(
                f"{path}: documents end with token {manifest.eod_id} there and with {self.data.eod_id} in this run; set "
                "tokenizer.eod_token as it was, or start a new run from it by training.initial_checkpoint"
            )

    def _one_step_or_leave(self, step: int, tokens_of_steps: Iterator[Tensor]) -> tuple[dict[str, float], bool]:
        """As `_one_step`, but a run that is to save no more first completes the checkpoint being written, which is older."""
        try:
            return self._one_step(step, tokens_of_steps)
        except (DivergedError, WeightsError):
            self.watch.phase("save", step + 1)
            try:
                self.saver.finish()
            except CheckpointError as error:
                if self.first:
                    log.error("%s", error)
            raise

    def _one_step(self, step: int, tokens_of_steps: Iterator[Tensor]) -> tuple[dict[str, float], bool]:
        """Train one step, and validate where that is due: what to report, and whether to stop after it."""
        done, learning_rate = step + 1, self.schedule.at(step)
        with self.tracer.step(done, self.grid.rank):
            started = time.perf_counter()
            with self.times.phase(DATA):
                tokens = next(tokens_of_steps)  # [A, b, s + k]
            if self.leaving.asked():
                self._stop_after_step()
            result = self.engine.step(tokens, learning_rate, report_times=self.times.due(done))
            seconds = time.perf_counter() - started
        values = self.step_metrics.of_step(result, learning_rate, seconds) | self._account_for_skips(done, result)
        values |= self.stragglers.judge(result.times)
        with self.times.phase(None):  # what some steps do besides is not compared
            if self.weights_check.due(done, saved=result.stop or self._due(done, self.config.checkpoint.interval)):
                self.weights_check.run(done)  # now: under ZeRO 1 and 2 the next step makes the weights anew
            if self._due(done, self.config.training.validation_interval) and self.data.validation:
                values |= self._validate(done)
                self.watch.phase("evaluate", done)
                values |= table_metrics(self.engine, tokens)
        self.consumed += self.config.training.global_batch_size
        values |= {f"data/epoch/{name}": epoch for name, epoch in self.feed.epochs(self.consumed).items()}
        return values, result.stop

    def _account_for_skips(self, done: int, result: StepResult) -> dict[str, float]:
        """The metric of the skipped steps, where the run skips any. Raises DivergedError where too many follow each other."""
        if not self.engine.skips_non_finite:
            return {}
        if math.isfinite(result.grad_norm):
            self.skips.done()
        else:
            self.skips.skipped(done, result.grad_norm, self.consumed, self.engine.non_finite_micro_batches)
        return {"train/skipped_steps": float(self.skips.count)}

    def _stop_after_step(self) -> None:
        self.engine.stop_asked = True

    def _validate(self, done: int) -> dict[str, float]:
        """The metrics of every validation set, one after the other in the configuration's order."""
        values: dict[str, float] = {}
        for name, dataset in self.data.validation.items():
            batches = self.watch.each(self.feed.validation(dataset), "evaluate", done)
            loss, _ = self.engine.evaluate(batches)
            # Of a part of a set the bytes are not known: its tokens count as long as those of the whole set.
            values |= validation_metrics(name, loss, dataset.num_tokens - 1, dataset.manifest.source_bytes)
        return values

    def _save(self, done: int) -> None:
        started = time.perf_counter()
        self.saver.save(done, self.consumed)
        if self.first:
            log.info("saving step %d: training waited %.2f s", done, time.perf_counter() - started)

    def _saved(self, path: Path, seconds: float) -> None:
        """On the thread that completed a checkpoint."""
        log.info("saved %s in %.1f s", path.name, seconds)
        settings = self.config.checkpoint
        if settings.keep_last is not None:
            self.store.prune(settings.keep_last, settings.keep_every)


def show_bar(config: RunConfig) -> bool:
    """Whether the progress bar is drawn: asked for, or `auto` on a terminal."""
    choice = config.logging.progress_bar
    return choice == "on" or (choice == "auto" and sys.stderr.isatty())

"""Saving a run: the engine's files, the dense weights and the tables become one checkpoint, or none.

Dense state is written at once, tables by a thread of each rank while training goes on. The checkpoint becomes visible when
the last rank is done: each leaves a note in its folder, and the first rank's thread waits for all of them. The methods of
`Saver` are collectives: every rank calls them, and every rank learns of a failure on any other.
"""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from overtok_megatron.checkpoint.dense import save_dense
from overtok_megatron.checkpoint.engine_state import ENGINE_FOLDER, OPTIMIZER_PARAMETERS
from overtok_megatron.checkpoint.store import CheckpointStore, Digest, Manifest, file_digest
from overtok_megatron.checkpoint.tables import TableWriter
from overtok_megatron.errors import CheckpointError
from overtok_megatron.files import write_atomically
from overtok_megatron.parallel.devices import make_current
from overtok_megatron.parallel.splits import full_shape, is_pipeline_replica, splits_of
from overtok_megatron.training.deepspeed.checkpoint_files import WRITE_ERRORS, reason
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.resuming import layout_of

_NOTES = "notes"  # folder of the ranks' notes inside a partial checkpoint


def in_background(work: Callable[[], Any], device: torch.device) -> threading.Thread:
    """Run `work` on a thread of low priority, which gets the processor when training leaves it idle.

    device: where the tensors lie that it reads.
    """

    def run() -> None:
        with suppress(OSError, AttributeError):  # a thread's own priority is a thing of Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        make_current(device)
        work()

    thread = threading.Thread(target=run, name="save", daemon=True)
    thread.start()
    return thread


def leave_note(folder: Path, rank: int, digests: dict[str, Digest]) -> None:
    """Tell the first rank that this one is done. From then on nothing here may be touched: the folder may be gone."""
    (folder / _NOTES).mkdir(exist_ok=True)
    write_atomically(folder / _NOTES / f"{rank}.json", json.dumps(digests), durable=False)


class Saver:
    """Makes the checkpoints of one run, one at a time.

    published: called by the first rank's thread after each, with its folder and seconds from begin to end.
    """

    def __init__(
        self,
        trainer: TrainingEngine,
        store: CheckpointStore,
        *,
        eod_id: int,
        tokenizer_fingerprint: str,
        published: Callable[[Path, float], None] | None = None,
    ) -> None:
        self.trainer = trainer
        self.store = store
        self._identity = {"eod_id": eod_id, "tokenizer_fingerprint": tokenizer_fingerprint}
        self._published = published
        self._rank = trainer.grid.rank
        self._writer: TableWriter | None = None
        if trainer.tables is not None:
            self._writer = TableWriter(trainer.tables, trainer.config.checkpoint.incremental)
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()
        self._step = 0
        self._failure: str | None = None

    def save(self, step: int, consumed_samples: int) -> None:
        """Begin a checkpoint of this moment; it is complete after the next call of save() or finish().

        Raises CheckpointError on every rank if any rank could not write this one or the last; the one before stays the latest.
        """
        self.finish()
        begin = time.perf_counter()
        self._step, self._failure = step, None
        folder = self.store.partial(step)
        self._agree(self._guarded(lambda: self.store.start_save(step)) if self._rank == 0 else None)
        files = self._write_dense_state(folder)
        write_tables = None if self._writer is None else self._writer.start_save(folder)
        manifest = {"step": step, "consumed_samples": consumed_samples, **self._identity}

        def complete() -> None:
            try:
                self._complete(folder, files, write_tables, manifest, begin)
            except Exception as error:  # whatever it is, it must not end with the thread
                self._failure = reason(error)
                self.trainer.stop_asked = True  # all ranks hear of it after this step, and come to save() or finish()

        self._abandoned.clear()
        self._thread = in_background(complete, self.trainer.device)
        if not self.trainer.config.checkpoint.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun last is complete. Raises CheckpointError as save() does."""
        if self._thread is None:
            return
        if self._rank > 0:
            self._thread.join()
        if any(self.trainer.grid.gather_objects(self._failure if self._rank > 0 else None)):
            self._abandoned.set()  # the first rank waits for a note that does not come
        self._thread.join()
        self._thread = None
        self._agree(self._failure)
        if self._writer is not None:
            self._writer.published(self.store.final(self._step))

    def settle(self, seconds: float = 300.0) -> None:
        """Wait until the checkpoint being written is complete, before this rank leaves alone. Needs no other rank's call.

        The other ranks' threads go on writing while those ranks wait for this one in a step. seconds: the longest wait.
        """
        if self._thread is None:
            return
        deadline = time.monotonic() + seconds
        self._thread.join(seconds if self._rank == 0 else None)
        while self._rank > 0 and self.store.partial(self._step).exists() and time.monotonic() < deadline:
            time.sleep(0.05)  # until the first rank has published it

    def _guarded(self, work: Callable[[], Any]) -> str | None:
        try:
            work()
        except WRITE_ERRORS as error:
            return reason(error)
        return None

    def _agree(self, failure: str | None) -> None:
        failures = [(rank, text) for rank, text in enumerate(self.trainer.grid.gather_objects(failure)) if text]
        if not failures:
            return
        if self._writer is not None:
            self._writer.forget()
        if self._rank == 0:
            with suppress(OSError):
                self.store.discard(self._step)
        self.trainer.grid.wait_for_all()
        rank, text = failures[0]
        raise CheckpointError(
            f"could not save step {self._step} on rank {rank}: {text}; the previous checkpoint is intact, "
            "make room or change training.output_directory and start again to resume from it"
        )

    def _write_dense_state(self, folder: Path) -> list[str]:
        """Our weights and DeepSpeed's files; the names of those that this rank wrote and has to hash."""
        trainer, written = self.trainer, []
        dense = trainer.dense_state()
        extras = self._engine_extras()
        writes = trainer.grid.place("data") == trainer.grid.place("context") == 0
        self._agree(self._guarded(lambda: written.append(self._write_dense(folder, dense))) if writes else None)
        files = trainer.engine_files
        files.failure, files.written = None, []
        try:
            trainer.engine.save_checkpoint(str(folder), tag=ENGINE_FOLDER, client_state=extras, save_latest=False)
        except WRITE_ERRORS as error:  # what DeepSpeed writes beside its checkpoint engine
            files.failure = files.failure or reason(error)
        self._agree(files.failure)
        return [*written, *(path.relative_to(folder).as_posix() for path in files.written)]

    def _write_dense(self, folder: Path, dense: dict[str, torch.Tensor]) -> str:
        parameters = dict(self.trainer.model.named_parameters())
        dense = {name: value for name, value in dense.items() if not is_pipeline_replica(parameters[name])}
        layout, grid = layout_of(self.trainer), self.trainer.grid
        number = layout.file_number(grid.place("pipe"), grid.tensor_rank)
        return save_dense(folder, dense, self._splits(), number, layout.model_parallel_ranks)

    def _splits(self) -> dict[str, int]:
        """Along which dimension each split parameter of this rank is split. The files know one dimension per parameter."""
        found = {}
        for name, parameter in self.trainer.model.named_parameters():
            for (split,) in filter(None, [splits_of(parameter)]):
                found[name] = split.dim
        return found

    def _engine_extras(self) -> dict[str, Any]:
        """What goes into DeepSpeed's files for readers of them: `ds_to_universal`, and a resume on another layout."""
        own: dict[str, int | None] = {name: None for name, _ in self.trainer.model.named_parameters()}
        everyone: dict[str, int | None] = {}
        for names in self.trainer.grid.gather_objects(own | self._splits()):
            everyone |= names
        # the names for dimension 1 and for whole copies; any other is told as one part of a shape, cut evenly along it
        kinds = {"parameter_with_row_parallelism_patterns": 1, "tp_replicated_parameter_patterns": None}
        info: dict[str, Any] = {"universal_checkpoint_version": 0.2}
        for key, dim in kinds.items():
            info[key] = [f"^{re.escape(name)}$" for name, split in everyone.items() if split == dim]
        info["parameter_with_sub_params"] = self._deeper_splits()
        return {
            "step": self._step,
            "universal_checkpoint_info": info,
            OPTIMIZER_PARAMETERS: self.trainer.optimizer_order,
        }

    def _deeper_splits(self) -> list[dict[str, Any]]:
        """Parameters of all stages that are split along a dimension beyond the second, as DeepSpeed's SubparamShape."""
        own = {}
        for name, parameter in self.trainer.model.named_parameters():
            for split in splits_of(parameter):
                if split.dim > 1:
                    shape = list(full_shape(parameter))
                    shape[split.dim] = 1
                    own[name] = {"patterns": [f"^{re.escape(name)}$"], "shape": shape, "partition_dim": split.dim}
        everyone: dict[str, dict[str, Any]] = {}
        for found in self.trainer.grid.gather_objects(own):
            everyone |= found
        return list(everyone.values())

    def _complete(
        self,
        folder: Path,
        files: list[str],
        write_tables: Callable[[], dict[str, Digest]] | None,
        manifest: dict[str, Any],
        begin: float,
    ) -> None:
        """On the rank's thread: write and hash what is left, leave a note, and on the first rank publish."""
        digests = {name: file_digest(folder / name) for name in files}
        if write_tables is not None:
            digests |= write_tables()
        leave_note(folder, self._rank, digests)
        if self._rank == 0:
            self._publish(folder, manifest, begin)

    def _publish(self, folder: Path, manifest: dict[str, Any], begin: float) -> None:
        """Wait for all notes, then make the checkpoint visible."""
        files: dict[str, Digest] = {}
        for rank in range(self.trainer.grid.shape.world_size):
            note = folder / _NOTES / f"{rank}.json"
            while not note.is_file():  # a rank that dies ends the run, and this thread with it
                if self._abandoned.wait(0.02):
                    return
            content = json.loads(note.read_text(encoding="utf-8"))
            files |= {name: (size, digest) for name, (size, digest) in content.items()}
        shutil.rmtree(folder / _NOTES)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if name not in files:  # small ones that DeepSpeed writes by itself
                files[name] = file_digest(path)
        layout, config = layout_of(self.trainer), self.trainer.config.model_dump(mode="json")
        path = self.store.publish(Manifest(config=config, layout=layout, files=files, **manifest))
        if self._published is not None:
            self._published(path, time.perf_counter() - begin)

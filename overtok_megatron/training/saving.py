"""Saving a run: DeepSpeed's files, the dense weights and the tables become one checkpoint, or none.

Each rank has a thread for its saves, which works while training goes on, and a stream for copies to host memory.

* Weights: `save` enqueues copies into host memory (pinned beside a GPU; as many bytes as this rank's weights; under ZeRO 3
  DeepSpeed gathers them there). The next update waits for them on the device, and the thread writes them.
* Tables: `save` copies nothing (ngram/snapshot.py), and the thread reads and writes them.
* DeepSpeed's files are written before `save` returns: their content, 12 bytes per parameter over the ranks that share it,
  would have to be held twice until it is written. The thread only syncs them to the disk.

The checkpoint becomes visible when the last rank is done: each leaves a note in its folder, and the first rank's thread waits
for all of them. Every rank learns of a failure on any other.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from overtok_megatron.checkpoint.deepspeed_state import OPTIMIZER_PARAMETERS
from overtok_megatron.checkpoint.dense import save_dense
from overtok_megatron.checkpoint.store import CheckpointStore, Digest, Manifest, file_digest
from overtok_megatron.checkpoint.tables import TableWriter
from overtok_megatron.errors import CheckpointError
from overtok_megatron.files import sync, write_atomically
from overtok_megatron.parallel.copy_stream import CopyStream, stream_of_thread
from overtok_megatron.parallel.devices import make_current
from overtok_megatron.parallel.spans import run_beside_training
from overtok_megatron.parallel.splits import is_tied_copy, splits_of
from overtok_megatron.training.agreement import WRITE_ERRORS, reason
from overtok_megatron.training.deepspeed.universal import universal_info
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.resuming import layout_of
from overtok_megatron.training.save_space import MAKE_ROOM, bytes_to_write, check_space

_NOTES = "notes"  # folder of the ranks' notes inside a partial checkpoint


def in_background(work: Callable[[], Any], device: torch.device) -> threading.Thread:
    """Run `work` on a thread of low priority, which gets the processor when training leaves it idle.

    device: of the tensors that it reads. What it launches there goes to a stream of its own.
    """

    def run() -> None:
        with suppress(OSError, AttributeError):  # only Linux has priorities of single threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        make_current(device)
        run_beside_training()
        with stream_of_thread(device):
            work()

    thread = threading.Thread(target=run, name="save", daemon=True)
    thread.start()
    return thread


def leave_note(folder: Path, rank: int, digests: dict[str, Digest]) -> None:
    """Tell the first rank that this one is done. From then on nothing here may be touched: the folder may be gone."""
    (folder / _NOTES).mkdir(exist_ok=True)
    write_atomically(folder / _NOTES / f"{rank}.json", json.dumps(digests), durable=False)


def _split_dims(parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    """The dimension along which each split parameter is split. The files know one dimension per parameter."""
    found = {}
    for name, parameter in parameters.items():
        splits = splits_of(parameter)
        assert len(splits) <= 1, f"{name} is split along several dimensions"
        if splits:
            found[name] = splits[0].dim
    return found


class Saver:
    """Makes the checkpoints of one run, one at a time. All ranks must call `save` and `finish` together.

    data: the fingerprints of the run's sets, as in the manifest. published: called by the first rank's thread after each
    checkpoint, with its folder and the seconds that it took.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        store: CheckpointStore,
        *,
        eod_id: int,
        tokenizer_fingerprint: str,
        data: Mapping[str, str] = MappingProxyType({}),
        published: Callable[[Path, float], None] | None = None,
    ) -> None:
        self.engine = engine
        self.store = store
        self._identity = {"eod_id": eod_id, "tokenizer_fingerprint": tokenizer_fingerprint, "data": dict(data)}
        self._published = published
        self._rank = engine.grid.rank
        self._writer: TableWriter | None = None
        if engine.tables is not None:
            self._writer = TableWriter(engine.tables, engine.config.checkpoint.incremental)
        self._copies = CopyStream(engine.device)
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()
        self._step = 0
        self._failure: str | None = None

    def save(self, step: int, consumed_samples: int) -> None:
        """Start a checkpoint of the present state; it is complete after the next call of save() or finish().

        Raises CheckpointError on every rank if any rank could not write this one or the last, or if this one cannot fit on
        the disk; the one before stays the latest.
        """
        self.finish()
        check_space(self.engine, self.store.root, step, bytes_to_write(self.engine, self._writer))
        started = time.perf_counter()
        self._step, self._failure = step, None
        folder = self.store.partial(step)
        self._raise_on_all(self._failure_of(lambda: self.store.start_save(step)) if self._rank == 0 else None)
        writers = [self._start_dense(folder)]
        if self._writer is not None:
            writers.insert(0, self._writer.start_save(folder))  # first: steps are slower until all rows were read
        manifest = {"step": step, "consumed_samples": consumed_samples, **self._identity}

        def complete() -> None:
            try:
                self._complete(folder, writers, manifest, started)
            except Exception as error:  # of any kind: it must not be lost when the thread ends
                self._failure = reason(error)
                self.engine.stop_asked = True  # all ranks learn of it after this step, and call save() or finish()

        self._abandoned.clear()
        self._thread = in_background(complete, self.engine.device)
        if not self.engine.config.checkpoint.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that was started last is complete. Raises CheckpointError as save() does."""
        if self._thread is None:
            return
        if self._rank > 0:
            self._thread.join()
        if any(self.engine.grid.gather_objects(self._failure if self._rank > 0 else None)):
            self._abandoned.set()  # else the first rank would wait for a note that is never left
        self._thread.join()
        self._thread = None
        self._raise_on_all(self._failure)
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

    def _failure_of(self, work: Callable[[], Any]) -> str | None:
        try:
            work()
        except WRITE_ERRORS as error:
            return reason(error)
        return None

    def _raise_on_all(self, failure: str | None) -> None:
        """Raise CheckpointError on every rank where any rank names a failure, and remove what was written."""
        failures = [(rank, text) for rank, text in enumerate(self.engine.grid.gather_objects(failure)) if text]
        if not failures:
            return
        if self._writer is not None:
            self._writer.forget()
        if self._rank == 0:
            with suppress(OSError):
                self.store.discard(self._step)
        self.engine.grid.wait_for_all()
        rank, text = failures[0]
        raise CheckpointError(f"could not save step {self._step} on rank {rank}: {text}; {MAKE_ROOM}")

    def _start_dense(self, folder: Path) -> Callable[[], dict[str, Digest]]:
        """Write DeepSpeed's files, and copy our weights; the returned function writes the weights and syncs and hashes all.

        It returns the digests of the files that this rank wrote.
        """
        engine, grid = self.engine, self.engine.grid
        parameters = dict(engine.model.named_parameters())
        split_dims = _split_dims(parameters)
        dense = engine.dense_weights()
        client_state = {
            "step": self._step,
            **universal_info(parameters, split_dims, grid),
            OPTIMIZER_PARAMETERS: engine.optimizer_order,
        }
        first_replica = grid.coordinate("data") == grid.coordinate("context") == 0
        own: dict[str, Tensor] = {}
        self._copies.follow_compute()
        for name, value in dense.items() if first_replica else ():
            if not is_tied_copy(parameters[name]):  # under ZeRO 3 the values are copies already
                own[name] = self._copies.copy(value) if value.device == engine.device else value
        copied = self._copies.mark()
        copied.wait()  # the stream that computes does, before it changes weights; this thread goes on
        layout = layout_of(engine)
        number = layout.file_number(grid.coordinate("pipe"), grid.tensor_rank)
        deepspeed_files, failure = engine.deepspeed_files.save(folder, client_state)
        self._raise_on_all(failure)

        def write() -> dict[str, Digest]:
            names = [path.relative_to(folder).as_posix() for path in deepspeed_files]
            for path in deepspeed_files:
                sync(path)
            if first_replica:
                copied.synchronize()
                names.append(save_dense(folder, own, split_dims, number, layout.model_parallel_ranks))
            return {name: file_digest(folder / name) for name in names}

        return write

    def _complete(
        self, folder: Path, writers: list[Callable[[], dict[str, Digest]]], manifest: dict[str, Any], started: float
    ) -> None:
        """On the rank's thread: write and hash what is left, leave a note, and on the first rank publish."""
        digests: dict[str, Digest] = {}
        for write in writers:
            digests |= write()
        leave_note(folder, self._rank, digests)
        if self._rank == 0:
            self._publish(folder, manifest, started)

    def _publish(self, folder: Path, manifest: dict[str, Any], started: float) -> None:
        """Wait for all notes, then make the checkpoint visible."""
        files: dict[str, Digest] = {}
        for rank in range(self.engine.grid.shape.world_size):
            note = folder / _NOTES / f"{rank}.json"
            while not note.is_file():  # a rank that dies ends the run, and so this thread
                if self._abandoned.wait(0.02):
                    return
            content = json.loads(note.read_text(encoding="utf-8"))
            files |= {name: (size, digest) for name, (size, digest) in content.items()}
        shutil.rmtree(folder / _NOTES)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if name not in files:  # small files that DeepSpeed writes without its checkpoint engine
                files[name] = file_digest(path)
        layout, config = layout_of(self.engine), self.engine.config.model_dump(mode="json")
        path = self.store.publish(Manifest(config=config, layout=layout, files=files, **manifest))
        if self._published is not None:
            self._published(path, time.perf_counter() - started)

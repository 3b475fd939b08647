"""Score every checkpoint of a run as it appears, while it trains: a record in evaluations.jsonl, and metrics to the trackers.

Nothing is scored twice: a record names the checkpoint by the digest of its manifest, and says what was asked.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from overtok_megatron.checkpoint.store import MANIFEST_DIGEST, CheckpointStore, read_manifest, step_of
from overtok_megatron.config.derived import train_iters
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import CheckpointError
from overtok_megatron.files import refuse_foreign
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.trackers import evaluation_trackers

log = logging.getLogger(__name__)

_BEGIN = '{"step": '  # of a record


def follow(
    run: Path,
    asked: dict[str, Any],
    score: Callable[[Path], dict[str, float]],
    *,
    seconds: float = 10.0,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics by name) of each checkpoint of `run`, oldest first, until the one of the run's last step is scored.

    asked: what `score` measures, of JSON's types. score: from a checkpoint's folder to its metrics. seconds: between two looks
    for new checkpoints. One that the run removes while it is being scored is left out. Raises CheckpointError where a
    checkpoint is damaged.
    """
    store = CheckpointStore(run)
    with _Records(run) as records:
        while True:
            for path in store.complete():
                try:
                    digest = (path / MANIFEST_DIGEST).read_text(encoding="utf-8").split()[0]
                    if (digest, asked) in records:
                        continue
                    metrics = score(path)
                except (CheckpointError, OSError, IndexError):
                    if path.exists():
                        raise
                    log.info("%s: removed by the run before it was scored", path)
                    continue
                records.add(step_of(path), digest, asked, metrics)
                yield step_of(path), metrics
            if _ended(store):
                return
            sleep(seconds)


def _ended(store: CheckpointStore) -> bool:
    newest = store.complete()[-1:]
    try:
        return any(
            step_of(path) >= train_iters(RunConfig.model_validate(read_manifest(path).config)) for path in newest
        )
    except CheckpointError:
        if newest[0].exists():
            raise
        return False


class _Records:
    def __init__(self, run: Path) -> None:
        folder = RunFolder(run)
        self._path = folder.evaluations
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        refuse_foreign(self._path, _BEGIN.startswith(text[: len(_BEGIN)]), "one of --follow's records", "RUN")
        records = [record for record in folder.read_evaluations() if record.keys() >= {"checkpoint", "asked"}]
        self._known = [(record["checkpoint"], record["asked"]) for record in records]
        self._file = self._path.open("a", encoding="utf-8")
        if text and not text.endswith("\n"):
            self._file.write("\n")
        self._trackers = evaluation_trackers(folder)

    def __enter__(self) -> "_Records":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __contains__(self, key: tuple[str, dict[str, Any]]) -> bool:
        return key in self._known

    def add(self, step: int, digest: str, asked: dict[str, Any], metrics: dict[str, float]) -> None:
        record = {"step": step, "checkpoint": digest, "asked": asked, "figures": metrics}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._known.append((digest, asked))
        for tracker in self._trackers:
            tracker.write(step, {f"evaluation/{name}": value for name, value in metrics.items()})

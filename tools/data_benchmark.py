"""`benchmark.py prepare`: a corpus to a dataset on disk, beside the tokenizer library's own encoding in memory."""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from measuring import alternate

from overtok_megatron.data.preparing.prepare import Plan, prepare_sets
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.loading import infer_kind, load_tokenizer
from overtok_megatron.data.tokenizers.protocol import Tokenizer

_BATCH_BYTES = 1 << 19
_worker: list[Tokenizer] = []  # of a process of the library's pool


def _start(path: Path) -> None:
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    _worker.append(load_tokenizer(infer_kind(path), path))


def _encode(texts: list[str]) -> int:
    return sum(map(len, _worker[0].encode_batch(texts, 1)))


def _paragraphs(copies: int) -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in sotu_files()]
    return [part for _ in range(copies) for text in texts for part in text.split("\n\n") if part]


def _batches(texts: list[str]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        batches[-1].append(text)
        size += len(text)
        if size > _BATCH_BYTES:
            batches.append([])
            size = 0
    return batches


def _cpu_seconds(pool: ProcessPoolExecutor) -> float:
    """Of this process, its children that ended, and the pool's."""
    running = [psutil.Process(pid).cpu_times() for pid in pool._processes]
    return sum(os.times()[:4]) + sum(times.user + times.system for times in running)


def prepare_speed(options: argparse.Namespace) -> dict[str, Any]:
    """The whole of `overtok prepare`, worker start to synced files, beside encoding alone by running processes or threads."""
    path, workers = Path(options.tokenizer), options.threads
    tokenizer = load_tokenizer(infer_kind(path), path)
    texts = _paragraphs(options.copies)
    batches = _batches(texts)
    size = sum(len(text.encode()) for text in texts)
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as scratch,
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (path,)) as pool,
    ):
        corpus = Path(scratch) / "corpus.jsonl"
        with corpus.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        contenders: dict[str, Callable[[], object]] = {
            "overtok prepare": lambda: prepare_sets([corpus], Path(scratch) / "set", tokenizer, Plan(workers=workers)),
            "library, processes": lambda: sum(pool.map(_encode, batches)),
            "library, threads": lambda: [tokenizer.encode_batch(batch, workers) for batch in batches],
        }
        cpu: dict[str, list[float]] = {name: [] for name in contenders}

        def counted(name: str) -> Callable[[], object]:
            def run() -> None:
                begin = _cpu_seconds(pool)
                contenders[name]()
                cpu[name].append(_cpu_seconds(pool) - begin)

            return run

        seconds = alternate({name: counted(name) for name in contenders}, options.rounds, options.device)
    work = {name: statistics.median(values[2:]) for name, values in cpu.items()}
    return {
        "text_bytes": size,
        "documents": len(texts),
        "seconds": seconds,
        "cpu_seconds": work,
        "bytes_per_second": {name: size / value for name, value in seconds.items()},
        "share_of_library": _share(seconds),
        "share_of_library_cpu": _share(work),  # what remains of it where other work takes turns on the cores
    }


def _share(seconds: dict[str, float]) -> float:
    return min(seconds["library, processes"], seconds["library, threads"]) / seconds["overtok prepare"]

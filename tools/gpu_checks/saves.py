"""What a checkpoint of large tables costs the training beside it: waits, slower steps, memory; how fast it reads."""

import statistics
import time
from functools import partial
from pathlib import Path

import torch
from measuring import save_beside_steps, steps_as_in_a_run
from torch import Tensor

from gpu_checks.registry import Context, Result
from gpu_checks.timing import free_memory, seconds_of
from gpu_checks.training import configuration, engine_of, made_tokens, own_part
from overtok_megatron.checkpoint.tables import TableWriter
from overtok_megatron.checkpoint.writing import FILE_BYTES
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.kernels.rows import CHANGED
from overtok_megatron.ngram.snapshot import RowSnapshot
from overtok_megatron.parallel.copy_stream import CopyStream
from overtok_megatron.parallel.devices import synchronize

_SPARE = 256 * 2**20  # bytes that a save may take on the device, besides a tenth of the tables
_ROW_WIDTH = 512


def save(context: Context) -> Result:
    """Steps while all rows are written by the background thread, then a save of the rows that changed."""
    config = _configuration(context)
    engine = engine_of(context, config)
    assert engine.tables is not None
    table_bytes = sum(column.nbytes for column in engine.tables.columns().values())
    train = steps_as_in_a_run(engine, [own_part(engine, batch) for batch in made_tokens(context, config, 4)])

    def step() -> float:
        started = time.perf_counter()
        train()
        return time.perf_counter() - started

    for _ in range(3):
        step()
    _reset_peak(context)
    alone = statistics.median(step() for _ in range(8))
    peak_alone = _peak(context)
    folders = [_folder(context, name) for name in ("full", "changed")]
    writer = TableWriter(engine.tables, 2)
    _reset_peak(context)
    stall, during, whole = save_beside_steps(partial(writer.start_save, folders[0]), step, context.device)
    for _ in range(3):
        step()
    started = time.perf_counter()
    write = writer.start_save(folders[1])
    changed_stall = time.perf_counter() - started
    write()
    written = sum(path.stat().st_size for path in folders[0].rglob("*.safetensors"))
    assert written >= table_bytes, f"{written} bytes were written of {table_bytes}"
    numbers = {
        "table_bytes": table_bytes, "stall_seconds": stall, "changed_stall_seconds": changed_stall,
        "step_seconds_alone": alone, "step_seconds_during": statistics.median(during), "steps_during": len(during),
        "save_seconds": whole, "extra_device_bytes": max(0, _peak(context) - peak_alone),
    }  # fmt: skip
    return _result(context, numbers)


def read(context: Context) -> Result:
    """How fast rows come to host memory, and how long a step's thread is busy preserving rows while the device works.

    A save that makes that thread wait for the device fails the check.
    """
    row_bytes = 2 * _ROW_WIDTH + 4 + 1
    count = (2**30 if context.cuda else 2**22) // row_bytes
    columns = {
        "weight": torch.ones(count, _ROW_WIDTH, dtype=torch.bfloat16, device=context.device),
        "square_sum": torch.ones(count, device=context.device),
        "touched": torch.full((count,), CHANGED, dtype=torch.uint8, device=context.device),
    }
    stream = CopyStream(context.device)
    source = columns["weight"][: count // 4]
    target = stream.buffer(source)

    def copy() -> None:
        stream.read(target, source)
        stream.mark().synchronize()

    def take_all() -> RowSnapshot:
        snapshot = RowSnapshot(columns, stream)
        step = FILE_BYTES // row_bytes
        for first in range(0, count, step):
            snapshot.take(min(first + step, count))
        return snapshot

    bus = source.nbytes / seconds_of(copy, context.device)
    rate = count * row_bytes / seconds_of(take_all, context.device, rounds=3, warm=1)
    changed = torch.arange(0, count, 16, device=context.device)
    calls, busy = _preserving(context, RowSnapshot(columns, stream), changed)
    numbers = {"bus_bytes_per_second": bus, "bytes_per_second": rate, "preserve_seconds": calls, "busy_seconds": busy}
    words = f"{rate / 1e9:.1f} GB/s; {1e3 * calls:.1f} ms to ask for {len(changed)} rows"
    return Result(True, words, f"{bus / 1e9:.1f} GB/s; device busy {1e3 * busy:.0f} ms", numbers)


def _preserving(context: Context, snapshot: RowSnapshot, rows: Tensor) -> tuple[float, float]:
    """Median seconds of a call of `preserve` while the device has work to do, and how long that work takes.

    On a GPU, torch raises where a call waits for the device.
    """
    size = 8192 if context.cuda else 64
    factor = torch.ones(size, size, device=context.device)
    times: list[float] = []
    busy = seconds_of(lambda: [factor @ factor for _ in range(8)], context.device)
    for _ in range(5):
        for _ in range(8):
            factor @ factor
        if context.cuda:
            torch.cuda.set_sync_debug_mode("error")
        started = time.perf_counter()
        snapshot.preserve(rows)
        times.append(time.perf_counter() - started)
        if context.cuda:
            torch.cuda.set_sync_debug_mode("default")
        synchronize(context.device)
    return statistics.median(times), busy


def _configuration(context: Context) -> RunConfig:
    """A small model with tables of 1 GiB on a GPU, 4 GiB in the long form, or a quarter of what is free."""
    rows = 4001
    if context.cuda:
        rows = int(min((1 if context.quick else 4) * 2**30, free_memory(context) // 4)) // (4 * _ROW_WIDTH * 2)
    return configuration(
        {
            "model.vocab_size": 8192 if context.cuda else 320, "model.hidden_size": 512 if context.cuda else 32,
            "model.intermediate_size": 1024 if context.cuda else 48, "model.num_layers": 2,
            "model.num_attention_heads": 4, "data.seq_length": 512 if context.cuda else 32,
            "over_encoding.enabled": True, "over_encoding.table_rows": rows, "over_encoding.row_width": _ROW_WIDTH,
            "over_encoding.init_std": 0.0, "over_encoding.collision_check": "warn",
            "training.micro_batch_size": 8, "training.global_batch_size": 8,
        }, 1
    )  # fmt: skip


def _result(context: Context, numbers: dict[str, float]) -> Result:
    """The numbers in words, and whether the save took no more memory of the device than is allowed."""
    extra, allowed = numbers["extra_device_bytes"], numbers["table_bytes"] // 10 + _SPARE
    alone = numbers["step_seconds_alone"]
    words = f"{numbers['table_bytes'] / 1e9:.2f} GB: waits {1e3 * numbers['stall_seconds']:.0f} ms"
    words += f", changed rows {1e3 * numbers['changed_stall_seconds']:.0f} ms"
    words += f", steps {numbers['step_seconds_during'] / alone:.2f} x for {numbers['save_seconds']:.1f} s"
    limit = f"{1e3 * alone:.0f} ms (a step alone)"
    if context.cuda:
        words += f", {extra / 2**30:.2f} GiB of the device"
        limit += f", {allowed / 2**30:.2f} GiB"
    return Result(not context.cuda or extra <= allowed, words, limit, numbers)


def _folder(context: Context, name: str) -> Path:
    folder = context.folder / f"save-{name}"
    folder.mkdir()
    return folder


def _reset_peak(context: Context) -> None:
    if context.cuda:
        torch.cuda.reset_peak_memory_stats(context.device)


def _peak(context: Context) -> int:
    """Of the device; the CPU's own record cannot be reset."""
    return torch.cuda.max_memory_allocated(context.device) if context.cuda else 0

"""Speed of a model with about 1B parameters: tokens/s, model FLOPs utilisation, cost of over-encoding, longest kernels."""

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import steps_as_in_a_run
from torch.profiler import ProfilerActivity, profile

from gpu_checks.registry import Context, Result
from gpu_checks.timing import busy_seconds, device_spans, free_memory
from gpu_checks.training import Settings, configuration, engine_of, made_tokens, own_part
from overtok_megatron.config.counts import bytes_per_rank, flops_per_token, parameter_counts
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.parallel.devices import synchronize
from overtok_megatron.training.measuring import peak_memory
from overtok_megatron.training.peaks import peak_flops

_ROWS = 12_800_000  # of each of four tables
# Bytes that a micro-batch of 8,192 tokens of 16 layers may need, with the engine's buffers, beside weights, gradients and
# optimizer state. Measured on an H100: a peak of 33.5 GiB with 20.2 of state at V 32,000, 39.3 with 24.9 at V 100,278.
_ACTIVATIONS = 18 * 2**30
_MICRO_BATCHES = 4  # per step in the full form: AdamW's time weighs four times as much in a step of one micro-batch
_LAYERS = (16, 8, 4, 2)
_TOP = 5


def _shape(context: Context, vocabulary: int) -> Settings:
    """d 2048, sequences of 4096, 16 layers or as many of `_LAYERS` as leave a tenth of the device's memory for tables; at most
    4 layers and one micro-batch per step in the quick form; something tiny on the CPU."""
    if not context.cuda:
        return {
            "model.vocab_size": vocabulary // 100, "model.hidden_size": 32, "model.intermediate_size": 64,
            "model.num_layers": 2, "model.num_attention_heads": 2, "data.seq_length": 32,
            "training.micro_batch_size": 2, "training.global_batch_size": 2,
        }  # fmt: skip
    settings: Settings = {
        "model.vocab_size": vocabulary, "model.hidden_size": 2048, "model.intermediate_size": 8192,
        "model.num_attention_heads": 16, "data.seq_length": 4096,
        "training.micro_batch_size": 2, "training.global_batch_size": 2 if context.quick else 2 * _MICRO_BATCHES,
    }  # fmt: skip
    room = 0.9 * free_memory(context)
    for layers in _LAYERS[2:] if context.quick else _LAYERS:
        settings["model.num_layers"] = layers
        if bytes_per_rank(configuration(settings, 1), 1).total + _ACTIVATIONS * layers / 16 < room:
            break
    return settings


def _tables(context: Context, dense: RunConfig) -> Settings:
    """Four tables of 12.8 M rows of 512, or of as many as the device's memory leaves room for; rows begin at zero."""
    rows = 3001
    if context.cuda:
        taken = bytes_per_rank(dense, 1).total + _ACTIVATIONS * dense.model.num_layers / 16
        room = free_memory(context) - taken
        rows = min(_ROWS, int(room * 0.8) // (4 * (512 * 2 + 2 + 1)))
        if rows < 100_000:
            raise RuntimeError(f"{max(0, room) / 2**30:.1f} GiB are left for tables beside the model")
    return {
        "over_encoding.enabled": True,
        "over_encoding.table_rows": rows,
        "over_encoding.init_std": 0.0,
        "over_encoding.collision_check": "warn",
    }


class Model:
    """The check of one vocabulary, with tables or without; without has to come first, for the ratio of step times."""

    def __init__(self, vocabulary: int, *, tables: bool) -> None:
        self.vocabulary, self.tables = vocabulary, tables

    def __call__(self, context: Context) -> Result:
        settings = _shape(context, self.vocabulary)
        if self.tables:
            settings |= _tables(context, configuration(settings, 1))
        config = configuration(settings, 1)
        speed = _speed(context, config)
        peak = peak_flops(context.device, torch.bfloat16)
        tokens = config.training.global_batch_size * config.data.seq_length
        rate = tokens / speed.seconds
        reached = rate * flops_per_token(config)
        ratio = self._ratio(context.folder, speed.seconds)
        words = [f"{config.model.num_layers} layers, {tokens:,} tokens per step, {rate:,.0f} tokens/s"]
        words += [f"{reached / 1e12:.4g} TFLOP/s"]
        words += [f"MFU {reached / peak.flops:.1%}, {speed.peak_bytes / 2**30:.1f} GiB"]
        words += [] if speed.busy is None else [f"device busy {speed.busy / speed.seconds:.0%} of a step's time"]
        words += [f"{config.over_encoding.table_rows:,} rows x 4"] if self.tables else []
        words += [] if ratio is None else [f"step {ratio:.2f} x without tables"]
        numbers = asdict(speed) | {
            "tokens_per_step": tokens, "tokens_per_second": rate, "flops": reached,
            "peak_flops": peak.flops, "peak_source": peak.source, "utilisation": reached / peak.flops, "ratio": ratio,
            "parameters": parameter_counts(config).total, "table_rows": config.over_encoding.table_rows or 0,
        }  # fmt: skip
        return Result(None, ", ".join(words), f"{peak.flops / 1e12:.4g} TFLOP/s ({peak.source})", numbers)

    def _ratio(self, folder: Path, seconds: float) -> float | None:
        """Step time with tables divided by that without, which an earlier check left in a file; None without that file."""
        path = folder / f"step-seconds-{self.vocabulary}.json"
        if not self.tables:
            path.write_text(json.dumps(seconds), encoding="utf-8")
            return None
        return seconds / float(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


@dataclass(frozen=True)
class Speed:
    """seconds: median time of a step. kernels: those that took longest in one step that was profiled.

    busy: seconds of that step during which the device worked. profiled: its seconds from the first kernel's beginning to the
    last one's end. Both are None on the CPU, and where the profiler sees nothing of the device. The profiler slows the host but
    not the kernels, so busy / seconds is the device's share of a step that is not profiled; busy / profiled is less.
    """

    seconds: float
    losses: list[float]
    peak_bytes: int
    kernels: list[dict[str, Any]]
    busy: float | None
    profiled: float | None


def _speed(context: Context, config: RunConfig) -> Speed:
    """Time some steps after two that are not counted, then profile one."""
    engine = engine_of(context, config)
    step = steps_as_in_a_run(engine, [own_part(engine, batch) for batch in made_tokens(context, config, 4)])
    rounds = 3 if context.quick or not context.cuda else 6
    times, losses = [], []
    for _ in range(2 + rounds):
        start = time.perf_counter()
        losses.append(step().loss)  # reads the loss; what the device still does behind it counts in the next step
        times.append(time.perf_counter() - start)
    assert all(math.isfinite(loss) for loss in losses), f"a loss is not finite: {losses}"
    peak = peak_memory(context.device)
    return Speed(statistics.median(times[2:]), losses, peak, *_profiled(context, step))


def _profiled(context: Context, work: Any) -> tuple[list[dict[str, Any]], float | None, float | None]:
    """`kernels` (operators on the CPU), `busy` and `profiled` of Speed, from one call."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.cuda else [])]
    synchronize(context.device)
    with profile(activities=activities) as profiler:
        work()
        synchronize(context.device)
    if not context.cuda:
        found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:_TOP]
        return [{"name": event.key, "seconds": event.self_cpu_time_total / 1e6} for event in found], None, None
    spans = device_spans(profiler.events() or [])
    totals: dict[str, float] = {}
    for span in spans:
        totals[span.name] = totals.get(span.name, 0.0) + span.stop - span.start
    longest = sorted(totals.items(), key=lambda item: -item[1])[:_TOP]
    top = [{"name": name[:120], "seconds": seconds} for name, seconds in longest]
    if not spans:
        return top, None, None
    return top, busy_seconds(spans), max(span.stop for span in spans) - min(span.start for span in spans)

"""Speed of a model of the 1B class: tokens/s, model FLOPs utilisation, what over-encoding costs, where the time goes."""

import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_checks.registry import Context, Result
from gpu_checks.timing import free_memory
from gpu_checks.training import Settings, configuration, engine_of, made_tokens, own_part
from overtok_megatron.config.counts import bytes_per_rank, flops_per_token, parameter_counts
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.training.metrics import peak_memory
from overtok_megatron.training.peaks import peak_flops

_ROWS = 12_800_000  # of each of four tables
_ACTIVATIONS = 18 * 2**30  # bytes that 8,192 tokens of this shape need at most, beside the model's state
_TOP = 5


def _shape(context: Context, vocabulary: int) -> Settings:
    """d 2048, 16 layers, sequences of 4096; 4 layers in the quick form; something tiny on the CPU."""
    if not context.cuda:
        return {
            "model.vocab_size": vocabulary // 100, "model.hidden_size": 32, "model.intermediate_size": 64,
            "model.num_layers": 2, "model.num_attention_heads": 2, "data.seq_length": 32,
            "training.micro_batch_size": 2, "training.global_batch_size": 2,
        }  # fmt: skip
    return {
        "model.vocab_size": vocabulary, "model.hidden_size": 2048, "model.intermediate_size": 8192,
        "model.num_layers": 4 if context.quick else 16, "model.num_attention_heads": 16, "data.seq_length": 4096,
        "training.micro_batch_size": 2, "training.global_batch_size": 2,
    }  # fmt: skip


def _tables(context: Context, dense: RunConfig) -> Settings:
    """Four tables of 12.8 M rows of 512, or of as many as the device's memory leaves room for; rows begin at zero."""
    rows = 3001
    if context.cuda:
        room = free_memory(context) - bytes_per_rank(dense, 1).total - _ACTIVATIONS
        rows = min(_ROWS, int(room * 0.9) // (4 * (512 * 2 + 2 + 1)))
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
        trainer = engine_of(context, config)
        parts = [own_part(trainer, batch) for batch in made_tokens(context, config, 4)]
        rounds = 3 if context.quick or not context.cuda else 6
        times, losses = [], []
        for turn in range(2 + rounds):
            begin = time.perf_counter()
            losses.append(trainer.step(parts[turn % len(parts)], 1e-4).loss)  # its loss is read: the device is done
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times[2:])
        top, idle = _profiled(context, lambda: trainer.step(parts[0], 1e-4))
        peak = peak_flops(context.device, torch.bfloat16)
        rate = config.training.global_batch_size * config.data.seq_length / seconds
        reached = rate * flops_per_token(config)
        numbers = {
            "step_seconds": seconds, "tokens_per_second": rate, "flops": reached, "peak_flops": peak.flops,
            "peak_source": peak.source, "utilisation": reached / peak.flops, "kernels": top, "idle_share": idle,
            "losses": losses, "parameters": parameter_counts(config).total, "peak_bytes": peak_memory(context.device),
            "table_rows": config.over_encoding.table_rows or 0,
        }  # fmt: skip
        del trainer
        gc.collect()
        words = [f"{rate:,.0f} tokens/s", f"{reached / 1e12:.4g} TFLOP/s", f"MFU {reached / peak.flops:.1%}"]
        words += [f"{numbers['peak_bytes'] / 2**30:.1f} GiB"] + ([] if idle is None else [f"idle {idle:.1%}"])
        numbers["ratio"] = self._ratio(context.folder, seconds)
        if self.tables:
            words += [f"{config.over_encoding.table_rows:,} rows x 4"]
            words += [] if numbers["ratio"] is None else [f"step {numbers['ratio']:.2f} x without tables"]
        assert all(loss == loss for loss in losses), "a loss is NaN"
        limit = f"{peak.flops / 1e12:.4g} TFLOP/s ({peak.source})"
        return Result(None, ", ".join(words), limit, numbers)

    def _ratio(self, folder: Path, seconds: float) -> float | None:
        """Step time with tables over that without, of which a file tells; None without it."""
        path = folder / f"step-seconds-{self.vocabulary}.json"
        if not self.tables:
            path.write_text(json.dumps(seconds), encoding="utf-8")
            return None
        return seconds / float(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _profiled(context: Context, work: Any) -> tuple[list[dict[str, Any]], float | None]:
    """The kernels (operators on the CPU) that took longest in one call, and the share of it in which the device was idle."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.cuda else [])]
    with profile(activities=activities) as profiler:
        work()
    events = profiler.events()
    assert events is not None
    if not context.cuda:
        found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:_TOP]
        return [{"name": event.key, "seconds": event.self_cpu_time_total / 1e6} for event in found], None
    totals: dict[str, float] = {}
    spans = []
    for event in events:
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        begin, end = event.time_range.start, event.time_range.end  # microseconds
        totals[event.name] = totals.get(event.name, 0.0) + (end - begin) / 1e6
        spans.append((begin, end))
    longest = sorted(totals.items(), key=lambda item: -item[1])[:_TOP]
    return [{"name": name[:120], "seconds": seconds} for name, seconds in longest], idle_share(spans)


def idle_share(spans: list[tuple[float, float]]) -> float | None:
    """Share of the time from the first beginning to the last end that no span covers; None without spans."""
    if not spans:
        return None
    spans = sorted(spans)
    covered, reached = 0.0, spans[0][0]
    for begin, end in spans:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    whole = reached - spans[0][0]
    return 1.0 - covered / whole if whole > 0 else 0.0

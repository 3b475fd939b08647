"""Whether a machine can hold what a configuration asks of it: any machine, or a given one."""

import os
from collections.abc import Iterator

from overtok_megatron.config.counts import bytes_per_rank
from overtok_megatron.config.derived import accumulation_steps, further_tokens
from overtok_megatron.config.problems import PROCESSES, Problem, problem
from overtok_megatron.config.schema import RunConfig

MOST_BYTES = 2**46  # 64 TiB: twice the memory of the largest single machines on sale
_TIB, _GIB = 2**40, 2**30
_SMALLER_BATCH = "use a smaller batch or a shorter data.seq_length"


def most_processes() -> int:
    """How many processes of ours may run side by side on this host."""
    return max(64, 4 * (os.cpu_count() or 1))


def capacity_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """The state, one micro-batch's residual stream and one step's tokens of a rank must each fit into MOST_BYTES."""
    smaller = f"use a smaller model, or more than {world_size} ranks"
    ways_out = (smaller, smaller, _SMALLER_BATCH, _SMALLER_BATCH)
    for (key, value, held, name), way_out in zip(_parts(config, world_size), ways_out, strict=True):
        if held > MOST_BYTES:
            reason = (
                f"makes {held / _TIB:,.0f} TiB of {name} on one rank, and no machine holds more than "
                f"{MOST_BYTES // _TIB}; {way_out}"
            )
            yield problem(key, value, reason)


def host_problems(config: RunConfig, processes: int, memory: int, world_size: int) -> Iterator[Problem]:
    """The `processes` of a run's `world_size` ranks that share the `memory` bytes of one host must fit into it.

    Only what is needed in any case is counted; activations and libraries come on top.
    """
    most = most_processes()
    if processes > most:
        yield problem(PROCESSES, processes, f"is more than this host can run; {most} is the most")
        return
    parts = _parts(config, world_size)
    total = processes * sum(held for _, _, held, _ in parts)
    if total > memory:
        key, value, held, name = max(parts, key=lambda part: part[2])
        run = "the run needs" if processes == world_size else f"{processes} of the run's {world_size} ranks need"
        reason = (
            f"{run} at least {total / _GIB:,.1f} GiB, of which {processes * held / _GIB:,.1f} are {name}, and "
            f"this host has {memory / _GIB:,.1f}; use a smaller one"
        )
        yield problem(key, value, reason)


def _parts(config: RunConfig, world_size: int) -> list[tuple[str, object, int, str]]:
    """What the fullest rank holds: (the key that makes it large, its value, bytes, name)."""
    size = bytes_per_rank(config, world_size)
    tables = size.table_rows + size.table_state
    over, model, training = config.over_encoding, config.model, config.training
    length = config.data.seq_length // config.parallel.context_parallel_size
    residual = training.micro_batch_size * length * model.hidden_size * (2 if training.precision == "bf16" else 4)
    sample = config.data.seq_length + 1 + further_tokens(config)
    tokens = accumulation_steps(config, world_size) * training.micro_batch_size * sample * 8
    return [
        ("over_encoding.table_rows", over.table_rows, tables, "n-gram tables"),
        ("model.hidden_size", model.hidden_size, size.total - tables, "dense weights and their optimizer"),
        ("training.micro_batch_size", training.micro_batch_size, residual, "activations between two layers"),
        ("training.global_batch_size", training.global_batch_size, tokens, "tokens per step"),
    ]

"""All rules across keys, as one function of (configuration, world size); a dry run and the launcher call the same."""

import logging
import math
from collections.abc import Callable

from overtok_megatron.config import deepspeed_config
from overtok_megatron.config.capacity import check_capacity, check_host, most_processes
from overtok_megatron.config.collisions import collision_problem
from overtok_megatron.config.derived import (
    accumulation_steps,
    blocks_per_stage,
    data_parallel_size,
    even_stages,
    hash_base,
    train_iters,
)
from overtok_megatron.config.loading import COMMAND_LINE, DEFAULT
from overtok_megatron.config.model_rules import check_model
from overtok_megatron.config.nearest import nearest_divisor, nearest_multiple, number_does
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.wording import line, short
from overtok_megatron.errors import ConfigError

log = logging.getLogger(__name__)

MOST_RANKS = 2**20

Locate = Callable[[str], str]


class _Checker:
    """Raises at the first broken rule, naming place, key, value, reason and what works."""

    def __init__(self, locate: Locate) -> None:
        self._locate = locate

    def need(self, holds: bool, key: str, value: object, reason: str) -> None:
        if not holds:
            raise ConfigError(line(self.place(key), f"{key}: {short(str(value))}; {reason}"))

    def place(self, key: str) -> str:
        """Where a key was given; where nobody gave it, its section. An option is given on the command line."""
        if key.startswith("--"):
            return COMMAND_LINE
        place = self._locate(key)
        return self._locate(key.partition(".")[0]) if place == DEFAULT else place


def validate(config: RunConfig, world_size: int, locate: Locate) -> None:
    """Raise ConfigError unless the configuration can run on `world_size` ranks. `locate` tells where a key was given."""
    check = _Checker(locate)
    check.need(world_size <= MOST_RANKS, "--processes", world_size, f"at most {MOST_RANKS} ranks can train together")
    _check_parallel(config, world_size, check)
    check_model(config, check.need)
    _check_tokenizer(config, check)
    if config.over_encoding.enabled:
        _check_over_encoding(config, check, locate)
        per_host = config.over_encoding.ranks_per_host or 1
        check.need(
            world_size % per_host == 0,
            "over_encoding.ranks_per_host",
            per_host,
            f"does not divide the {world_size} ranks (--processes); {number_does(nearest_divisor(world_size, per_host))}",
        )
    _check_schedule(config, check)
    _check_trace(config, world_size, check)
    _check_precision(config, world_size, check)
    check_capacity(config, world_size, check.need)
    deepspeed_config.derive(config, world_size, check.place)


def validate_host(config: RunConfig, processes: int, memory: int, locate: Locate) -> None:
    """Raise ConfigError where `processes` ranks, all on the CPU of a host with `memory` bytes, cannot fit there."""
    check = _Checker(locate)
    most = most_processes()
    check.need(processes <= most, "--processes", processes, f"is more than this host can run; {most} is the most")
    check_host(config, processes, memory, check.need)


def validate_model(config: RunConfig, locate: Locate) -> None:
    """Raise ConfigError unless the model itself is sound, whatever number of ranks is to run it."""
    check = _Checker(locate)
    check_model(config, check.need)
    if config.over_encoding.enabled:
        _check_over_encoding(config, check, locate)


def _check_parallel(config: RunConfig, world_size: int, check: _Checker) -> None:
    parallel = config.parallel
    tensor, context = parallel.tensor_parallel_size, parallel.context_parallel_size
    taken = 1
    for key, size in (
        ("tensor_parallel_size", tensor),
        ("context_parallel_size", context),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size),
    ):
        left = world_size // taken
        beside = f" left by the other axes of {world_size}" if taken > 1 else " (--processes)"
        check.need(
            left % size == 0,
            f"parallel.{key}",
            size,
            f"does not divide the {left} ranks{beside}; {number_does(nearest_divisor(left, size))}",
        )
        taken *= size
    check.need(
        not parallel.sequence_parallel or tensor > 1,
        "parallel.sequence_parallel",
        True,
        "splits nothing with parallel.tensor_parallel_size 1; write false",
    )
    _check_pipeline(config, check)
    stage = parallel.zero_stage
    check.need(
        tensor == 1 or stage < 3,
        "parallel.zero_stage",
        stage,
        "does not go with parallel.tensor_parallel_size > 1: both split the weights; use 2, or tensor_parallel_size 1",
    )
    check.need(
        parallel.offload_optimizer == "none" or stage > 0,
        "parallel.offload_optimizer",
        parallel.offload_optimizer,
        "needs parallel.zero_stage 1 or more, which owns the state that moves; use zero_stage 1, or none",
    )
    length, slices = config.data.seq_length, tensor * context
    names = "parallel.tensor_parallel_size" + (" x context_parallel_size" if context > 1 else "")
    check.need(
        length % slices == 0,
        "data.seq_length",
        length,
        f"must be a multiple of {names} {slices}; {math.ceil(length / slices) * slices} is",
    )
    data = data_parallel_size(config, world_size)
    batch, unit = config.training.global_batch_size, config.training.micro_batch_size * data
    check.need(
        batch % unit == 0,
        "training.global_batch_size",
        batch,
        f"must be a multiple of micro_batch_size {config.training.micro_batch_size} x {data} data-parallel ranks; "
        f"{nearest_multiple(unit, batch)} is",
    )


def _check_pipeline(config: RunConfig, check: _Checker) -> None:
    parallel, layers = config.parallel, config.model.num_layers
    stages, partition = parallel.pipeline_parallel_size, parallel.pipeline_partition
    if isinstance(partition, list):
        even = "does"
        if stages <= 16:
            even = f"is {even_stages(layers, stages)}"
        check.need(
            len(partition) == stages and sum(partition) == layers,
            "parallel.pipeline_partition",
            partition,
            f"must be {stages} numbers (pipeline_parallel_size) with the sum {layers} (model.num_layers); uniform {even}",
        )
    if stages == 1:
        return
    check.need(
        all(blocks_per_stage(config)[1:-1]) and (isinstance(partition, list) or layers >= stages),
        "parallel.pipeline_parallel_size",
        stages,
        f"leaves stages without a block: there are {layers} (model.num_layers); {min(stages, layers)} is the most",
    )
    check.need(
        parallel.zero_stage < 2,
        "parallel.zero_stage",
        parallel.zero_stage,
        "does not go with pipeline_parallel_size > 1: gradients of all micro-batches stay on the stage until the step "
        "ends, so DeepSpeed cannot split them; use 1",
    )
    check.need(
        config.training.precision == "fp32" or parallel.zero_stage == 1,
        "parallel.zero_stage",
        parallel.zero_stage,
        "with bf16 and a pipeline adds the gradients of micro-batches in bfloat16, which loses small ones; use 1",
    )
    check.need(
        parallel.offload_optimizer == "none",
        "parallel.offload_optimizer",
        parallel.offload_optimizer,
        "is not offered by DeepSpeed's pipeline engine for this optimizer; use none, or pipeline_parallel_size 1",
    )


def _check_tokenizer(config: RunConfig, check: _Checker) -> None:
    tokenizer = config.tokenizer
    if tokenizer.type == "bytes":
        check.need(
            tokenizer.path is None,
            "tokenizer.path",
            tokenizer.path,
            "is no part of tokenizer.type: bytes; write null, or remove it",
        )
        check.need(
            tokenizer.eod_token is None,
            "tokenizer.eod_token",
            tokenizer.eod_token,
            "is no part of tokenizer.type: bytes, where 256 ends documents; write null, or remove it",
        )
    else:
        check.need(
            tokenizer.path is not None,
            "tokenizer.path",
            "none",
            f"is needed with tokenizer.type: {tokenizer.type}: the model file",
        )


def _check_over_encoding(config: RunConfig, check: _Checker, locate: Locate) -> None:
    over, model = config.over_encoding, config.model
    tables = (over.ngram_order - 1) * over.num_slices
    check.need(
        over.table_rows is not None,
        "over_encoding.table_rows",
        "none",
        f"is needed with over_encoding.enabled: rows of a table, for example {round(128.618 * model.vocab_size)}",
    )
    assert over.table_rows is not None
    check.need(
        over.row_width is not None or model.hidden_size % tables == 0,
        "over_encoding.num_slices",
        over.num_slices,
        f"makes {tables} tables (ngram_order - 1 times num_slices), which do not divide hidden_size "
        f"{model.hidden_size}; {nearest_divisor(model.hidden_size, tables)} tables do, or give over_encoding.row_width",
    )
    check.need(
        over.pad_id < model.vocab_size,
        "over_encoding.pad_id",
        over.pad_id,
        f"is no token of a vocabulary of {model.vocab_size}; 0 to {model.vocab_size - 1} are",
    )
    _check_table_rows(config, "over_encoding.table_rows", "", over.table_rows, tables, check, locate)
    for number, group in enumerate(over.added):
        entry = f"entry {number}, "
        check.need(
            len(set(group.orders)) == len(group.orders),
            "over_encoding.added",
            f"{entry}orders {group.orders}",
            "names an order twice; use num_slices for several tables of one order",
        )
        count = len(group.orders) * group.num_slices
        _check_table_rows(config, "over_encoding.added", f"{entry}table_rows ", group.table_rows, count, check, locate)


def _check_table_rows(
    config: RunConfig, key: str, entry: str, rows: int, tables: int, check: _Checker, locate: Locate
) -> None:
    """The sizes rows, rows + 2, .. of `tables` tables, which `key` gives; entry: where in the key's value, for messages."""
    over = config.over_encoding
    most = 2**31 - 1 - 2 * (tables - 1)
    check.need(
        rows <= most,
        key,
        f"{entry}{rows}",
        f"puts the last table at 2^31 rows or more, where hashing can overflow 64 bits; at most {most}",
    )
    base = hash_base(config.model, over)
    problem = collision_problem(rows, base, tables)
    if problem is None:
        return
    if problem.proposed_rows is None:
        way_out = "no size does with this base and so many tables"
    else:
        way_out = f"{problem.proposed_rows} is a good size nearby"
    text = (
        f"is {problem.ratio:.2f} times the hash base {base} (table {problem.table}): so close to an integer that "
        f"frequent n-grams share rows; {way_out}"
    )
    if over.collision_check == "error":
        check.need(False, key, f"{entry}{rows}", f"{text} (over_encoding.collision_check: warn lets it pass)")
    log.warning("%s: %s: %s%d %s", locate(key), key, entry, rows, text)


def _check_schedule(config: RunConfig, check: _Checker) -> None:
    training, optimizer = config.training, config.optimizer
    given = [training.train_iters, training.train_tokens]
    check.need(
        given.count(None) == 1,
        "training.train_iters",
        "not given" if training.train_iters is None else training.train_iters,
        "give either training.train_iters or training.train_tokens, and not both",
    )
    total = train_iters(config)
    check.need(
        optimizer.warmup_iters < total,
        "optimizer.warmup_iters",
        optimizer.warmup_iters,
        f"must be less than the {total} steps of the run; {total // 10} is",
    )
    check.need(
        optimizer.min_learning_rate <= optimizer.learning_rate,
        "optimizer.min_learning_rate",
        optimizer.min_learning_rate,
        f"must not pass optimizer.learning_rate {optimizer.learning_rate}",
    )
    decay = optimizer.decay_iters
    if optimizer.schedule == "wsd":
        check.need(
            decay is not None, "optimizer.decay_iters", "none", "the wsd schedule needs it: steps of the final decay"
        )
        assert decay is not None
        check.need(
            decay + optimizer.warmup_iters <= total,
            "optimizer.decay_iters",
            decay,
            f"with warmup_iters {optimizer.warmup_iters} passes the {total} steps of the run",
        )
    else:
        check.need(decay is None, "optimizer.decay_iters", decay, "belongs to optimizer.schedule: wsd; remove it")


def _check_precision(config: RunConfig, world_size: int, check: _Checker) -> None:
    stage, steps = config.parallel.zero_stage, accumulation_steps(config, world_size)
    check.need(
        config.training.precision == "fp32" or stage > 0 or steps == 1,
        "parallel.zero_stage",
        stage,
        f"with bf16 adds the gradients of {steps} micro-batches in bfloat16, which loses small ones; use 1",
    )


def _check_trace(config: RunConfig, world_size: int, check: _Checker) -> None:
    steps, ranks = config.logging.trace_steps, config.logging.trace_ranks
    check.need(
        not steps or (len(steps) == 2 and steps[0] <= steps[1]),
        "logging.trace_steps",
        steps,
        "must be the first and the last step to trace, as [3, 4]",
    )
    check.need(
        not steps or (bool(ranks) and max(ranks) < world_size),
        "logging.trace_ranks",
        ranks,
        f"must name ranks of this run; 0 to {world_size - 1} are",
    )

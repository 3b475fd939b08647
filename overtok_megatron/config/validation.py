"""All rules across keys, as one function of (configuration, world size); a dry run and the launcher call the same.

Rules are generators of problems, by section: here those of the tokenizer, the schedule and the trace, the others in
parallel_rules.py, model_rules.py, output_rules.py, table_rules.py, capacity.py and deepspeed_config.py. What a problem is:
problems.py.
"""

import logging
from collections.abc import Iterator

from overtok_megatron.config.capacity import capacity_problems, host_problems
from overtok_megatron.config.deepspeed_config import contradictions, refused_keys
from overtok_megatron.config.derived import train_iters
from overtok_megatron.config.model_rules import model_problems
from overtok_megatron.config.output_rules import output_problems
from overtok_megatron.config.parallel_rules import MOST_RANKS, axis_problems, parallel_problems, precision_problems
from overtok_megatron.config.problems import PROCESSES, Locate, Problem, problem, refuse
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.table_rules import collision_warnings, host_group_problems, table_problems

log = logging.getLogger(__name__)


def validate(config: RunConfig, world_size: int, locate: Locate) -> None:
    """Raise ConfigError, a line for each problem, unless the configuration can run on `world_size` ranks.

    `locate` tells where a key was given.
    """
    refuse(run_problems(config, world_size), locate)
    _warn_of_collisions(config, locate)


def validate_host(
    config: RunConfig, processes: int, memory: int, locate: Locate, *, world_size: int | None = None
) -> None:
    """Raise ConfigError where `processes` ranks, all on the CPU of a host with `memory` bytes, cannot fit there.

    world_size: of the run; None = all its ranks are on this host.
    """
    refuse(host_problems(config, processes, memory, world_size or processes), locate)


def validate_model(config: RunConfig, locate: Locate) -> None:
    """Raise ConfigError unless the model itself is sound, whatever number of ranks is to run it."""
    tables = table_problems(config) if config.over_encoding.enabled else ()
    refuse([*model_problems(config), *output_problems(config), *tables], locate)
    _warn_of_collisions(config, locate)


def run_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """Every broken rule; `refuse` leaves out those that only follow from others."""
    found = list(axis_problems(config, world_size))
    divided = not found
    found += parallel_problems(config, world_size, divided=divided)
    found += model_problems(config)
    found += output_problems(config)
    found += _tokenizer_problems(config)
    if config.over_encoding.enabled:
        found += table_problems(config)
        if world_size <= MOST_RANKS:
            found += host_group_problems(config, world_size)
    found += _schedule_problems(config)
    found += _start_problems(config)
    found += _trace_problems(config, world_size)
    if divided:
        found += precision_problems(config, world_size)
    if not found:  # bytes follow from nearly every key
        found += capacity_problems(config, world_size)
    found += refused_keys(config)
    if divided:
        found += contradictions(config, world_size)
    return found


def _tokenizer_problems(config: RunConfig) -> Iterator[Problem]:
    tokenizer = config.tokenizer
    if tokenizer.type != "bytes":
        if tokenizer.path is None:
            yield problem("tokenizer.path", "none", f"is needed with tokenizer.type: {tokenizer.type}: the model file")
        return
    if tokenizer.path is not None:
        reason = "is no part of tokenizer.type: bytes; write null, or remove it"
        yield problem("tokenizer.path", tokenizer.path, reason)
    if tokenizer.eod_token is not None:
        reason = "is no part of tokenizer.type: bytes, where 256 ends documents; write null, or remove it"
        yield problem("tokenizer.eod_token", tokenizer.eod_token, reason)


def _schedule_problems(config: RunConfig) -> Iterator[Problem]:
    training, optimizer = config.training, config.optimizer
    given = [training.train_iters, training.train_tokens]
    known = given.count(None) == 1
    if not known:
        reason = "give either training.train_iters or training.train_tokens, and not both"
        yield problem("training.train_iters", "not given" if training.train_iters is None else given[0], reason)
    length: tuple[str, ...] = ("training.train_iters", "training.train_tokens")
    if training.train_iters is None:  # a length in tokens is counted in steps of the batch
        length += ("training.global_batch_size", "data.seq_length")
    if known and optimizer.warmup_iters >= train_iters(config):
        total = train_iters(config)
        reason = f"must be less than the {total} steps of the run; {total // 10} is"
        yield problem("optimizer.warmup_iters", optimizer.warmup_iters, reason, length)
    if optimizer.min_learning_rate > optimizer.learning_rate:
        reason = f"must not pass optimizer.learning_rate {optimizer.learning_rate}"
        yield problem("optimizer.min_learning_rate", optimizer.min_learning_rate, reason)
    key, decay = "optimizer.decay_iters", optimizer.decay_iters
    if optimizer.schedule != "wsd":
        if decay is not None:
            yield problem(key, decay, "belongs to optimizer.schedule: wsd; remove it")
    elif decay is None:
        yield problem(key, "none", "the wsd schedule needs it: steps of the final decay")
    elif known and decay + optimizer.warmup_iters > train_iters(config):
        reason = f"with warmup_iters {optimizer.warmup_iters} passes the {train_iters(config)} steps of the run"
        yield problem(key, decay, reason, ("optimizer.warmup_iters", *length))


def _start_problems(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    if training.initial_state != "weights" and training.initial_checkpoint is None:
        reason = (
            "needs training.initial_checkpoint, which is not set; name a run or a checkpoint there, or write weights"
        )
        yield problem("training.initial_state", training.initial_state, reason, ("training.initial_checkpoint",))


def _trace_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    steps, ranks = config.logging.trace_steps, config.logging.trace_ranks
    if not steps:
        return
    if len(steps) != 2 or steps[0] > steps[1]:
        yield problem("logging.trace_steps", steps, "must be the first and the last step to trace, as [3, 4]")
    if not ranks or max(ranks) >= world_size:
        reason = f"must name ranks of this run; 0 to {world_size - 1} are"
        yield problem("logging.trace_ranks", ranks, reason, (PROCESSES,))


def _warn_of_collisions(config: RunConfig, locate: Locate) -> None:
    for key, text in collision_warnings(config):
        log.warning("%s: %s: %s", locate(key), key, text)

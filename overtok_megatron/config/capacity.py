"""Whether some machine could hold what a configuration asks of a rank. Which machine it will run on is not known here."""

from collections.abc import Callable

from overtok_megatron.config.counts import bytes_per_rank
from overtok_megatron.config.derived import accumulation_steps
from overtok_megatron.config.schema import RunConfig

MOST_BYTES = 2**46  # 64 TiB: twice the memory of the largest single machines on sale
_TIB = 2**40

Need = Callable[[bool, str, object, str], None]  # as in model_rules.py


def check_capacity(config: RunConfig, world_size: int, need: Need) -> None:
    """The state, one micro-batch's residual stream and one step's tokens of a rank must each fit into MOST_BYTES."""
    size = bytes_per_rank(config, world_size)
    tables = size.table_rows + size.table_state
    over, model, training = config.over_encoding, config.model, config.training
    for key, value, held, name in (
        ("over_encoding.table_rows", over.table_rows, tables, "n-gram tables"),
        ("model.hidden_size", model.hidden_size, size.total - tables, "dense weights and their optimizer"),
    ):
        need(
            held <= MOST_BYTES,
            key,
            value,
            _too_much(held, name, f"use a smaller model, or more than {world_size} ranks"),
        )
    length = config.data.seq_length // config.parallel.context_parallel_size
    residual = training.micro_batch_size * length * model.hidden_size * (2 if training.precision == "bf16" else 4)
    tokens = accumulation_steps(config, world_size) * training.micro_batch_size * (config.data.seq_length + 1) * 8
    for key, value, held, name in (
        ("training.micro_batch_size", training.micro_batch_size, residual, "activations between two layers"),
        ("training.global_batch_size", training.global_batch_size, tokens, "tokens per step"),
    ):
        need(held <= MOST_BYTES, key, value, _too_much(held, name, "use a smaller batch or a shorter data.seq_length"))


def _too_much(held: int, name: str, way_out: str) -> str:
    return f"makes {held / _TIB:,.0f} TiB of {name} on one rank, and no machine holds more than {MOST_BYTES // _TIB}; {way_out}"

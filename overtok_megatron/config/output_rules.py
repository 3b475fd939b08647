"""Rules across the keys of the heads that predict later tokens, and between them and the model and the data."""

from collections.abc import Iterator

from overtok_megatron.config.derived import further_tokens
from overtok_megatron.config.problems import Problem, problem
from overtok_megatron.config.schema import RunConfig

_NUM_TOKENS = "over_decoding.num_tokens"
_TRAIN_ONLY = "training.train_only"


def output_problems(config: RunConfig) -> Iterator[Problem]:
    """What breaks the rules about over-decoding and multi-token prediction; nothing where both are off."""
    section, length = config.over_decoding, config.data.seq_length
    last, depth = section.num_tokens, config.multi_token_prediction.depth
    if last > length:
        reason = f"looks further ahead than data.seq_length {length}; {length} is the most"
        yield problem(_NUM_TOKENS, last, reason, ("data.seq_length",))
    if depth >= length:
        reason = f"looks further ahead than data.seq_length {length}; {length - 1} is the most"
        yield problem("multi_token_prediction.depth", depth, reason, ("data.seq_length",))
    yield from _frozen_model_problems(config)
    if last == 1:
        return
    weights, rank, width = section.loss_weights, section.low_rank, config.model.hidden_size
    if len(weights) != last - 1:
        tables = "table 2" if last == 2 else f"each of tables 2 to {last}"
        reason = (
            f"{_NUM_TOKENS} {last} needs {last - 1}, one weight for {tables}; write {_completed(weights, last - 1)}"
        )
        yield problem("over_decoding.loss_weights", f"a list of {len(weights)}", reason, (_NUM_TOKENS,))
    if rank is not None and rank > width:
        reason = f"is above model.hidden_size {width}, and the rank of a table cannot be; {width} is the most"
        yield problem("over_decoding.low_rank", rank, reason, ("model.hidden_size",))


def _frozen_model_problems(config: RunConfig) -> Iterator[Problem]:
    """What training heads alone, on a frozen model, does not go with."""
    if config.training.train_only is None:
        return
    if further_tokens(config) == 0:
        reason = f"needs a model with such heads; set multi_token_prediction.depth, or {_NUM_TOKENS}"
        yield problem(_TRAIN_ONLY, "heads", reason, ("multi_token_prediction.depth", _NUM_TOKENS))
    stages = config.parallel.pipeline_parallel_size
    if stages > 1:
        reason = (
            f"leaves {stages - 1} of {stages} pipeline stages nothing to train; use parallel.pipeline_parallel_size 1"
        )
        yield problem(_TRAIN_ONLY, "heads", reason, ("parallel.pipeline_parallel_size",))


def _completed(weights: list[float], count: int) -> str:
    """A list of `count` weights as YAML writes it: those that are given, and 0.1 for those that are missing."""
    filled = [*weights, *[0.1] * count][:count]
    return f"[{', '.join(f'{weight:g}' for weight in filled)}]"

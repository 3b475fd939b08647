"""Metrics of the n-gram tables that cost more than a step may: they are taken where validation is, not in every step."""

import torch.distributed as dist
from torch import Tensor

from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.measuring import over_ranks


def table_metrics(engine: TrainingEngine, tokens: Tensor) -> dict[str, float]:
    """The metrics by name, after a step on `tokens` [A, b, s + k]; all ranks must call this. Empty without tables.

    The share of rows that were ever updated; on the first stage also the share of the tokens' n-grams that collide, and the
    mean L2 norm of each n-gram order's projected rows, before they are combined with the embedding, over the first micro-batch;
    both of this rank's tokens.
    """
    tables, model = engine.tables, engine.model
    if tables is None:
        return {}
    family = tables.family
    ever_updated = over_ranks(float(tables.num_ever_updated()), dist.ReduceOp.SUM, engine.device)
    values = {"tables/touched_share": ever_updated / family.total_rows}
    inputs, _ = engine.inputs_and_targets(tokens)
    # The rows that the step fetched cannot serve: they have the values of before its update. Any rank may own some.
    fetched = tables.fetch_rows(inputs[:1] if engine.looks_up_rows else None)
    if engine.grid.is_first_stage:
        assert model.embedding is not None and model.embedding.over_encoding is not None
        values["tables/collision_share"] = family.collision_share(inputs)
        for order, norm in model.embedding.over_encoding.order_norms(fetched, family.orders).items():
            values[f"tables/norm_{order}gram"] = norm
    return values

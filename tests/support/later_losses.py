"""The losses of heads for later tokens straight from the formula: loops over positions, plain products, torch's cross entropy.

Shapes: G sequences, s positions of each, D' how many tokens behind the next one the heads look ahead, d hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.config.schema import RunConfig

OD2 = {"over_decoding": {"num_tokens": 2, "loss_weights": [0.4]}}
OD3 = {"over_decoding": {"num_tokens": 3, "loss_weights": [0.5, 0.25], "low_rank": 7}}


def scored_targets(batch: Tensor, length: int, ahead: int, end: int | None) -> Tensor:
    """[G, s + 1 + D'] -> [G, s]: the token `ahead` behind each position; where it is not scored, IGNORE_INDEX.

    end: the token that ends a document, where a position scores tokens of its own document only.
    """
    targets = torch.full((batch.shape[0], length), IGNORE_INDEX)
    for row, line in enumerate(batch.tolist()):
        for t in range(length):
            if end is None or end not in line[t : t + ahead]:
                targets[row, t] = line[t + ahead]
    return targets


def over_decoding_losses(
    hidden: Tensor, weights: Mapping[str, Tensor], batch: Tensor, config: RunConfig, eod_id: int
) -> dict[str, Tensor]:
    """Mean cross entropy of tables 2 .. n by name. hidden [G, s, d], normalised; weights: by our names."""
    end = eod_id if config.data.document_attention == "within" else None
    losses = {}
    for ahead in range(2, config.over_decoding.num_tokens + 1):
        name = f"over_decoding.tables.{ahead}"
        x = hidden
        if config.over_decoding.low_rank is not None:
            x = x @ weights[f"{name}.projection"].t()
        logits = x @ weights[f"{name}.weight"].t()
        targets = scored_targets(batch, hidden.shape[1], ahead, end)
        losses[f"over_decoding_{ahead}"] = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX
        )
    return losses


def weighted(losses: Mapping[str, Tensor], config: RunConfig) -> Tensor:
    """What the losses add to the objective."""
    total = torch.zeros(())
    for ahead, weight in enumerate(config.over_decoding.loss_weights[: config.over_decoding.num_tokens - 1], start=2):
        total = total + weight * losses[f"over_decoding_{ahead}"]
    return total

"""The metrics of one step by the names under which a run reports them.

Units: seconds, tokens, bytes; losses in nats per token. All are of the whole run but `memory/peak_bytes`, which is of the rank
that computes them: a run reports that of its first rank.
"""

import logging

import torch
import torch.distributed as dist

from overtok_megatron.config import counts, derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.kernels.dtypes import DTYPES
from overtok_megatron.training.measuring import over_ranks, peak_memory
from overtok_megatron.training.peaks import peak_flops
from overtok_megatron.training.step_result import StepResult

log = logging.getLogger(__name__)


class StepMetrics:
    """Turns the result of a step and its time into metrics. All ranks must make one together."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._device = device
        self._num_ranks = dist.get_world_size()
        self._num_tokens = derived.tokens_per_step(config)
        self._flops_per_token = counts.flops_per_token(config)
        self._later = derived.later_losses(config)
        self._table_rate_factor = derived.table_rate_factor(config) if config.over_encoding.enabled else None
        peak = peak_flops(device, DTYPES[config.training.precision])
        self._peak_flops = over_ranks(peak.flops, dist.ReduceOp.SUM, device)
        log.info("model FLOPs utilisation is relative to %.4g TFLOP/s per rank (%s)", peak.flops / 1e12, peak.source)

    def of_step(self, result: StepResult, learning_rate: float, seconds: float) -> dict[str, float]:
        """The metrics of a step that took `seconds`, its tokens' reading included."""
        speed = self._num_tokens / seconds
        values = {
            "train/loss": result.loss,
            "train/learning_rate": learning_rate,
            "train/grad_norm": result.grad_norm,
            "speed/tokens_per_second": speed,
            "speed/step_seconds": seconds,
            "speed/tflops_per_rank": speed * self._flops_per_token / self._num_ranks / 1e12,
            "speed/model_flops_utilisation": speed * self._flops_per_token / self._peak_flops,
            "memory/peak_bytes": float(peak_memory(self._device)),
        }
        if self._table_rate_factor is not None:
            values |= {
                "train/table_learning_rate": learning_rate * self._table_rate_factor,
                "train/table_grad_norm": result.table_grad_norm,
                "tables/unique_rows": float(result.unique_rows),
                "tables/duplicate_share": 1.0 - result.unique_rows / result.looked_up_rows,
                "tables/exchange_bytes": float(result.exchange_bytes),
            }
        values |= {f"loss/{name}": loss for name, loss in result.auxiliary_losses.items() if name in self._later}
        return values | {f"router/{name}": value for name, value in result.router_metrics.items()}

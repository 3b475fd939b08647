"""The result of one optimizer step, and the one small reduction over all ranks that makes it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overtok_megatron.config import derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.parallel.collectives import all_reduce_in_place
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.parallel.uploading import moved
from overtok_megatron.training.deepspeed.joint_norm import StepNorms
from overtok_megatron.training.micro_batch import StageResults
from overtok_megatron.training.router_metrics import RouterMetrics


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did, the same on every rank. Norms are before clipping.

    loss: the cross entropy of the next token, in nats per token. auxiliary_losses: the losses of other layers by name. That of
    a head for a later token is the cross entropy without its weight, per position that it scores; where it scores none in the
    step, it is absent. That of routers is with its weight, per token. The head's z-loss is not among them.
    stop: a rank was asked to stop after this step. unique_rows: the sum over ranks of the distinct rows of each.
    looked_up_rows: look-ups of all ranks. exchange_bytes: the sum over ranks of what each sent to others for rows and their
    gradients, without rows that a prefetch sent again.
    router_metrics: by name (router_metrics.py); empty without experts.
    times: of each rank, the numbers of its times (phase_times.py), in steps that report them.
    """

    loss: float
    auxiliary_losses: dict[str, float]
    grad_norm: float
    table_grad_norm: float
    stop: bool
    unique_rows: int
    looked_up_rows: int
    exchange_bytes: int
    router_metrics: dict[str, float]
    times: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class RowCounts:
    """What a rank's tables did in a step: distinct rows fetched, look-ups, and bytes sent to other ranks."""

    unique: int = 0
    looked_up: int = 0
    sent_bytes: int = 0


class StepReduction:
    """Sums what the stages of all ranks found in a step."""

    def __init__(self, config: RunConfig, grid: ProcessGrid, device: torch.device) -> None:
        self._grid = grid
        self._device = device
        self._num_tokens = derived.tokens_per_step(config)
        self._router_metrics = RouterMetrics(config, grid, device)
        self._later = derived.later_losses(config)
        self._auxiliary_names: list[str] | None = None

    def reduce(
        self,
        results: StageResults,
        rows: RowCounts,
        norms: StepNorms,
        *,
        stop_asked: bool,
        own_times: Sequence[float] = (),
        later_counts: Tensor | None = None,
    ) -> StepResult:
        """The step's metrics over all ranks, and whether any rank was asked to stop; all ranks must call this.

        own_times: of this rank, as many on every rank. They travel in the same collective, each rank's in a place of its own.
        later_counts: this rank's share of the positions that heads for later tokens score (later_tokens.py); None without them.
        """
        own = [float(stop_asked), rows.unique, rows.looked_up, rows.sent_bytes]
        router = self._router_metrics.own_sums(results.router_stats)
        names = self._names(results)
        auxiliary = [
            self._own_sum([losses[name] for losses in results.auxiliary_losses if name in losses]) for name in names
        ]
        times = torch.zeros(self._grid.shape.world_size, len(own_times), dtype=torch.float64)
        times[self._grid.rank] = torch.tensor(own_times, dtype=torch.float64)
        own_values = moved(torch.cat([torch.tensor(own, dtype=torch.float64), times.flatten()]), self._device)
        counts = [] if later_counts is None else [later_counts]
        sums = self.sum_over_ranks(
            torch.cat([self._own_sum(results.main_losses), own_values, *auxiliary, *counts, router])
        )
        # A WAIT FOR THE DEVICE, the last of the step, but not for its update of the dense parameters (early_reads.py):
        # everything that the step reports is read at once.
        loss, stops, unique, looked_up, sent_bytes, *others = sums.tolist()
        all_times, others = others[: times.numel()], others[times.numel() :]
        behind = len(names) + (0 if later_counts is None else len(later_counts))
        auxiliary_sums, scored, router_sums = others[: len(names)], others[len(names) : behind], others[behind:]
        return StepResult(
            loss=loss / self._num_tokens,
            auxiliary_losses=self._auxiliary_losses(dict(zip(names, auxiliary_sums, strict=True)), scored),
            grad_norm=norms.joint,
            table_grad_norm=norms.tables,
            stop=stops > 0,
            unique_rows=int(unique),
            looked_up_rows=int(looked_up),
            exchange_bytes=int(sent_bytes),
            router_metrics=self._router_metrics.of_step(router_sums),
            times=[all_times[place : place + len(own_times)] for place in range(0, times.numel(), len(own_times) or 1)],
        )

    def _auxiliary_losses(self, sums: dict[str, float], scored: Sequence[float]) -> dict[str, float]:
        """The sums of all ranks -> means. scored: entry j - 1 is what heads for the j-th token after the next score."""
        counts = {name: scored[self._later[name] - 1] if name in self._later else self._num_tokens for name in sums}
        return {name: total / counts[name] for name, total in sums.items() if counts[name]}

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values`, summed in place over all ranks, which must all call this."""
        all_reduce_in_place(values, self._grid.table_group, of="metrics")  # the group is the whole world
        return values

    def _own_sum(self, losses: list[Tensor]) -> Tensor:
        """What this rank adds to a loss, float64 [1]: tensor-parallel ranks hold the same values; the first counts."""
        if not losses or self._grid.tensor_rank > 0:
            return torch.zeros(1, dtype=torch.float64, device=self._device)
        return torch.stack(losses).double().sum().reshape(1)

    def _names(self, results: StageResults) -> list[str]:
        """Names of all auxiliary losses, in the same order on every rank.

        The ranks tell each other once, at the first step, because a stage knows its own losses only.
        """
        own = {name for losses in results.auxiliary_losses for name in losses}
        if self._auxiliary_names is None:
            self._auxiliary_names = sorted(set().union(*self._grid.gather_objects(own)))
        assert own <= set(self._auxiliary_names), f"auxiliary losses that the first step did not have: {own}"
        return self._auxiliary_names

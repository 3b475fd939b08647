"""Metrics of the routers in a step, over all layers, micro-batches and ranks: what a run with experts reports.

Nothing here waits for the device or talks to other ranks: sums of this rank go into the one reduction that the loss goes
into, and are read with it. Shapes: L layers of the model, E experts, F statistics of a router: E counts of choices, the sum
over positions of the balance loss, and with a z-loss that of its squares (moe.py).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from overtok_megatron.config import derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.model.transformer import Stage
from overtok_megatron.parallel.grid import ProcessGrid


class RouterMetrics:
    """This rank's share of the sums behind the metrics, and the metrics from the sums of all ranks; empty without experts."""

    def __init__(self, config: RunConfig, grid: ProcessGrid, device: torch.device) -> None:
        model = config.model
        self._num_experts, self._per_token = model.num_experts or 0, model.num_experts_per_token or 0
        self._z_loss = model.router_z_loss_weight > 0.0
        self._num_layers = model.num_layers
        self._width = self._num_experts + 1 + self._z_loss if self._num_experts else 0
        self._first_layer = Stage.of(grid.coordinate("pipe"), derived.blocks_per_stage(config)).start
        self._num_tokens = derived.tokens_per_step(config)
        self._device = device
        # Every tensor-parallel rank knows the choices of all positions. Under sequence parallelism a rank has the losses of
        # its own positions only; without it all ranks have the same losses.
        first = grid.tensor_rank == 0
        self._counts_here, self._losses_here = first, first or config.parallel.sequence_parallel

    def own_sums(self, router_stats: Sequence[Tensor]) -> Tensor:
        """[layers of this stage, F] of each micro-batch -> [L F] float64, whose sum over all ranks `of_step` takes."""
        sums = torch.zeros(self._num_layers, self._width, dtype=torch.float64, device=self._device)
        if router_stats:
            here = torch.stack([*router_stats]).double().sum(0)
            stage = sums[self._first_layer : self._first_layer + here.shape[0]]
            if self._counts_here:
                stage[:, : self._num_experts] = here[:, : self._num_experts]
            if self._losses_here:
                stage[:, self._num_experts :] = here[:, self._num_experts :]
        return sums.flatten()

    def of_step(self, sums: Sequence[float]) -> dict[str, float]:
        """The sums [L F] of all ranks -> metrics by name.

        balance_loss, z_loss: means over layers, unweighted; in the objective they have weights. max_load: the largest share of
        a layer's choices that one expert got, divided by the share of each expert under an even load.
        """
        if not self._width:
            return {}
        of_layers = np.array(sums).reshape(self._num_layers, self._width)
        counts, losses = of_layers[:, : self._num_experts], of_layers[:, self._num_experts :]
        means = (losses.sum(0) / (self._num_layers * self._num_tokens)).tolist()
        load = float(counts.max()) * self._num_experts / (self._num_tokens * self._per_token)
        return dict(zip(("balance_loss", "z_loss"), means, strict=False)) | {"max_load": load}

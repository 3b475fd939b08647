"""What a step's routers did, of all layers, micro-batches and ranks: the figures that a run of experts reports.

Nothing here waits for the device or talks to other ranks: sums of this rank go into the one reduction that the loss goes
into, and are read with it. Shapes: L layers of the model, E experts, F figures of a router: E counts of choices, the sum
over positions of the balance loss, and with a z-loss that of its squares (moe.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from overtok_megatron.config import derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.model.transformer import Stage
from overtok_megatron.parallel.grid import ProcessGrid


class RouterFigures:
    """This rank's part of the figures, and what they come to over all ranks; nothing for models without experts."""

    def __init__(self, config: RunConfig, grid: ProcessGrid, device: torch.device) -> None:
        model = config.model
        self._experts, self._per_token = model.num_experts or 0, model.num_experts_per_token or 0
        self._z_loss = model.router_z_loss_weight > 0.0
        self._layers = model.num_layers
        self._width = self._experts + 1 + self._z_loss if self._experts else 0
        self._first_layer = Stage.of(grid.coordinate("pipe"), derived.blocks_per_stage(config)).start
        self._tokens = derived.tokens_per_step(config)
        self._device = device
        # Tensor-parallel ranks know the choices of all their positions, but under sequence parallelism have losses of
        # their own ones only; without it they have the same.
        first = grid.tensor_rank == 0
        self._counts_here, self._losses_here = first, first or config.parallel.sequence_parallel

    def own(self, routed: Sequence[Tensor]) -> Tensor:
        """[layers of this stage, F] of each micro-batch -> [L F] float64, whose sum over all ranks `of_step` reads."""
        sums = torch.zeros(self._layers, self._width, dtype=torch.float64, device=self._device)
        if routed:
            here = torch.stack([*routed]).double().sum(0)
            stage = sums[self._first_layer : self._first_layer + here.shape[0]]
            if self._counts_here:
                stage[:, : self._experts] = here[:, : self._experts]
            if self._losses_here:
                stage[:, self._experts :] = here[:, self._experts :]
        return sums.flatten()

    def of_step(self, sums: Tensor) -> dict[str, float]:
        """The sums [L F] of all ranks, in host memory -> figures by name.

        balance_loss, z_loss: means over layers, unweighted, as they are in the objective; max_load: the largest share of a
        layer's choices that one expert got over the share of each under an even load.
        """
        if not self._width:
            return {}
        counts, losses = sums.view(self._layers, self._width).split([self._experts, 1 + self._z_loss], dim=1)
        means = (losses.sum(0) / (self._layers * self._tokens)).tolist()
        load = counts.max().item() * self._experts / (self._tokens * self._per_token)
        return dict(zip(("balance_loss", "z_loss"), means, strict=False)) | {"max_load": load}

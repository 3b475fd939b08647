"""DeepSpeed's `mpu` argument ("model parallel unit"), made from the grid. Nothing of DeepSpeed is imported."""

import torch.distributed as dist

from overtok_megatron.parallel.grid import ProcessGrid


class DeepSpeedTopology:
    """The `mpu` that DeepSpeed asks for its model- and data-parallel ranks and groups; the methods have DeepSpeed's names.

    DeepSpeed sees context-parallel ranks as data-parallel ones: they hold the same weights, and gradients are averaged.
    """

    def __init__(self, grid: ProcessGrid) -> None:
        assert grid.groups, "DeepSpeed needs an initialised process group"
        self._grid = grid
        self._tensor = grid.groups[("tensor",)]  # also with one rank, where grid.tensor_group is None
        self._data = grid.groups[("data", "context")]

    def get_model_parallel_rank(self) -> int:
        return self._grid.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._grid.shape.tensor

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.get_data_parallel_group_ranks().index(self._grid.rank)

    def get_data_parallel_world_size(self) -> int:
        return self._grid.shape.data * self._grid.shape.context

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._grid.shape.ranks_along(self._grid.rank, "data", "context")

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self._grid.shape.ranks_along(self._grid.rank, "tensor")[0]

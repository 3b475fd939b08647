"""The grid in the words that DeepSpeed's `mpu` argument wants (duck-typed; nothing of DeepSpeed is imported)."""

import torch.distributed as dist

from overtok_megatron.parallel.grid import ProcessGrid


class DeepSpeedTopology:
    """Answers DeepSpeed's questions about model- and data-parallel groups from one grid.

    Context-parallel ranks are data-parallel ones to DeepSpeed: they hold the same weights, and their gradients are averaged.
    """

    def __init__(self, grid: ProcessGrid) -> None:
        assert grid.engine_groups is not None, "DeepSpeed needs an initialised process group"
        self._grid = grid
        self._tensor, self._data = grid.engine_groups

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

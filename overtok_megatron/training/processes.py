"""The start of a run's processes: the process group and the grid."""

import torch
import torch.distributed as dist

from overtok_megatron.config import derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.parallel.grid import GridShape, ProcessGrid
from overtok_megatron.training.deepspeed.starting import join_process_group


def start_processes(config: RunConfig, device: torch.device, attempt: str = "0") -> ProcessGrid:
    """Join the process group that the launcher described, over the backend of the run's device, and build the grid.

    attempt: how many starts of this job there were before, where the same launcher made them.
    """
    join_process_group(device, attempt)
    parallel = config.parallel
    shape = GridShape(
        pipe=parallel.pipeline_parallel_size,
        data=derived.data_parallel_size(config, dist.get_world_size()),
        context=parallel.context_parallel_size,
        tensor=parallel.tensor_parallel_size,
    )
    return ProcessGrid.create(shape)

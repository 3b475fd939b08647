"""The start of a run's processes: the process group and the grid."""

import logging
import warnings

import deepspeed
import torch
import torch.distributed as dist

from overtok_megatron.config import derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.parallel.devices import backend_of
from overtok_megatron.parallel.grid import GridShape, ProcessGrid


def start_processes(config: RunConfig, device: torch.device) -> ProcessGrid:
    """Join the process group that the launcher described, over the backend of the run's device, and build the grid."""
    # DeepSpeed logs much and calls collectives by old names; neither concerns a user.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    # DeepSpeed would compile a shared-memory all-reduce (half a minute, and a compiler) that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = deepspeed.accelerator.get_accelerator().device_name().split(":")[0]
    assert accelerator == device.type, f"DeepSpeed was imported for {accelerator}, the run is on {device}"
    deepspeed.init_distributed(dist_backend=backend_of(device), verbose=False)
    parallel = config.parallel
    shape = GridShape(
        pipe=parallel.pipeline_parallel_size,
        data=derived.data_parallel_size(config, dist.get_world_size()),
        context=parallel.context_parallel_size,
        tensor=parallel.tensor_parallel_size,
    )
    return ProcessGrid.create(shape)

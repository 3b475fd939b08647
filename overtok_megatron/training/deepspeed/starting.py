"""The start of DeepSpeed: its process group, and its engine around a model and a torch optimizer."""

import contextlib
import io
import logging
import warnings
from typing import Any

import deepspeed
import torch
from torch import nn

from overtok_megatron.config import deepspeed_config
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.parallel.devices import backend_of
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.training.deepspeed.named_collectives import name_collectives
from overtok_megatron.training.deepspeed.topology import DeepSpeedTopology
from overtok_megatron.training.rendezvous import init_method


def join_process_group(device: torch.device, attempt: str) -> None:
    """Join the process group that the launcher described, over the backend of the run's device; all ranks must call this.

    attempt: as in rendezvous.py.
    """
    # DeepSpeed logs much, and calls collectives by deprecated names; neither concerns a user.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    # DeepSpeed would compile a shared-memory all-reduce, which takes half a minute and a compiler, and is for inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = deepspeed.accelerator.get_accelerator().device_name().split(":")[0]
    assert accelerator == device.type, f"DeepSpeed was imported for {accelerator}, the run is on {device}"
    deepspeed.init_distributed(dist_backend=backend_of(device), init_method=init_method(attempt), verbose=False)
    name_collectives()


def start_deepspeed(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, grid: ProcessGrid) -> Any:
    """DeepSpeed's engine around a model and its optimizer; all ranks must call this.

    Raises ConfigError where DeepSpeed cannot read what the user's `deepspeed` section adds.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory at every turn
            return deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=deepspeed_config.derive(config, grid.shape.world_size),
                mpu=None if grid.shape.pipe > 1 else DeepSpeedTopology(grid),
                dist_init_required=False,
            )[0]
    except Exception as error:  # DeepSpeed's reader raises errors of any kind
        if not config.deepspeed or isinstance(error, RuntimeError | OSError | MemoryError):
            raise
        raise deepspeed_config.refused_by_deepspeed(config, error) from error

"""The tables' part of the joint norm meets dense norms wherever DeepSpeed keeps them, and in every step."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.ngram.sharded_tables import RowGradients
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.training.deepspeed.joint_norm import JointNorm
from overtok_megatron.training.deepspeed.optimizers import adapter_of

# `meta` stands for a GPU here: it is another device than the CPU, and mixing the two raises the same error.
ELSEWHERE = torch.device("meta")


class DeepSpeedZeroOptimizer_Stage3:  # noqa: N801  # DeepSpeed's name, by which the adapter is chosen
    """The one method of DeepSpeed's that the adapter patches; with an offloaded optimizer it gives norms on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.norms = [torch.tensor(3.0, device=device), torch.tensor(4.0, device=device)]

    def _get_norm_groups(self) -> list[Tensor]:
        return self.norms


def joined(dense: torch.device, tables: torch.device, global_norm: float = 13.0) -> tuple[Any, JointNorm]:
    """An optimizer whose norm is patched, and the joint norm after its `begin_step`. global_norm: what DeepSpeed reports."""
    optimizer = DeepSpeedZeroOptimizer_Stage3(dense)
    deepspeed_engine = SimpleNamespace(optimizer=optimizer, get_global_grad_norm=lambda: global_norm)
    square = torch.tensor(144.0, dtype=torch.float64, device=tables)
    gradients = RowGradients(torch.empty(0), torch.empty(0), 1.0, square)
    joint_norm = JointNorm(adapter_of(deepspeed_engine, ProcessGrid.single(), 1.0), tables)
    joint_norm.begin_step(lambda: gradients)
    return optimizer, joint_norm


def installed(dense: torch.device, tables: torch.device) -> Any:
    return joined(dense, tables)[0]


@pytest.mark.parametrize("dense", [torch.device("cpu"), ELSEWHERE])
def test_norms_of_groups_are_on_one_device(dense: torch.device) -> None:
    groups = installed(dense, torch.device("cpu"))._get_norm_groups()
    assert torch.stack(groups).device == dense


def test_the_joint_norm_is_that_of_all_groups() -> None:
    groups = installed(torch.device("cpu"), torch.device("cpu"))._get_norm_groups()
    assert float(torch.stack(groups).norm()) == 13.0


def test_a_step_without_the_patched_norm_is_an_error() -> None:
    """Dense parameters would have been clipped by their own norm alone. Where that is infinite, DeepSpeed may leave it out."""
    optimizer, joint_norm = joined(torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(AssertionError, match="without the patched norm"):
        joint_norm.finish_step()
    optimizer._get_norm_groups()
    assert joint_norm.finish_step().tables == 12.0
    _, diverged = joined(torch.device("cpu"), torch.device("cpu"), math.inf)
    assert diverged.finish_step().joint == math.inf

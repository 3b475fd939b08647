"""The adapter to liger-kernel: what it calls, and what it says where it cannot.

The real kernels need CUDA; with liger-kernel installed they are compared in tests/gpu and by tools/gpu_check.py.
"""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from gpu_checks.passes import largest_error, passes
from torch import Tensor

from overtok_megatron.errors import ConfigError
from overtok_megatron.kernels import reference
from overtok_megatron.kernels.choice import Kernels, choose_kernels

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class LigerRMSNormFunction:
    @staticmethod
    def apply(
        x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama",
        in_place: bool = True, row_mode: bool | None = None,
    ) -> Tensor:  # fmt: skip
        assert casting_mode == "gemma" and not in_place
        return reference.rms_norm(x, weight + offset, eps)


class LigerFusedAddRMSNormFunction:
    @staticmethod
    def apply(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama",
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert casting_mode == "gemma" and not in_place
        total = x + residual
        return reference.rms_norm(total, weight + offset, eps), total


class LigerFusedGateUpSiLUMulFunction(torch.autograd.Function):
    """As liger-kernel 0.8.5: the gradient has two dimensions whatever came in, which autograd refuses for three."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, in_place: bool = False) -> Tensor:
        assert not in_place
        ctx.save_for_backward(gate_up)
        return reference.swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate_up.detach().requires_grad_()
            (result,) = torch.autograd.grad(reference.swiglu(leaf), leaf, grad)
        return result.view(-1, gate_up.shape[-1]), None


FAKES = {
    "rms_norm": LigerRMSNormFunction,
    "fused_add_rms_norm": LigerFusedAddRMSNormFunction,
    "swiglu": LigerFusedGateUpSiLUMulFunction,
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """A package with the signatures of liger-kernel 0.8.5."""
    modules = {name: ModuleType(name) for name in ("liger_kernel", "liger_kernel.ops")}
    for name, function in FAKES.items():
        module = modules[f"liger_kernel.ops.{name}"] = ModuleType(name)
        setattr(module, function.__name__, function)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


@pytest.mark.usefixtures("installed")
def test_it_is_called_as_its_signatures_want() -> None:
    kernels = choose_kernels("liger", CUDA)
    assert kernels.name == "liger"
    cases = passes(2, 5, 24, 4, CPU)
    for name in ("norm", "x + norm", "norm of sum", "SwiGLU"):
        ours, wanted = (cases[name].run(chosen, torch.float32, CPU) for chosen in (kernels, Kernels()))
        assert largest_error(ours, wanted) <= 1e-6, name


def test_a_version_that_lacks_a_part_is_refused(
    installed: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(installed["liger_kernel.ops.swiglu"], "LigerFusedGateUpSiLUMulFunction")
    with pytest.raises(ConfigError, match=r"liger, but .*LigerFusedGateUp.*install liger-kernel>=0.8.5, or write auto"):
        choose_kernels("liger", CUDA)


def test_without_it_or_without_cuda_the_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no CUDA device; write auto"):
        choose_kernels("liger", CPU)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ConfigError, match="install liger-kernel"):
        choose_kernels("liger", CUDA)

"""Which implementation runs: this project's loops on CPU; Triton and NVIDIA's apex on CUDA if importable, else torch.

The PyPI package called `apex` is an unrelated web toolkit; it has none of the modules that `apex_parts` imports.
"""

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from overtok_megatron.errors import ConfigError
from overtok_megatron.kernels import cpu, reference
from overtok_megatron.kernels.build import load_library
from overtok_megatron.kernels.cpu_rows import CpuRowKernels
from overtok_megatron.kernels.rows import RowKernels

Groups = list[dict[str, Any]]
AdamW = Callable[[Groups, float, tuple[float, float], float], torch.optim.Optimizer]  # groups, rate, betas, eps


def torch_adamw(groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One implementation of each pass. Signatures and meaning are those of reference.py and rows.py, which are the default."""

    name: str = "torch"
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    swiglu: Callable[[Tensor], Tensor] = reference.swiglu
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = reference.rotate
    causal_attention: Callable[[Tensor, Tensor, Tensor, int | None], Tensor] = reference.causal_attention
    softmax_statistics: Callable[[Tensor], tuple[Tensor, Tensor]] = reference.softmax_statistics
    softmax_gradient: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = reference.softmax_gradient
    adamw: AdamW = torch_adamw
    rows: RowKernels = RowKernels()  # noqa: RUF009  # it has no state

    def choose_adamw(self, *, offloaded: bool) -> AdamW:
        """AdamW of these kernels, or torch's if the optimizer's state is offloaded to the CPU: apex's runs on CUDA only."""
        return torch_adamw if offloaded else self.adamw


def apex_parts() -> tuple[Callable[..., Tensor], Callable[..., torch.optim.Optimizer]] | None:
    """NVIDIA apex's fused RMSNorm and FusedAdam, or None where apex is absent, unrelated, or built without them."""
    try:
        norms = importlib.import_module("apex.normalization.fused_layer_norm")
        optimizers = importlib.import_module("apex.optimizers")
        importlib.import_module("fused_layer_norm_cuda")
        importlib.import_module("amp_C")
    except Exception:  # an unrelated package of this name may raise anything when it is imported
        return None
    norm = getattr(norms, "fused_rms_norm_affine", None)
    adam = getattr(optimizers, "FusedAdam", None)
    return None if norm is None or adam is None else (norm, adam)


def _cuda_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def choose_kernels(choice: str, device: torch.device) -> Kernels:
    """The kernels of `training.kernels` on a device.

    `auto`: on CPU the compiled loops; on CUDA Triton for table rows, and apex for the rest if it can be imported, else torch.
    `torch`: torch's operators only. `apex`: as auto, but apex is required.

    Raises ConfigError where apex is required and cannot be imported.
    """
    cuda = device.type == "cuda"
    parts = apex_parts() if cuda and choice != "torch" else None
    if choice == "apex" and parts is None:
        why = "NVIDIA apex does not import here" if cuda else "this run has no CUDA device"
        raise ConfigError(f"training.kernels: apex, but {why}; write torch or auto, or build NVIDIA's apex from source")
    if not cuda:
        library = load_library() if choice == "auto" else None
        return Kernels() if library is None else _cpu_kernels(library)
    torch_kernels = replace(
        Kernels(), rms_norm=_cuda_rms_norm, rows=RowKernels() if choice == "torch" else _cuda_row_kernels()
    )
    if parts is None:
        return torch_kernels
    norm, fused_adam = parts
    return replace(
        torch_kernels,
        name="apex",
        rms_norm=lambda x, weight, eps: norm(x, weight, (x.shape[-1],), eps),
        adamw=lambda groups, lr, betas, eps: fused_adam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True),
    )


def _cuda_row_kernels() -> RowKernels:
    """Triton's kernels if Triton is installed with torch, else torch's operators, which sum in another order."""
    try:
        from overtok_megatron.kernels.triton_rows import TritonRowKernels
    except ImportError:
        return RowKernels()
    return TritonRowKernels()


def _cpu_kernels(library: ctypes.CDLL) -> Kernels:
    loops = cpu.CpuLoops(library)
    return Kernels(
        name="cpu",
        rms_norm=loops.rms_norm,
        swiglu=loops.swiglu,
        rotate=loops.rotate,
        causal_attention=loops.causal_attention,
        softmax_statistics=loops.softmax_statistics,
        softmax_gradient=loops.softmax_gradient,
        rows=CpuRowKernels(library),
    )

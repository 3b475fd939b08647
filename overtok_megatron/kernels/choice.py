"""Chooses the implementation of each pass for a device.

On a CPU these are the compiled loops of this project. On a CUDA device they are Triton's kernels for table rows, torch's
FlexAttention for windows and documents, and NVIDIA's apex for the norm and AdamW, each where it can be imported. In every other
case torch's operators are used.

The package `apex` on PyPI is an unrelated web toolkit. It does not have the modules that `apex_parts` imports.
"""

import ctypes
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from overtok_megatron.errors import ConfigError
from overtok_megatron.kernels import cpu, flex_attention, reference
from overtok_megatron.kernels.build import load_library
from overtok_megatron.kernels.cpu_rows import CpuRowKernels
from overtok_megatron.kernels.documents import Documents
from overtok_megatron.kernels.rows import RowKernels

log = logging.getLogger(__name__)

Groups = list[dict[str, Any]]
CausalAttention = Callable[[Tensor, Tensor, Tensor, int | None, Documents | None], Tensor]  # q, k, v, window, documents
AdamW = Callable[[Groups, float, tuple[float, float], float], torch.optim.Optimizer]  # groups, rate, betas, eps


def torch_adamw(groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One implementation of each pass: by default those of reference.py and rows.py, which define signatures and results."""

    name: str = "torch"
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    swiglu: Callable[[Tensor], Tensor] = reference.swiglu
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = reference.rotate
    causal_attention: CausalAttention = reference.causal_attention
    softmax_statistics: Callable[[Tensor], tuple[Tensor, Tensor]] = reference.softmax_statistics
    softmax_gradient: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = reference.softmax_gradient
    adamw: AdamW = torch_adamw
    rows: RowKernels = RowKernels()  # noqa: RUF009  # all may share one: it has no state

    def choose_adamw(self, *, offloaded: bool) -> AdamW:
        """AdamW of these kernels, or torch's where the optimizer state is offloaded to the CPU, because apex needs CUDA."""
        return torch_adamw if offloaded else self.adamw


def apex_parts() -> tuple[Callable[..., Tensor], Callable[..., torch.optim.Optimizer]] | None:
    """The fused RMSNorm and FusedAdam of NVIDIA's apex; None where it is not installed or was built without them."""
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
    """The kernels that a device runs with a value of `training.kernels`.

    choice: "auto" takes the compiled loops on a CPU; on a CUDA device it takes Triton for table rows, and apex for the norm
    and AdamW if apex can be imported. "torch" takes torch's operators only. "apex" is "auto" with apex required.

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
        Kernels(),
        rms_norm=_cuda_rms_norm,
        causal_attention=reference.causal_attention if choice == "torch" else _cuda_attention(),
        rows=RowKernels() if choice == "torch" else _cuda_row_kernels(),
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


def _cuda_attention() -> CausalAttention:
    """FlexAttention for windows and documents; where there is no Triton to compile it with, dense masks, said aloud."""
    if importlib.util.find_spec("triton") is None:
        log.warning(
            "Triton cannot be imported: sliding windows and attention within documents use dense masks, s x s elements"
        )
        return reference.causal_attention
    return flex_attention.causal_attention


def _cuda_row_kernels() -> RowKernels:
    """The Triton kernels if Triton can be imported, else torch's operators, which add in another order."""
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

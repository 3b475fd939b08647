"""Which implementation of RMSNorm and AdamW runs: NVIDIA's apex where it is, torch's own otherwise. Chosen by a key.

The PyPI package called `apex` is a web toolkit without any of this; it is told apart by what it lacks, and ignored.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from overtok_megatron.errors import ConfigError
from overtok_megatron.model.norm import FusedNorm

Groups = list[dict[str, Any]]
AdamW = Callable[[Groups, float, tuple[float, float], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Kernels:
    """rms_norm: fused (x, weight, eps) -> y, or None for the project's own autograd function. adamw: builds the optimizer."""

    name: str
    rms_norm: FusedNorm | None
    adamw: AdamW


def apex_parts() -> tuple[Callable[..., Tensor], Callable[..., torch.optim.Optimizer]] | None:
    """NVIDIA apex's fused RMSNorm and FusedAdam, or None where apex is absent, unrelated, or built without them."""
    try:
        norms = importlib.import_module("apex.normalization.fused_layer_norm")
        optimizers = importlib.import_module("apex.optimizers")
        importlib.import_module("fused_layer_norm_cuda")
        importlib.import_module("amp_C")
    except Exception:  # an unrelated package may fail in any way at all when it is imported
        return None
    norm = getattr(norms, "fused_rms_norm_affine", None)
    adam = getattr(optimizers, "FusedAdam", None)
    return None if norm is None or adam is None else (norm, adam)


def _torch_adamw(groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def choose_kernels(choice: str, device: torch.device) -> Kernels:
    """`auto`: apex on CUDA where it imports, else torch. `apex`, `torch`: that one.

    Raises ConfigError where apex is asked for and is not to be had.
    """
    parts = apex_parts() if device.type == "cuda" and choice != "torch" else None
    if choice == "apex" and parts is None:
        why = "this run has no CUDA device" if device.type != "cuda" else "NVIDIA apex does not import here"
        raise ConfigError(f"training.kernels: apex, but {why}; write torch or auto, or build NVIDIA's apex from source")
    if parts is None:
        # On CPU torch's rms_norm is a chain of separate operators, slower than the one written in model/norm.py.
        return Kernels("torch", _torch_rms_norm if device.type == "cuda" else None, _torch_adamw)
    norm, fused_adam = parts

    def apex_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm(x, weight, (x.shape[-1],), eps)

    def apex_adamw(groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
        return fused_adam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True)

    return Kernels("apex", apex_norm, apex_adamw)

"""Chooses the implementation of each pass for a device.

On a CPU these are the compiled loops of this project. On a CUDA device they are passes that torch.compile fuses, torch's
FlexAttention for windows and documents, and Triton's kernels for table rows; liger-kernel and NVIDIA's apex where they are
asked for. In every other case torch's operators are used.

The package `apex` on PyPI is an unrelated web toolkit. It does not have the modules that `apex_parts` imports.
"""

import ctypes
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from overtok_megatron.config.schema import KernelChoice
from overtok_megatron.errors import ConfigError
from overtok_megatron.kernels import cpu, flex_attention, reference
from overtok_megatron.kernels.build import load_library
from overtok_megatron.kernels.compiled import compiled_passes, missing_for_compilation
from overtok_megatron.kernels.compiled_layers import CompiledLayers, compiled_layers
from overtok_megatron.kernels.compiled_softmax import compiled_softmax
from overtok_megatron.kernels.cpu_rows import CpuRowKernels
from overtok_megatron.kernels.documents import Documents
from overtok_megatron.kernels.liger import LigerPasses
from overtok_megatron.kernels.rows import RowKernels

log = logging.getLogger(__name__)

Groups = list[dict[str, Any]]
CausalAttention = Callable[[Tensor, Tensor, Tensor, int | None, Documents | None], Tensor]  # q, k, v, window, documents
AdamW = Callable[[Groups, float, tuple[float, float], float], torch.optim.Optimizer]  # groups, rate, betas, eps


def torch_adamw(groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


class NormAndRotate(Protocol):
    """The signature of `reference.norm_and_rotate`."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        full_size: int,
        sum_over_ranks: reference.SumInPlace | None,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One implementation of each pass: by default those of reference.py and rows.py, which define signatures and results.

    layers: the passes of a whole layer and its products together, for layers that can be trained so; None = pass by pass.
    """

    name: str = "torch"
    rms_norm: reference.Norm = reference.rms_norm
    add_normed: Callable[[Tensor, Tensor, Tensor, float], Tensor] = reference.add_normed
    norm_of_sum: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = reference.norm_of_sum
    norm_and_rotate: NormAndRotate = reference.norm_and_rotate
    swiglu: Callable[[Tensor], Tensor] = reference.swiglu
    rotate: reference.Rotation = reference.rotate
    layers: CompiledLayers | None = None
    causal_attention: CausalAttention = reference.causal_attention
    softmax_statistics: Callable[[Tensor], tuple[Tensor, Tensor]] = reference.softmax_statistics
    softmax_gradient: Callable[[Tensor, Tensor, Tensor, Tensor], None] = reference.softmax_gradient
    softmax_loss_and_gradient: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = (
        reference.softmax_loss_and_gradient
    )
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


def choose_kernels(choice: KernelChoice, device: torch.device) -> Kernels:
    """The kernels that a device runs with a value of `training.kernels`.

    choice: "auto" takes the compiled loops on a CPU, and on a CUDA device passes that torch.compile fuses, Triton for table
    rows, and torch's fused AdamW. "compile" is "auto" with fused passes on every device. "torch" takes torch's operators only.
    "liger" and "apex" are "auto" with that package's passes, and apex with its AdamW.

    Raises ConfigError where a choice other than "auto" asks for something that this machine does not have.
    """
    if choice in ("apex", "liger") and device.type != "cuda":
        raise ConfigError(
            f"training.kernels: {choice}, but this run has no CUDA device; write auto, compile, or torch (torch's operators)"
        )
    if choice == "compile" and (missing := missing_for_compilation(device)) is not None:
        raise ConfigError(f"training.kernels: compile, but {missing}; write auto, or torch for torch's own operators")
    plain = Kernels() if choice == "torch" else replace(Kernels(), rows=choose_row_kernels(choice, device))
    if device.type == "cuda":
        plain = _with_norm(plain, _cuda_rms_norm)
    if choice == "torch":
        return plain
    if device.type == "cpu":
        library = load_library()
        fast = plain if library is None else _cpu_kernels(plain, library)
        return fast if choice == "auto" else _compiled_kernels(fast, device)
    missing = missing_for_compilation(device)
    if missing is None:
        fast = _compiled_kernels(plain, device)
    else:
        fast = plain
        _say_once(
            logging.WARNING,
            f"{missing}: norms, rotary positions, SwiGLU and the output head's softmax run as torch's own operators, which are "
            "slower; sliding windows and attention within documents use dense masks of s x s elements",
        )
    if choice == "liger":
        return _liger_kernels(fast)
    return _apex_kernels(fast) if choice == "apex" else fast


def choose_row_kernels(choice: KernelChoice, device: torch.device) -> RowKernels:
    """The kernels for table rows on the device that holds them, which may be another than that of the model."""
    if choice == "torch":
        return RowKernels()
    if device.type == "cuda":
        return _cuda_row_kernels()
    library = load_library()
    return RowKernels() if library is None else CpuRowKernels(library)


@lru_cache
def _say_once(level: int, message: str) -> None:
    log.log(level, message)


def _with_norm(kernels: Kernels, norm: reference.Norm) -> Kernels:
    """With another RMSNorm, also in the passes of which it is a part."""
    return replace(
        kernels,
        rms_norm=norm,
        add_normed=partial(reference.add_normed, norm=norm),
        norm_of_sum=partial(reference.norm_of_sum, norm=norm),
        norm_and_rotate=partial(reference.norm_and_rotate, norm=norm, rotation=kernels.rotate),
    )


def _compiled_kernels(kernels: Kernels, device: torch.device) -> Kernels:
    """With passes that are compiled at their first use. The caller knows that nothing is missing for that."""
    _say_once(
        logging.INFO,
        "passes between products are compiled when they are first used: the first step takes seconds to minutes",
    )
    passes = compiled_passes()
    if device.type == "cuda":  # FlexAttention's backward does not run on a CPU
        kernels = replace(kernels, causal_attention=flex_attention.causal_attention)
    return replace(
        kernels,
        name="compile",
        rms_norm=passes.rms_norm,
        add_normed=passes.add_normed,
        norm_of_sum=passes.norm_of_sum,
        norm_and_rotate=passes.norm_and_rotate,
        swiglu=passes.swiglu,
        rotate=passes.rotate,
        layers=compiled_layers(),
        **compiled_softmax(),
    )


def _liger_kernels(kernels: Kernels) -> Kernels:
    try:
        passes = LigerPasses()
    except ImportError as error:
        raise ConfigError(
            f"training.kernels: liger, but it does not import here ({error}); install liger-kernel>=0.8.5, or write auto"
        ) from None
    normed = _with_norm(kernels, passes.rms_norm)
    return replace(normed, name="liger", norm_of_sum=passes.norm_of_sum, swiglu=passes.swiglu, layers=None)


def _apex_kernels(kernels: Kernels) -> Kernels:
    parts = apex_parts()
    if parts is None:
        raise ConfigError(
            "training.kernels: apex, but NVIDIA apex does not import here; write auto, or build NVIDIA's apex from source"
        )
    norm, fused_adam = parts
    return replace(
        _with_norm(kernels, lambda x, weight, eps: norm(x, weight, (x.shape[-1],), eps)),
        name="apex",
        layers=None,
        adamw=lambda groups, lr, betas, eps: fused_adam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True),
    )


def _cuda_row_kernels() -> RowKernels:
    """The Triton kernels if Triton can be imported, else torch's operators, which add in another order."""
    try:
        from overtok_megatron.kernels.triton_rows import TritonRowKernels
    except ImportError:
        return RowKernels()
    return TritonRowKernels()


def _cpu_kernels(plain: Kernels, library: ctypes.CDLL) -> Kernels:
    loops = cpu.CpuLoops(library)
    kernels = replace(
        plain,
        name="cpu",
        swiglu=loops.swiglu,
        rotate=loops.rotate,
        causal_attention=loops.causal_attention,
        softmax_statistics=loops.softmax_statistics,
        softmax_gradient=loops.softmax_gradient,
        softmax_loss_and_gradient=loops.softmax_loss_and_gradient,
    )
    return _with_norm(kernels, loops.rms_norm)

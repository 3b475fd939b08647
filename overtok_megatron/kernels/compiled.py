"""Passes over activations that torch.compile fuses: Inductor makes Triton kernels of them on CUDA, and C++ loops on a CPU.

The plain functions below compute in float32 and round once, at the end; AOTAutograd derives their backward passes. They are
compiled at their first use, in the process that uses them, for one layout of arguments at a time (`CompiledPass`). Inductor
keeps what it has compiled in the folder TORCHINDUCTOR_CACHE_DIR (default: torchinductor_USER in the folder for temporary
files), where the next process finds it. Ranks that compile the same pass at the same time each do so, under file locks or by
atomic renames, and with the same result.

Shapes: n positions, d normalised size, f feed-forward size, b batch, s sequence, h heads, e head size; `_shard`: of this rank.
"""

import importlib.util
import shutil
import sysconfig
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from overtok_megatron.kernels import reference
from overtok_megatron.kernels.reference import SumInPlace

# deterministic: Inductor then chooses blocks by rule and does not time candidates. Ranks that hold the same activations would
# otherwise add in different orders, and a resumed run in another order than an uninterrupted one. compile_threads: a pool of
# processes per rank takes memory for longer than it saves time.
COMPILER_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"deterministic": True, "compile_threads": 1}


def missing_for_compilation(device: torch.device) -> str | None:
    """What this machine lacks of what Inductor needs on a device, as the end of a sentence; None = nothing."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if shutil.which("gcc") is None and shutil.which("clang") is None and shutil.which("cc") is None:
            return "there is no C compiler, which Triton needs"
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler  # late: it takes a second

        try:
            get_cpp_compiler()
        except RuntimeError:
            return "there is no C++ compiler"
    headers = Path(sysconfig.get_paths()["include"])
    return (
        None if (headers / "Python.h").exists() else f"{headers} has no Python.h (install Python's development files)"
    )


def _wide_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [.., h e] float32, cos and sin [.., e/2] -> [.., h, e]; the heads' halves change places in one read."""
    halves = x.unflatten(-1, (-1, 2, cos.shape[-1]))
    sign = 2 * torch.arange(2, device=x.device).unsqueeze(-1) - 1  # -1 for the first half, 1 for the second
    cos, sin = cos.unsqueeze(-2).unsqueeze(-2), sin.unsqueeze(-2).unsqueeze(-2)
    return (halves * cos + halves.flip(-2) * (sign * sin)).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _wide_norm(x, weight, eps).to(x.dtype)


def add_normed(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x.float() + _wide_norm(branch, weight, eps)).to(x.dtype)


def norm_of_sum(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, _wide_norm(total, weight, eps).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turned(x.float(), cos, sin).to(x.dtype)


def norm_and_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return _turned(_wide_norm(x, weight, eps), cos, sin).to(x.dtype)


def _square_sum(x: Tensor) -> Tensor:
    return x.float().square().sum(-1, keepdim=True)


def _scale_and_rotate(x: Tensor, weight: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turned(x.float() * scale * weight.float(), cos, sin).to(x.dtype)


def _split_sums(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """What the backward of a split norm sums: over this rank's part of d [.., 1], float32; over positions [d_shard]."""
    turned_back = _turned(grad.float(), cos, -sin).flatten(-2)
    normed = x.float() * scale
    products = turned_back * normed
    grad_weight = products.flatten(0, -2).sum(0).to(weight.dtype)
    return (products * weight.float()).sum(-1, keepdim=True), grad_weight


def _split_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, mean: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    scaled = _turned(grad.float(), cos, -sin).flatten(-2) * weight.float()
    return ((scaled - x.float() * scale * mean) * scale).to(x.dtype)


def compiled_copy(function: Callable[..., Any], number: int, **options: Any) -> Callable[..., Any]:
    """`function`, to be compiled at its first call, with a code object of its own: see CompiledPass. options: of Inductor."""
    assert isinstance(function, FunctionType)
    name = f"{function.__name__}_{number}"
    copy = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    compiled: Callable[..., Any] = torch.compile(
        copy, fullgraph=True, dynamic=False, options={**COMPILER_OPTIONS, **options}
    )
    return compiled


class CompiledPass:
    """A plain function, compiled once for every layout of its arguments. It never falls back to eager mode.

    All sizes are constants for the compiler, so that loops and loads are as wide as can be, but for the leading dimensions of
    activations, which change from batch to batch: these are symbols. Only a size of 1 is a constant there as well, because
    PyTorch's shapes treat it so: a single position is another layout than many, whatever their number.

    Dynamo keeps what it compiled by code object, gives up behind `recompile_limit` entries, and makes sizes symbolic that
    changed between entries. Every layout has a code object of its own here, so neither can happen, whatever number of models
    a process holds.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}  # by layout; each has run once
        self._lock = threading.Lock()

    def __call__(self, tensors: tuple[Tensor | None, ...], leading: tuple[int, ...], *constants: float) -> Any:
        """leading: how many of each tensor's first dimensions are symbols. constants follow the tensors as arguments."""
        layouts = [None if x is None else _layout(x, count) for x, count in zip(tensors, leading, strict=True)]
        key = (torch.is_grad_enabled(), constants, *layouts)
        made = self.compiled.get(key)
        if made is not None:
            return made(*tensors, *constants)
        with self._lock:  # a second thread would compile with the sizes that it happens to have
            made = self.compiled.get(key) or self._compile()
            for tensor, count in zip(tensors, leading, strict=True):
                for dim in range(count):
                    if tensor is not None and tensor.shape[dim] > 1:
                        torch._dynamo.mark_dynamic(tensor, dim)
            result = made(*tensors, *constants)
            self.compiled[key] = made
        return result

    def _compile(self) -> Callable[..., Any]:
        return compiled_copy(self.function, len(self.compiled))


def _layout(tensor: Tensor, leading: int) -> tuple[Any, ...]:
    """What the compiled code of a tensor depends on, its first `leading` dimensions being of any size above 1."""
    ones = tuple(size == 1 for size in tensor.shape[:leading])
    # the last leading dimension's stride is a constant; those before it are multiples of symbols
    strides = tensor.stride()[max(leading - 1, 0) :]
    offset = min(tensor.storage_offset(), 2)  # a symbol, and as a size a constant where it is 0 or 1
    return (
        type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_inference(), ones,
        tensor.shape[leading:], strides, offset,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """[.., d] -> [n, d], whose rows are contiguous and lie at one stride: a view where x has such rows."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


class CompiledPasses:
    """The passes of reference.py over activations, with its signatures and, to rounding, its results."""

    def __init__(self) -> None:
        self._rms_norm = CompiledPass(rms_norm)
        self._add_normed = CompiledPass(add_normed)
        self._norm_of_sum = CompiledPass(norm_of_sum)
        self._swiglu = CompiledPass(swiglu)
        self._rotate = CompiledPass(rotate)
        self._norm_and_rotate = CompiledPass(norm_and_rotate)
        self.square_sum = CompiledPass(_square_sum)
        self.scale_and_rotate = CompiledPass(_scale_and_rotate)
        self.split_sums = CompiledPass(_split_sums)
        self.split_gradient = CompiledPass(_split_gradient)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.numel() == 0:
            return reference.rms_norm(x, weight, eps)
        out: Tensor = self._rms_norm((_rows(x), weight), (1, 0), eps)
        return out.view(x.shape)

    def add_normed(self, x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> Tensor:
        out: Tensor = self._add_normed((_rows(x), _rows(branch), weight), (1, 1, 0), eps)
        return out.view(x.shape)

    def norm_of_sum(self, x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed = self._norm_of_sum((_rows(x), _rows(branch), weight), (1, 1, 0), eps)
        return total.view(x.shape), normed.view(x.shape)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        if gate_up.numel() == 0:  # an expert's part of no tokens
            return reference.swiglu(gate_up)
        out: Tensor = self._swiglu((_rows(gate_up),), (1,))
        return out.view(*gate_up.shape[:-1], -1)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, cos, sin = _rows_and_angles(x.flatten(-2), cos, sin)
        leading = rows.dim() - 1
        out: Tensor = self._rotate((rows, cos, sin), (leading, 1, 1))
        return out.view(x.shape)

    def norm_and_rotate(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        full_size: int,
        sum_over_ranks: SumInPlace | None,
    ) -> Tensor:
        rows, cos, sin = _rows_and_angles(x, cos, sin)
        leading = rows.dim() - 1
        out: Tensor
        if sum_over_ranks is None:
            out = self._norm_and_rotate((rows, weight, cos, sin), (leading, 0, 1, 1), eps)
        else:
            out = _SplitNormAndRotate.apply(rows, weight, eps, cos, sin, full_size, sum_over_ranks, self)
        return out.view(*x.shape[:-1], -1, 2 * cos.shape[-1])


def _rows_and_angles(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [b, s, h e]; cos, sin [(b,) s, 1, e/2] -> x [n, h e] with angles [n, e/2], or x [b, s, h e] with angles [s, e/2].

    The second form is for several sequences with the same positions: their angles are not repeated in memory.
    """
    batch, length = x.shape[:2]
    rows = _rows(x)
    if cos.dim() == 3 and batch > 1 and length > 1:
        return rows.unflatten(0, (batch, length)), cos.squeeze(-2).contiguous(), sin.squeeze(-2).contiguous()
    cos, sin = (angle.expand(batch, length, 1, -1).reshape(rows.shape[0], -1).contiguous() for angle in (cos, sin))
    return rows, cos, sin


class _SplitNormAndRotate(torch.autograd.Function):
    """RMSNorm over d, of which each rank holds d_shard, and the rotation R of the heads of this rank: y = R(w x z).

    | | here | over ranks |
    | forward | sum of squares [.., 1] | summed: z = 1 / sqrt(sum / d + eps) |
    | backward | sum(w x z R'(dy)) [.., 1] | summed: m = sum / d; dx = z (w R'(dy) - x z m) |
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        full_size: int,
        sum_over_ranks: SumInPlace,
        passes: CompiledPasses,
    ) -> Tensor:
        leading = x.dim() - 1
        scale = passes.square_sum((x,), (leading,))
        sum_over_ranks(scale)
        scale.div_(full_size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale, cos, sin)
        ctx.full_size, ctx.sum_over_ranks, ctx.passes = full_size, sum_over_ranks, passes
        out: Tensor = passes.scale_and_rotate((x, weight, scale, cos, sin), (leading, 0, leading, 1, 1))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, cos, sin = ctx.saved_tensors
        leading = x.dim() - 1
        grad = grad.contiguous().flatten(-2)
        mean, grad_weight = ctx.passes.split_sums(
            (grad, x, weight, scale, cos, sin), (leading, leading, 0, leading, 1, 1)
        )
        ctx.sum_over_ranks(mean)
        mean.div_(ctx.full_size)
        grad_x = ctx.passes.split_gradient(
            (grad, x, weight, scale, mean, cos, sin), (leading, leading, 0, leading, leading, 1, 1)
        )
        return grad_x, grad_weight, None, None, None, None, None, None


@lru_cache(maxsize=1)
def compiled_passes() -> CompiledPasses:
    """One for the process, so that a second model finds what the first has compiled."""
    return CompiledPasses()

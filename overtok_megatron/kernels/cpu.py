"""Passes over activations on CPU: calls of the compiled loops of cpu.cpp, and attention in tiles that fit in the cache.

Signatures and shapes are those of reference.py, and so are the results, up to rounding. Passes over table rows are in
cpu_rows.py.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.kernels import reference

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_WEIGHT_PARTS = 32  # partial sums of a norm's weight gradient: a constant, so that the result is independent of threads
_TILE_QUERIES = 256
_TILE_VALUES = 1 << 20  # scores per tile: two megabytes in bfloat16


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class CpuLoops:
    """Calls functions of the compiled library with tensors.

    `call` does not check its arguments: the other methods and the autograd functions below ensure dtypes and strides.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | int | float) -> None:
        converted: list[Any] = []
        for value in arguments:
            if isinstance(value, Tensor):
                converted.append(_pointer(value))
            else:
                converted.append(ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value))
        getattr(self._library, f"{name}_{_SUFFIX[dtype]}")(*converted)

    def softmax_statistics(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        largest, exp_sum = torch.empty(2, logits.shape[0]).unbind()
        self.call("softmax_statistics", logits.dtype, logits.contiguous(), *logits.shape, largest, exp_sum)
        return largest, exp_sum

    def softmax_gradient(self, logits: Tensor, log_sum: Tensor, scale: Tensor, target: Tensor) -> None:
        assert logits.is_contiguous()  # a copy would be written in its stead
        columns = (log_sum.contiguous(), scale.contiguous(), target.contiguous())
        self.call("softmax_gradient", logits.dtype, logits, *logits.shape, *columns)

    def softmax_loss_and_gradient(
        self, logits: Tensor, target: Tensor, scored: Tensor, z_loss_weight: float
    ) -> tuple[Tensor, Tensor]:
        assert logits.is_contiguous()
        log_sum, target_logit = torch.empty(2, logits.shape[0]).unbind()
        given = (target.contiguous(), scored.contiguous(), float(z_loss_weight))
        self.call("softmax_loss_and_gradient", logits.dtype, logits, *logits.shape, *given, log_sum, target_logit)
        return log_sum, target_logit

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result: Tensor = _RMSNorm.apply(x, weight, eps, self)
        return result

    def swiglu(self, gate_up: Tensor) -> Tensor:
        result: Tensor = _SwiGLU.apply(gate_up, self)
        return result

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        result: Tensor = _Rotate.apply(x, cos, sin, self)
        return result

    def causal_attention(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        result: Tensor = _TiledAttention.apply(q, k, v, window, self)
        return result


def _vectors(x: Tensor) -> tuple[Tensor, int, int]:
    """x [.., d] as vectors of length d that lie at one stride: (the tensor that holds them, their number, the stride).

    The tensor is x itself where its vectors lie at one stride, else a contiguous copy.
    """
    count = x.numel() // x.shape[-1]
    if x.stride(-1) == 1 and x.dim() > 1:
        stride = x.stride(-2)
        expected = stride
        for dim in range(x.dim() - 2, -1, -1):
            if x.stride(dim) != expected:
                break
            expected *= x.shape[dim]
        else:
            return x, count, stride
    return x.contiguous(), count, x.shape[-1]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, loops: CpuLoops) -> Tensor:
        kept, count, stride = _vectors(x)
        size = x.shape[-1]
        y = torch.empty(x.shape, dtype=x.dtype)
        scale = torch.empty(count)
        loops.call("rms_norm", x.dtype, kept, stride, weight, count, size, float(eps), y, scale)
        ctx.save_for_backward(kept, weight, scale)
        ctx.loops = loops
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        kept, count, stride = _vectors(x)
        size = x.shape[-1]
        grad_x = torch.empty(x.shape, dtype=x.dtype)
        parts = torch.zeros(_WEIGHT_PARTS, size)
        ctx.loops.call(
            "rms_norm_backward",
            x.dtype,
            kept,
            stride,
            weight,
            scale,
            grad.contiguous(),
            count,
            size,
            grad_x,
            parts,
            _WEIGHT_PARTS,
        )
        return grad_x, parts.sum(0).to(weight.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, loops: CpuLoops) -> Tensor:
        gate_up = gate_up.contiguous()
        size = gate_up.shape[-1] // 2
        y = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype)
        loops.call("swiglu", gate_up.dtype, gate_up, gate_up.numel() // (2 * size), size, y)
        ctx.save_for_backward(gate_up)
        ctx.loops = loops
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        size = gate_up.shape[-1] // 2
        result = torch.empty_like(gate_up)
        ctx.loops.call(
            "swiglu_backward", gate_up.dtype, gate_up, grad.contiguous(), gate_up.numel() // (2 * size), size, result
        )
        return result, None


class _Rotate(torch.autograd.Function):
    """The backward of a rotation is the rotation by the negative angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, loops: CpuLoops) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.loops = loops
        return _rotated(loops, x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(ctx.loops, grad, cos, sin, -1.0), None, None, None


def _rotated(loops: CpuLoops, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = x.contiguous()
    batch, length, heads, size = x.shape
    y = torch.empty_like(x)
    period = cos.numel() // (size // 2)  # s, or b s where each sequence has its own positions
    loops.call(
        "rotate", x.dtype, x, cos.contiguous(), sin.contiguous(), sign, batch * length, heads, size // 2, period, y
    )
    return y


class _TiledAttention(torch.autograd.Function):
    """Causal softmax attention, tile by tile: a tile is some heads times some queries, and its scores stay in the cache.

    With a window, a tile leaves out the keys that none of its queries sees. Backward computes the probabilities again, so
    memory is linear in the sequence. This is faster than torch's CPU flash kernel, whose backward is not blocked for the
    matrix units.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, loops: CpuLoops) -> Tensor:
        shape = q.shape
        q, k, v = (q * shape[-1] ** -0.5).reshape(-1, *shape[2:]), k.reshape(-1, *shape[2:]), v.reshape(-1, *shape[2:])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for heads, tile, seen in _tiles(q, window):
            probabilities = _probabilities(loops, q[heads, tile], k[heads, seen], window)
            torch.bmm(probabilities, v[heads, seen], out=out[heads, tile])
        ctx.save_for_backward(q, k, v)
        ctx.shape, ctx.window, ctx.loops = shape, window, loops
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        grad_q = torch.empty_like(q)
        wide = torch.float32 if q.shape[1] > _TILE_QUERIES else q.dtype  # several tiles add to one gradient
        grad_k, grad_v = (torch.empty(k.shape, dtype=wide) for _ in "kv")
        for heads, tile, seen in _tiles(q, ctx.window):
            incoming, start = grad[heads, tile], tile.start - seen.start
            probabilities = _probabilities(ctx.loops, q[heads, tile], k[heads, seen], ctx.window)
            scores = torch.bmm(incoming, v[heads, seen].mT)
            ctx.loops.call("causal_softmax_backward", q.dtype, probabilities, scores, *scores.shape, start)
            torch.bmm(scores, k[heads, seen], out=grad_q[heads, tile])
            for total, left, right in ((grad_k, scores, q[heads, tile]), (grad_v, probabilities, incoming)):
                if start > 0:
                    total[heads, seen.start : tile.start] += torch.bmm(left[:, :, :start].mT, right)
                total[heads, tile] = torch.bmm(left[:, :, start:].mT, right)
        grad_q *= ctx.shape[-1] ** -0.5
        return (
            grad_q.view(ctx.shape),
            grad_k.to(k.dtype).view(ctx.shape),
            grad_v.to(v.dtype).view(ctx.shape),
            None,
            None,
        )


def _tiles(q: Tensor, window: int | None) -> list[tuple[slice, slice, slice]]:
    """(heads, queries, the keys that these see) of every tile of q [heads, s, e]."""
    heads, length, _ = q.shape
    step = max(1, _TILE_VALUES // (min(_TILE_QUERIES, length) * length))
    return [
        (
            slice(first, min(first + step, heads)),
            slice(start, min(start + _TILE_QUERIES, length)),
            slice(0 if window is None else max(0, start - window + 1), min(start + _TILE_QUERIES, length)),
        )
        for first in range(0, heads, step)
        for start in range(0, length, _TILE_QUERIES)
    ]


def _probabilities(loops: CpuLoops, q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """[heads, queries, seen]; the queries are at the positions of the last keys."""
    scores = torch.bmm(q, k.mT)
    if window is not None and window < scores.shape[2]:
        hidden = reference.window_mask(scores.shape[1], scores.shape[2], window, scores.device).logical_not_()
        scores.masked_fill_(hidden, -torch.inf)
    loops.call("causal_softmax", scores.dtype, scores, *scores.shape, scores.shape[2] - scores.shape[1])
    return scores

"""Passes over activations on CPU: calls of the compiled loops of cpu.cpp, and attention in tiles that fit in the cache.

Signatures and shapes are those of reference.py, and so are the results, up to rounding. Passes over table rows are in
cpu_rows.py.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overtok_megatron.kernels import reference
from overtok_megatron.kernels.documents import Documents

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

    def causal_attention(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: Documents | None = None
    ) -> Tensor:
        if documents is not None:  # the loops know the causal mask and a window only
            return reference.causal_attention(q, k, v, window, documents)
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
    matrix units. The query heads that share a key/value head are rows of one product, consecutive for each position.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, loops: CpuLoops) -> Tensor:
        shared = q.shape[1] // k.shape[1]
        scaled = _rows(q * q.shape[-1] ** -0.5, shared)
        k, v = k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:])
        out = torch.empty_like(scaled, memory_format=torch.contiguous_format)
        for tile in _tiles(k, shared, window):
            probabilities = _probabilities(loops, scaled[tile.heads, tile.rows], k[tile.heads, tile.seen], tile, window)
            torch.bmm(probabilities, v[tile.heads, tile.seen], out=out[tile.heads, tile.rows])
        ctx.save_for_backward(scaled, k, v)
        ctx.shape, ctx.window, ctx.loops = q.shape, window, loops
        return _heads(out, q.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        batch, heads, _, size = ctx.shape
        shared = batch * heads // len(k)
        grad = _rows(grad, shared)
        grad_q = torch.empty_like(q)
        tiles = _tiles(k, shared, ctx.window)
        wide = torch.float32 if tiles[0].stop < k.shape[1] else q.dtype  # several tiles add to one gradient
        grad_k, grad_v = (torch.empty(k.shape, dtype=wide) for _ in "kv")
        for tile in tiles:
            heads, rows, seen = tile.heads, tile.rows, tile.seen
            before = tile.start - seen.start  # keys before the first query
            incoming = grad[heads, rows]
            probabilities = _probabilities(ctx.loops, q[heads, rows], k[heads, seen], tile, ctx.window)
            scores = torch.bmm(incoming, v[heads, seen].mT)
            ctx.loops.call("causal_softmax_backward", q.dtype, probabilities, scores, *scores.shape, before, shared)
            torch.bmm(scores, k[heads, seen], out=grad_q[heads, rows])
            for total, left, right in ((grad_k, scores, q[heads, rows]), (grad_v, probabilities, incoming)):
                if before > 0:
                    total[heads, seen.start : tile.start] += torch.bmm(left[:, :, :before].mT, right)
                total[heads, tile.start : tile.stop] = torch.bmm(left[:, :, before:].mT, right)
        grad_q *= size**-0.5
        shape = (batch, -1, *k.shape[1:])
        return _heads(grad_q, ctx.shape), grad_k.to(k.dtype).view(shape), grad_v.to(v.dtype).view(shape), None, None


def _rows(x: Tensor, shared: int) -> Tensor:
    """[b, h, s, e] -> [b g, s shared, e]: the query heads that share a key/value head, side by side at each position."""
    batch, heads, length, size = x.shape
    grouped = x.reshape(batch, heads // shared, shared, length, size).transpose(2, 3)
    return grouped.reshape(-1, length * shared, size)


def _heads(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_rows`: [b g, s shared, e] -> [b, h, s, e], the given shape, which lies in memory as [b, s, h, e].

    That is how the callers go on with it: the projection after attention, and backward of the rotation before it.
    """
    batch, heads, length, size = shape
    by_position = rows.view(batch, -1, length, rows.shape[1] // length, size).transpose(1, 2)  # [b, s, g, shared, e]
    return by_position.reshape(batch, length, heads, size).transpose(1, 2)


class _Tile(NamedTuple):
    """heads: of k and v. Queries at the positions [start, stop), as rows; the keys that these see end at `stop`, too."""

    heads: slice
    start: int
    stop: int
    rows: slice
    seen: slice


def _tiles(k: Tensor, shared: int, window: int | None) -> list[_Tile]:
    """Those of all heads of k [heads, s, e] and all queries."""
    heads, length, _ = k.shape
    queries = min(_TILE_QUERIES, length)
    queries = max(1, min(queries, max(_TILE_QUERIES // shared, _TILE_VALUES // (shared * length))))
    step = max(1, _TILE_VALUES // (queries * shared * length))
    tiles = []
    for first in range(0, heads, step):
        for start in range(0, length, queries):
            stop = min(start + queries, length)
            seen = slice(0 if window is None else max(0, start - window + 1), stop)
            rows = slice(start * shared, stop * shared)
            tiles.append(_Tile(slice(first, min(first + step, heads)), start, stop, rows, seen))
    return tiles


def _probabilities(loops: CpuLoops, q: Tensor, k: Tensor, tile: _Tile, window: int | None) -> Tensor:
    """q [heads, rows, e], k [heads, seen, e] of a tile -> [heads, rows, seen]."""
    scores = torch.bmm(q, k.mT)
    queries, seen = tile.stop - tile.start, k.shape[1]
    shared = q.shape[1] // queries
    if window is not None and window < seen:
        hidden = reference.window_mask(queries, seen, window, scores.device).logical_not_().unsqueeze(1)
        scores.unflatten(1, (queries, shared)).masked_fill_(hidden, -torch.inf)
    loops.call("causal_softmax", scores.dtype, scores, *scores.shape, seen - queries, shared)
    return scores

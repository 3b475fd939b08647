"""What a step does with rows of the n-gram tables: torch's form of it, and the compiled loops of rows.cpp on CPU.

Shapes: N look-ups, U distinct rows of them, w row width.
"""

import ctypes

import torch
from torch import Tensor

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


class RowKernels:
    """torch's operators, on any device: the meaning of the compiled loops, and what serves without them."""

    def unique(self, ids: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """ids int64 of any shape, in [0, limit) -> (distinct ones [U] ascending, the place of each id there [*ids])."""
        unique, slots = torch.unique(ids, return_inverse=True)
        return unique, slots

    def add(self, total: Tensor, slots: Tensor, grad: Tensor) -> None:
        """total [U, w] float32 += grad [N, w] float32 or bfloat16, row i of it to row slots[i]; slots [N] int64."""
        total.index_add_(0, slots, grad.float())

    def square_sum(self, values: Tensor) -> Tensor:
        """Sum of squares of a float32 tensor, float64 scalar, the same at every run."""
        return values.double().square().sum()

    def adagrad(
        self, weight: Tensor, square_sum: Tensor, rows: Tensor, grad: Tensor, rate: float, eps: float, decay: float
    ) -> None:
        """Row-wise Adagrad in place: s_r += mean(g_r^2); row = decay row - rate g_r / (sqrt(s_r) + eps).

        weight [m, w] float32; square_sum [m] of any float dtype; rows [U] int64, distinct; grad [U, w] float32.
        """
        values = weight.index_select(0, rows)
        if decay != 1.0:
            values.mul_(decay)
        sums = square_sum.index_select(0, rows).float() + grad.square().mean(dim=1)  # [U]
        square_sum.index_copy_(0, rows, sums.to(square_sum.dtype))
        values.addcmul_(grad, (-rate / (sums.sqrt() + eps)).unsqueeze(1))
        weight.index_copy_(0, rows, values)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class CpuRowKernels(RowKernels):
    """The same in compiled loops: a radix sort, sums without copies, and one pass over the rows that change."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.unique_rows.restype = ctypes.c_int64
        library.square_sum_f32.restype = ctypes.c_double

    def unique(self, ids: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        ids = ids.contiguous()
        unique, slots = torch.empty(ids.numel(), dtype=torch.int64), torch.empty_like(ids)
        sizes = (ctypes.c_int64(ids.numel()), ctypes.c_int64(limit.bit_length()))
        count = self._library.unique_rows(_pointer(ids), *sizes, _pointer(unique), _pointer(slots))
        return unique[:count].clone(), slots

    def add(self, total: Tensor, slots: Tensor, grad: Tensor) -> None:
        grad, slots = grad.contiguous(), slots.contiguous()
        assert total.is_contiguous() and total.dtype == torch.float32
        function = getattr(self._library, f"add_rows_{_SUFFIX[grad.dtype]}")
        sizes = (ctypes.c_int64(grad.shape[0]), ctypes.c_int64(grad.shape[1]))
        function(_pointer(grad), _pointer(slots), *sizes, _pointer(total))

    def square_sum(self, values: Tensor) -> Tensor:
        values = values.contiguous()
        total = self._library.square_sum_f32(_pointer(values), ctypes.c_int64(values.numel()))
        return torch.tensor(total, dtype=torch.float64)

    def adagrad(
        self, weight: Tensor, square_sum: Tensor, rows: Tensor, grad: Tensor, rate: float, eps: float, decay: float
    ) -> None:
        if square_sum.dtype != torch.float32:
            super().adagrad(weight, square_sum, rows, grad, rate, eps, decay)
            return
        grad = grad.contiguous()
        tensors = map(_pointer, (weight, square_sum, rows, grad))
        sizes = (ctypes.c_int64(grad.shape[0]), ctypes.c_int64(grad.shape[1]))
        self._library.adagrad_rows_f32(*tensors, *sizes, *map(ctypes.c_float, (rate, eps, decay)))

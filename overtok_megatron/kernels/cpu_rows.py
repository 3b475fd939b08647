"""Rows of the n-gram tables on CPU through the compiled loops of row_*.cpp: same signatures and meaning as rows.py.

Distinct ids come from a radix sort; gradients are summed without a copy; a look-up or an update is one pass over its rows.
"""

import ctypes

import torch
from torch import Tensor

from overtok_megatron.config.schema import RowRule
from overtok_megatron.kernels.rows import (
    CHANGED,
    DistinctIds,
    HashTables,
    RowGradientSums,
    RowKernels,
    RowStep,
    StoredRows,
)

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_FORMAT = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# as `enum Rule` of row_optimizers.cpp numbers them
RULE_NUMBERS: dict[RowRule, int] = {"rowwise_adagrad": 0, "rowwise_adam": 1, "adam": 2, "sgd": 3}


class _Update(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rule", "format", "narrow_state")),
        *((name, ctypes.c_float) for name in ("rate", "decay", "beta1", "beta2", "eps", "factor")),
        *((name, ctypes.c_uint32) for name in ("noise", "flag")),
        ("first_row_id", ctypes.c_int64),
    ]


class _Hash(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("tables", "longest", "base", "pad_id", "reset", "eod_id", "stripes", "total", "smallest")
        ),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("orders", "sizes", "beyond")),
    ]


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class CpuRowKernels(RowKernels):
    """The compiled loops. Results do not depend on the number of threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.unique_ids.restype = ctypes.c_int64
        library.sum_f32.restype = ctypes.c_double

    def ngram_row_ids(self, extended: Tensor, tables: HashTables) -> Tensor:
        extended = extended.contiguous()
        count, longest = len(tables.sizes), max(tables.orders)
        length = extended.shape[-1] - longest + 1
        out = torch.empty((*extended.shape[:-1], length, count), dtype=torch.int64)
        if out.numel() == 0:
            return out
        smallest, numbers = min(tables.sizes), ctypes.c_int64 * count
        beyond = [sum(tables.sizes[:t]) - t * smallest + (count - 1) * smallest for t in range(count)]
        hashed = _Hash(
            count, longest, tables.base, tables.pad_id, tables.reset, tables.eod_id, tables.stripes, sum(tables.sizes),
            smallest, numbers(*tables.orders), numbers(*tables.sizes), numbers(*beyond),
        )  # fmt: skip
        lines = extended.numel() // extended.shape[-1]
        sizes = (ctypes.c_int64(lines), ctypes.c_int64(length))
        self._library.ngram_row_ids(_pointer(extended), *sizes, ctypes.byref(hashed), _pointer(out))
        return out

    def unique(self, ids: Tensor, limit: int) -> DistinctIds:
        ids, bits, shift = ids.contiguous(), limit.bit_length(), ids.numel().bit_length()
        if bits + shift > 64 or ids.numel() >= 2**31:  # an id and its look-up are sorted as one number
            return super().unique(ids, limit)
        unique, sorted_lookups = (torch.empty(ids.numel(), dtype=torch.int64) for _ in range(2))
        slots = torch.empty_like(ids)
        sizes = map(ctypes.c_int64, (ids.numel(), bits, shift))
        count = self._library.unique_ids(_pointer(ids), *sizes, *map(_pointer, (unique, slots, sorted_lookups)))
        return DistinctIds(unique[:count].clone(), slots, sorted_lookups)

    def sort_lookups(self, slots: Tensor, count: int) -> Tensor:
        slots = slots.contiguous()
        assert slots.numel() < 2**31 and count <= 2**31
        sorted_lookups = torch.empty(slots.numel(), dtype=torch.int64)
        sizes = map(ctypes.c_int64, (slots.numel(), count.bit_length()))
        self._library.sort_lookups(_pointer(slots), *sizes, _pointer(sorted_lookups))
        return sorted_lookups

    def _gathered(
        self,
        rows: StoredRows,
        index: Tensor | None,
        slots: Tensor | None,
        sorted_lookups: Tensor | None,
        count: int,
        dtype: torch.dtype,
    ) -> Tensor:
        assert rows.weight.is_contiguous()
        out = torch.empty(count, rows.weight.shape[1], dtype=dtype)
        self._library.gather_rows(
            _pointer(rows.weight),
            ctypes.c_int64(_FORMAT[rows.weight.dtype]),
            *map(_pointer, (rows.scale, index, slots, sorted_lookups)),
            ctypes.c_int64(count),
            ctypes.c_int64(rows.weight.shape[1]),
            _pointer(out),
            ctypes.c_int64(dtype == torch.bfloat16),
        )
        return out

    def read(self, rows: StoredRows, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self._gathered(rows, index.contiguous(), None, None, index.numel(), dtype)

    def gather(
        self,
        rows: StoredRows,
        index: Tensor | None,
        slots: Tensor,
        dtype: torch.dtype,
        sorted_lookups: Tensor | None = None,
    ) -> Tensor:
        gathered = self._gathered(rows, index, slots.contiguous(), sorted_lookups, slots.numel(), dtype)
        return gathered.view(*slots.shape, rows.weight.shape[1])

    def add(self, sums: RowGradientSums, sorted_lookups: Tensor, grad: Tensor, *, fresh: bool = False) -> None:
        grad, total = grad.contiguous(), sums.total
        assert total.is_contiguous() and total.dtype == sums.row_squared_norms.dtype == torch.float32
        function = getattr(self._library, f"add_rows_{_SUFFIX[grad.dtype]}")
        sizes = (ctypes.c_int64(grad.shape[0]), ctypes.c_int64(grad.shape[1]))
        ends = (ctypes.c_int64(total.shape[0]), ctypes.c_int64(fresh))
        function(
            _pointer(grad), _pointer(sorted_lookups), *sizes, _pointer(total), _pointer(sums.row_squared_norms), *ends
        )

    def sum(self, values: Tensor) -> Tensor:
        values = values.contiguous()
        total = self._library.sum_f32(_pointer(values), ctypes.c_int64(values.numel()))
        return torch.tensor(total, dtype=torch.float64)

    def update(self, rows: StoredRows, state: dict[str, Tensor], index: Tensor, grad: Tensor, step: RowStep) -> None:
        grad, index = grad.contiguous(), index.contiguous()
        assert rows.weight.is_contiguous() and grad.dtype == torch.float32
        assert step.rule in RULE_NUMBERS, step.rule
        states = [state.get(name) for name in ("exp_avg", "exp_avg_sq")]
        if step.rule == "rowwise_adagrad":
            states = [state["square_sum"], None]
        narrow = any(tensor.dtype == torch.bfloat16 for tensor in state.values())
        update = _Update(
            RULE_NUMBERS[step.rule], _FORMAT[rows.weight.dtype], narrow, step.rate, step.decay, *step.betas, step.eps,
            step.grad_factor, step.noise, CHANGED, rows.first_row_id,
        )  # fmt: skip
        self._library.update_rows(
            *map(_pointer, (rows.weight, rows.scale, rows.flags, *states, index, grad)),
            ctypes.c_int64(grad.shape[0]),
            ctypes.c_int64(grad.shape[1]),
            ctypes.byref(update),
        )

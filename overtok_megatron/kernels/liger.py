"""Adapter to liger-kernel (BSD, https://github.com/linkedin/Liger-Kernel): RMSNorm, alone and of a sum, and SwiGLU, in Triton.

Its RMSNorm equals ours with the casting mode "gemma": all in float32, rounded once. Its rotation is not used. It has the same
pairs (i, i + e/2), but it works in place on queries and keys together, where ours joins the norm that stands before it, and it
is compiled anew for every batch size. Read at version 0.8.5: liger_kernel/ops/{rms_norm,fused_add_rms_norm,swiglu,rope}.py.
"""

import importlib
from typing import Any

from torch import Tensor

_CASTING_MODE = "gemma"
_OFFSET = 0.0  # added to the weight, in models that store weight - 1
# In place, backward writes into the gradient that arrives, which a residual sum gives to the other summand as well.
_IN_PLACE = False
_PARTS = {
    "rms_norm": "LigerRMSNormFunction",
    "fused_add_rms_norm": "LigerFusedAddRMSNormFunction",
    "swiglu": "LigerFusedGateUpSiLUMulFunction",
}


class LigerPasses:
    """The passes of reference.py that liger-kernel has. Raises ImportError where it is missing or lacks one of them."""

    def __init__(self) -> None:
        found: list[Any] = []
        for module, name in _PARTS.items():
            operations = importlib.import_module(f"liger_kernel.ops.{module}")
            if not hasattr(operations, name):
                raise ImportError(f"liger_kernel.ops.{module} has no {name}")
            found.append(getattr(operations, name))
        self._norm, self._norm_of_sum, self._swiglu = found

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out: Tensor = self._norm.apply(x, weight, eps, _OFFSET, _CASTING_MODE, _IN_PLACE)
        return out

    def norm_of_sum(self, x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, total = self._norm_of_sum.apply(branch, x, weight, eps, _OFFSET, _CASTING_MODE, _IN_PLACE)
        return total, normed

    def swiglu(self, gate_up: Tensor) -> Tensor:
        rows = gate_up.reshape(-1, gate_up.shape[-1])  # its backward returns two dimensions, whatever came in
        out: Tensor = self._swiglu.apply(rows, _IN_PLACE)
        return out.view(*gate_up.shape[:-1], -1)

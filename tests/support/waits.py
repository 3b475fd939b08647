"""Counts where the main thread waits for a device, on a machine without one: by what a program asks of tensors.

On CUDA each of these operators stops the host until the device has done what was launched before. On the CPU none waits, but
all can be seen: a TorchFunctionMode gets every call. What moves a tensor between devices cannot be seen where there is one
device: tools/gpu_checks/waits.py counts with torch's own debug mode. DeepSpeed asks its accelerator to synchronize, which does
nothing on the CPU, but can be counted.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from gpu_checks.waits import Place, explicit_waits_counted, innermost_place
from torch import Tensor
from torch.overrides import TorchFunctionMode

_RUN_BACKWARD = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
_ALWAYS = {
    "item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__float__", "__int__", "__index__", "__contains__",
    "nonzero", "argwhere", "masked_select", "equal", "allclose", "bincount", "histc",
    "unique", "_unique2", "unique_consecutive", "_return_output", "_return_inverse", "_return_counts",
    "_return_inverse_and_counts",
}  # fmt: skip


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of torch has to know values on the device, or copies pageable memory of the host there."""
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name == "repeat_interleave":
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats", args[0])
        return isinstance(repeats, Tensor) and kwargs.get("output_size") is None
    if name in ("tensor", "as_tensor"):  # without a device they make tensors of the host
        value = args[0] if args else kwargs["data"]
        return kwargs.get("device") is not None and not isinstance(value, Tensor)
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        # a mask that is filled with one value needs no count of what it chooses
        filled = name == "__setitem__" and not (isinstance(args[2], Tensor) and args[2].dim() > 0)
        return any(_is_mask(part) for part in index) and not filled
    if name == "to":
        return any(isinstance(part, torch.device) and part != args[0].device for part in (*args[1:], *kwargs.values()))
    return name in _ALWAYS


class WaitCounter(TorchFunctionMode):
    """Counts the waits of the thread that enters it, by the innermost function of this package or DeepSpeed's."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[Place] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward or func is torch.autograd.backward:
            # torch switches a mode off while it handles a call: on again for the functions that run in the backward pass
            with mock.patch.object(torch.autograd, "_engine_run_backward", self._run_backward):
                return func(*args, **kwargs)
        if waits(func.__name__, args, kwargs):
            self.places[innermost_place(2)] += 1
        return func(*args, **kwargs)

    def _run_backward(self, *args: Any, **kwargs: Any) -> Any:
        with self:
            return _RUN_BACKWARD(*args, **kwargs)


@contextmanager
def synchronize_counted() -> Iterator[Counter[Place]]:
    """Counts how often DeepSpeed waits for the whole device, by its function that asked for it."""
    places: Counter[Place] = Counter()
    with explicit_waits_counted(places, [get_accelerator()]):
        yield places

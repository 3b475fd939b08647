"""Spans around DeepSpeed's own collectives, so that a trace, a report on a hang and the times of a rank know of them.

DeepSpeed calls all of its collectives through one object, its backend. The methods are wrapped there: whichever name of
`deepspeed.comm` a caller has imported, it comes through here once.
"""

import functools
from collections.abc import Callable
from typing import Any

import deepspeed.comm.comm as deepspeed_comm
import torch.distributed as dist

from overtok_megatron.parallel.spans import profiler_span, wait_for

# The methods of the backend that communicate, and what a report calls them.
_METHODS = {
    "all_reduce": "all-reduce",
    "inference_all_reduce": "all-reduce",
    "all_reduce_coalesced": "all-reduce",
    "reduce": "reduce",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "broadcast": "broadcast",
    "broadcast_object_list": "broadcast of objects",
    "all_gather": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_base": "all-gather",
    "all_gather_coalesced": "all-gather",
    "all_gather_object": "all-gather of objects",
    "all_to_all_single": "all-to-all",
    "all_to_all": "all-to-all",
    "send": "send",
    "recv": "receive",
    "isend": "send",
    "irecv": "receive",
    "batch_isend_irecv": "send and receive",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
}
_NAMED = "_overtok_named"


def name_collectives() -> None:
    """Wrap the methods of DeepSpeed's backend, once per process; it must have been initialised."""
    backend = deepspeed_comm.cdb
    if getattr(backend, _NAMED, False):
        return
    for method, operation in _METHODS.items():
        setattr(backend, method, _named(getattr(backend, method), f"DeepSpeed's {operation}"))
    setattr(backend, _NAMED, True)


class _NamedWork:
    """A collective of DeepSpeed that was launched and is not waited for yet; all but `wait` is torch's."""

    def __init__(self, work: Any, name: str) -> None:
        self._work = work
        self._name = name

    def wait(self, *arguments: Any) -> Any:
        return wait_for(self._work, self._name, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _named(method: Callable[..., Any], operation: str) -> Callable[..., Any]:
    """The same method in a span. What it returns to be waited for has a span around the wait."""

    @functools.wraps(method)
    def in_span(*arguments: Any, **others: Any) -> Any:
        given = (value for value in (*others.values(), *arguments) if isinstance(value, dist.ProcessGroup))
        group = next(given, None) or dist.distributed_c10d._get_default_group()
        with profiler_span(operation, group):
            result = method(*arguments, **others)
        return _NamedWork(result, f"{group.group_desc}: {operation}") if isinstance(result, dist.Work) else result

    return in_span

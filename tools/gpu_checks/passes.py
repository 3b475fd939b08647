"""The passes between matrix products: each with its gradients against float64, and its time beside that of a copy.

The device's time and the host's are told apart: a call of forward and backward keeps the host busy for several times as long
as the device, and in a step the host prepares them while the device is busy with products.

Shapes: b batch, s sequence, n = b s positions, d hidden, f feed-forward size, h heads, e head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from gpu_checks.registry import Context, Result
from gpu_checks.timing import copy_rate, device_seconds_of, host_seconds_of
from overtok_megatron.config.schema import KernelChoice
from overtok_megatron.errors import ConfigError
from overtok_megatron.kernels import reference
from overtok_megatron.kernels.choice import Kernels, choose_kernels

_EPSILON = 1e-6
# of the largest exact value; bfloat16 keeps 8 bits, and torch's operators round in between
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Pass:
    """One pass: its outputs from leaves that take gradients, and how often it reads or writes n d values at least.

    moved: in forward and backward together, with every tensor read once and written once, as one kernel each would.
    """

    outputs: Callable[[Kernels, list[Tensor]], tuple[Tensor, ...]]
    leaves: list[Tensor]
    moved: int

    def run(self, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Outputs and the gradients of all leaves, from the same values rounded to bfloat16 whatever `dtype` is."""
        leaves = [leaf.bfloat16().to(device, dtype).requires_grad_() for leaf in self.leaves]
        outputs = self.outputs(kernels, leaves)
        generator = torch.Generator().manual_seed(5)
        incoming = [torch.randn(out.shape, generator=generator).bfloat16().to(device, dtype) for out in outputs]
        return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, incoming)]

    def timed(self, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
        """Seconds of forward and backward: those of the device, and those that the host takes to enqueue them."""
        leaves = [leaf.to(device, dtype).requires_grad_() for leaf in self.leaves]
        incoming = [torch.ones_like(out) for out in self.outputs(kernels, leaves)]

        def call() -> object:
            return torch.autograd.grad(self.outputs(kernels, leaves), leaves, incoming)

        return device_seconds_of(call, device), host_seconds_of(call, device)


def passes(batch: int, length: int, hidden_size: int, head_size: int, device: torch.device) -> dict[str, Pass]:
    """All passes on one batch; f = 2 d."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    x, branch = draw(2, batch, length, hidden_size)
    weight = 1 + 0.1 * draw(hidden_size)
    angle = draw(length, 1, head_size // 2)
    cos, sin = angle.cos().to(device), angle.sin().to(device)

    def norm(kernels: Kernels, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return (kernels.rms_norm(leaves[0], leaves[1], _EPSILON),)

    def add_normed(kernels: Kernels, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return (kernels.add_normed(leaves[0], leaves[1], leaves[2], _EPSILON),)

    def norm_of_sum(kernels: Kernels, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return kernels.norm_of_sum(leaves[0], leaves[1], leaves[2], _EPSILON)

    def rotate(kernels: Kernels, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return (kernels.rotate(leaves[0].unflatten(-1, (-1, head_size)), cos, sin),)

    def norm_and_rotate(kernels: Kernels, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return (kernels.norm_and_rotate(leaves[0], leaves[1], _EPSILON, cos, sin, hidden_size, None),)

    def swiglu(kernels: Kernels, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return (kernels.swiglu(leaves[0]),)

    return {
        "norm": Pass(norm, [x, weight], 2 + 3),
        "x + norm": Pass(add_normed, [x, branch, weight], 3 + 3),
        "norm of sum": Pass(norm_of_sum, [x, branch, weight], 4 + 4),
        "rotary": Pass(rotate, [x], 2 + 2),
        "norm and rotary": Pass(norm_and_rotate, [x, weight], 2 + 3),
        "SwiGLU": Pass(swiglu, [torch.cat([x, branch, branch, x], -1)], 6 + 10),
    }


def exact_kernels() -> Kernels:
    """The passes by their formulas in the dtype of their input, for float64."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    return Kernels(
        rms_norm=norm,
        add_normed=partial(reference.add_normed, norm=norm),
        norm_of_sum=partial(reference.norm_of_sum, norm=norm),
        norm_and_rotate=partial(reference.norm_and_rotate, norm=norm, rotation=rotation),
        rotate=rotation,
    )


def largest_error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Of all values, as a share of the largest exact value of their tensor."""
    pairs = [(mine.detach().double(), wanted.detach()) for mine, wanted in zip(ours, exact, strict=True)]
    return max(float((mine - wanted).abs().max() / wanted.abs().max()) for mine, wanted in pairs)


def fused_passes(context: Context) -> Result:
    """Every implementation that a choice of `training.kernels` stands for on this machine; "auto" is one of the others."""
    sizes = (2, 4096, 2048, 128) if context.cuda else (2, 37, 64, 16)
    device, dtype = context.device, torch.bfloat16
    cases, exact = passes(*sizes, device), exact_kernels()
    wanted = {name: case.run(exact, torch.float64, device) for name, case in cases.items()}
    values = sizes[0] * sizes[1] * sizes[2] * dtype.itemsize
    rate, wrong = copy_rate(context), []
    seconds: dict[str, dict[str, float]] = {}  # of the device, by implementation and pass
    host: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    for choice in get_args(KernelChoice):
        try:
            kernels = choose_kernels(choice, device)
        except ConfigError:
            continue  # a package that is not installed, or that needs CUDA
        names[choice] = own = kernels.name
        if own in errors:
            continue
        errors[own], seconds[own], host[own] = {}, {}, {}
        for name, case in cases.items():
            errors[own][name] = error = largest_error(case.run(kernels, dtype, device), wanted[name])
            if not error <= TOLERANCES[dtype]:
                wrong.append(f"{own}, {name}: off by {error:.1e}")
            seconds[own][name], host[own][name] = case.timed(kernels, dtype, device)
    least = {name: case.moved * values / rate for name, case in cases.items()}
    shares = [f"{own} {sum(least.values()) / sum(found.values()):.0%}" for own, found in seconds.items()]
    calls = [f"{own} {1e6 * sum(found.values()) / len(found):.0f}" for own, found in host.items()]
    figure = (
        f"share of a copy's speed by the device's time: {', '.join(shares)}; the host's us per call: {', '.join(calls)}"
    )
    return Result(
        not wrong,
        "; ".join(wrong) or f"auto is {names['auto']}; {figure}",
        f"off by {TOLERANCES[dtype]:.0e} of the largest",
        {"errors": errors, "device_seconds": seconds, "host_seconds": host, "copy_seconds": least, "choices": names},
    )

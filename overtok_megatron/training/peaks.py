"""Peak speed of a device, the denominator of model FLOPs utilisation: from its datasheet, or measured, and then labelled so.

Not here: how many FLOPs a model needs (config/counts.py).
"""

import time
from dataclasses import dataclass

import torch

from overtok_megatron.parallel.devices import synchronize

# Part of the name that the driver gives -> TFLOP/s of dense products in bfloat16 (without sparsity), and in float32 outside
# the tensor cores, which is what float32 runs use: torch does not round them to TF32 unless told to. The first match counts,
# so longer names come first. Sources: NVIDIA's datasheets of each card (those that quote sparsity halved) and the
# architecture whitepapers of Ampere (GA102), Ada and Turing; AMD's datasheets of the Instinct MI250X, MI300X and MI325X.
_DATASHEETS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("GH200", 989.4, 66.9),
    ("H200 NVL", 835.5, 60.0),
    ("H200", 989.4, 66.9),
    ("H100 NVL", 835.5, 60.0),
    ("H100 PCIe", 756.5, 51.2),
    ("H100", 989.4, 66.9),
    ("H800", 989.4, 66.9),
    ("H20", 148.0, 44.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("A40", 149.7, 37.4),
    ("A30", 165.0, 10.3),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 31.2),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("RTX 6000 Ada", 364.2, 91.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
    ("MI325X", 1307.4, 163.4),
    ("MI300X", 1307.4, 163.4),
    ("MI250X", 191.5, 23.9),  # one of the two dies, which are two devices
)
# Words in a name that make it another card than the known one, or a part of one (MIG).
_OTHER_CARDS = ("MIG", "Laptop", "Max", "Mobile", "Ti", "SUPER", "D")


@dataclass(frozen=True)
class Peak:
    """flops: FLOP/s of dense products. source: where that figure comes from, as text for the log."""

    flops: float
    source: str


def datasheet(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s that the datasheet of a device of this name states for products in bfloat16 or float32; None if unknown."""
    words = f" {name.replace('-', ' ')} "
    if any(f" {word} " in words for word in _OTHER_CARDS):
        return None
    for part, bfloat16, float32 in _DATASHEETS:
        if f" {part} " in words:
            return (bfloat16 if dtype == torch.bfloat16 else float32) * 1e12
    return None


def measured(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product on this process's device: the best of five."""
    size = 8192 if device.type == "cuda" else 768
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        product = left @ left
        synchronize(device)
        best = min(best, time.perf_counter() - started)
        del product
    return 2 * size**3 / best


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """The highest speed that the device could reach in matrix products of `dtype`, bfloat16 or float32.

    From its datasheet; a CPU, and a card that is not in the table, gets the speed of one large product, measured now.
    """
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        stated = datasheet(name, dtype)
        if stated is not None:
            return Peak(stated, f"datasheet of {name}, dense {kind}")
        return Peak(measured(device, dtype), f"measured {kind} product: no datasheet figure for {name}")
    return Peak(measured(device, dtype), f"measured {kind} product on this CPU")

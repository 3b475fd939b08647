"""The device of a process, which is created once at the root and passed down as an argument, and what depends on it.

`torch.device("cuda")` and `torch.device("cuda:0")` are unequal although they mean the same card, so code that compares a
tensor's device with the wanted one takes the wrong branch. Devices here always have an index, as the devices of tensors do.
"""

from typing import Literal

import torch

from overtok_megatron.errors import ConfigError

CPU = torch.device("cpu")


def num_accelerators() -> int:
    """How many CUDA devices this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_name(device: torch.device) -> str | None:
    """What its maker calls a CUDA device; None for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def indexed(device: torch.device) -> torch.device:
    """The same device with its index: `cuda` becomes the current CUDA device; `cpu` has no index."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def default_device() -> torch.device:
    """The current CUDA device where there is one, else the CPU."""
    return indexed(torch.device("cuda")) if num_accelerators() else CPU


def first_device() -> torch.device:
    """A device of the kind that ranks will run on. Does not initialise CUDA, which would take memory on the device."""
    return torch.device("cuda", 0) if num_accelerators() else CPU


def named_device(name: str, key: str) -> torch.device:
    """The device that a user named, such as `cpu`, `cuda` or `cuda:1`.

    Makes it the current device of the calling thread. key: where it was named, for the message. Raises ConfigError where
    this machine has no such device.
    """
    count = num_accelerators()
    known = ["cpu", "cuda", *(f"cuda:{index}" for index in range(count))] if count else ["cpu"]
    if name not in known:
        has = f"this machine has {count} CUDA devices" if count else "this machine has no CUDA device"
        named = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0"
        way_out = f"write cpu, cuda, or {named}" if count else "write cpu"
        raise ConfigError(f"{key}: {name!r}; {has}; {way_out}")
    device = indexed(torch.device(name))
    make_current(device)
    return device


def local_device(local_rank: int) -> torch.device:
    """The device of rank `local_rank` on this host: the CUDA device with that index, the only visible one, or the CPU.

    Makes it the current device of the calling thread. Raises ConfigError where several devices are visible, but fewer than
    the ranks of this host. With one visible device no error is raised: a launcher may show each rank a device of its own.
    """
    count = num_accelerators()
    if count == 0:
        return CPU
    if local_rank >= count > 1:
        raise ConfigError(
            f"rank {local_rank} of this host: only {count} CUDA devices are visible; start one rank per device, or set "
            "CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", local_rank if count > 1 else 0)
    make_current(device)
    return device


def identity(device: torch.device) -> str | None:
    """What tells a CUDA device from every other one; None for the CPU, which processes share."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def make_current(device: torch.device) -> None:
    """Make `device` the current one of the calling thread; every thread starts on device 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def backend_of(device: torch.device) -> Literal["nccl", "gloo"]:
    """The communication library for tensors on that device."""
    return "nccl" if device.type == "cuda" else "gloo"

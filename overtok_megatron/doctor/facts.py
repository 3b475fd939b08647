"""What a host is: versions, devices, memory, limits and network interfaces, as values that can be compared between hosts.

Takes no memory on a device: names and free memory come from nvidia-smi. Not here: what the host reads of a run (run_facts.py).
"""

import csv
import hashlib
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

import overtok_megatron
from overtok_megatron.doctor.interfaces import (
    Interface,
    gloo_interface,
    host_addresses,
    interfaces_up,
    nccl_interface,
)
from overtok_megatron.environment import ACCELERATOR, available_cores
from overtok_megatron.files import nearest_folder
from overtok_megatron.parallel.devices import num_accelerators

NONE = "none"
_PACKAGES = ("deepspeed", "numpy", "triton")
_READ = ("NCCL_", "GLOO_", "TORCH_NCCL_", ACCELERATOR)  # how variables begin that all hosts should share
_SHARED_MEMORY = Path("/dev/shm")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_INFINIBAND = Path("/sys/class/infiniband")
_SECONDS = 20.0  # that nvidia-smi may take; it waits for a driver that hangs


@dataclass(frozen=True)
class Device:
    """A device as nvidia-smi sees it; bytes."""

    name: str
    memory: int
    free: int


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """A host. Sizes in bytes, limits None = unlimited. cuda_devices: those that torch sees; devices: all, by nvidia-smi.

    folder: the one that free_disk is about. environment: variables that NCCL, gloo and DeepSpeed read.
    """

    versions: dict[str, str]
    devices: list[Device]
    cuda_devices: int
    cores: int
    memory: int
    free_memory: int
    shared_memory: int
    free_shared_memory: int
    folder: str
    free_disk: int
    open_files: int | None
    locked_memory: int | None
    gloo: Interface
    nccl: Interface
    infiniband_ports: int
    environment: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "HostFacts":
        parts = {
            "devices": [Device(**one) for one in values["devices"]],
            "gloo": Interface(**values["gloo"]),
            "nccl": Interface(**values["nccl"]),
        }
        return cls(**(values | parts))


def host_facts(environment: Mapping[str, str], folder: Path) -> HostFacts:
    """Look at this host. folder: an existing one or one to be made, of whose disk the free bytes are told."""
    driver, devices = _nvidia()
    up = interfaces_up()
    memory = psutil.virtual_memory()
    limit = _cgroup_limit()
    shared = shutil.disk_usage(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None
    return HostFacts(
        versions=_versions(driver),
        devices=devices,
        cuda_devices=num_accelerators(),
        cores=available_cores(),
        memory=min(memory.total, limit or memory.total),
        free_memory=min(memory.available, limit or memory.available),
        shared_memory=shared.total if shared else 0,
        free_shared_memory=shared.free if shared else 0,
        folder=str(folder),
        free_disk=shutil.disk_usage(nearest_folder(folder)).free,
        open_files=_soft_limit(resource.RLIMIT_NOFILE),
        locked_memory=_soft_limit(resource.RLIMIT_MEMLOCK),
        gloo=gloo_interface(environment, up, host_addresses(socket.gethostname())),
        nccl=nccl_interface(environment, up),
        infiniband_ports=_infiniband_ports(),
        environment={name: value for name, value in sorted(environment.items()) if name.startswith(_READ)},
    )


def _versions(driver: str) -> dict[str, str]:
    found = {
        "overtok_megatron": f"{overtok_megatron.__version__} (sources {_source_digest()})",
        "python": platform.python_version(),
        "torch": torch.__version__,  # says which build it is, which the package's own version does not
        "cuda": torch.version.cuda or NONE,
        "nccl": ".".join(map(str, torch.cuda.nccl.version()))
        if torch.version.cuda and dist.is_nccl_available()
        else NONE,
        "driver": driver,
    }
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = NONE
    return found


def _source_digest() -> str:
    """The first 8 digits of the SHA-256 of this package's sources: two checkouts of one version may differ."""
    root = Path(overtok_megatron.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cpp", ".h")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def _nvidia() -> tuple[str, list[Device]]:
    """The driver's version and its devices; (none, []) where nvidia-smi is absent, fails or does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return NONE, []
    query = [command, "--query-gpu=driver_version,memory.total,memory.free,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"does not answer ({_SECONDS:.0f} s)", []
    return parse_nvidia(done.stdout) if done.returncode == 0 else (NONE, [])


def parse_nvidia(text: str) -> tuple[str, list[Device]]:
    """nvidia-smi's lines of driver, total MiB, free MiB, name. What it does not know is written in brackets: 0 bytes here."""
    rows = [row for row in csv.reader(text.splitlines(), skipinitialspace=True) if len(row) == 4]
    devices = [Device(name, _mebibytes(total), _mebibytes(free)) for _, total, free, name in rows]
    return rows[0][0] if rows else NONE, devices


def _mebibytes(text: str) -> int:
    return int(text) * 2**20 if text.isdigit() else 0


def _cgroup_limit() -> int | None:
    """How much memory this container may use; None where nothing limits it."""
    try:
        text = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _soft_limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _infiniband_ports() -> int:
    """How many ports of InfiniBand and RoCE devices are active."""
    states = _INFINIBAND.glob("*/ports/*/state") if _INFINIBAND.is_dir() else []
    return sum("ACTIVE" in path.read_text(encoding="ascii", errors="replace") for path in states)

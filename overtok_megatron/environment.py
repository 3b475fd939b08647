"""Environment variables of a process that computes. Set before torch is imported: libraries read them when loaded.

What the caller has already set is kept. The functions here only read and change mappings; they import nothing heavy.
"""

import os
from collections.abc import Mapping, MutableMapping

from overtok_megatron.errors import ConfigError

# glibc returns every large buffer to the system and allocates it again, page by page; keeping buffers halves the time of a
# CPU step. Huge pages save walks through page tables, because look-ups read rows all over the n-gram tables.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "THP_MEM_ALLOC_ENABLE": "1",
}
# A thread of GNU OpenMP that waits for the others spins 300,000 times before it sleeps. Where another process needs the core,
# the thread that is waited for cannot run meanwhile, and every parallel loop takes as long as a scheduler's time slice.
SPIN_COUNT = "1000"
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # where both are set, OpenMP follows the first
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it cuBLAS may choose another algorithm from run to run
VISIBLE = "CUDA_VISIBLE_DEVICES"
ACCELERATOR = "DS_ACCELERATOR"  # DeepSpeed's own
_CALLERS_VISIBLE = "OVERTOK_CUDA_VISIBLE_DEVICES"
# What libraries of a rank read, and where they lie: a shell that ssh opens on another host has none of it. No names under which
# people keep secrets: command lines can be read by every user of a host.
_TRAVEL = (
    "CUBLAS_", "CUDA_", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "GOMP_", "KMP_", "LD_LIBRARY_PATH", "LD_PRELOAD", "MALLOC_",
    "MKL_", "NCCL_", "OMP_", "OPENBLAS_", "OVERTOK_", "PATH", "PYTHON", "PYTORCH_", "THP_MEM_", "TORCH_", "TORCHINDUCTOR_",
    "TRITON_", "UCX_", "XDG_CACHE_HOME",
)  # fmt: skip


def available_cores() -> int:
    """How many CPU cores this process may use: a batch system may have given it only some of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def asks_for_cpu(environment: Mapping[str, str]) -> bool:
    """Whether DeepSpeed's own variable chooses the CPU: then a run takes no GPU, though the machine may have some.

    Raises ConfigError where it names something that no run can use, for which DeepSpeed would raise a traceback.
    """
    chosen = environment.get(ACCELERATOR, "cuda")
    if chosen not in ("cpu", "cuda"):
        raise ConfigError(f"{ACCELERATOR}: {chosen!r}; set it to cpu or cuda, or unset it")
    return chosen == "cpu"


def usable_devices(environment: Mapping[str, str], present: int) -> int:
    """How many of the `present` CUDA devices a run may use: none where DS_ACCELERATOR chooses the CPU.

    Raises ConfigError where it names something else than cpu and cuda, or cuda where there is no CUDA device.
    """
    if asks_for_cpu(environment):
        return 0
    if not present and ACCELERATOR in environment:
        raise ConfigError(f"{ACCELERATOR}: cuda, but torch sees no CUDA device here; set it to cpu, or unset it")
    return present


def set_library_defaults(environment: MutableMapping[str, str]) -> None:
    """What the libraries of every process read when they are loaded, unless the caller has chosen otherwise.

    OpenMP threads sleep soon when they wait. Triton fuses multiplications and additions, which is its default up to release
    3.9 and not after it: the last bits of the row kernels must not depend on the release.
    """
    if not any(name in environment for name in _WAITING):
        environment[_WAITING[0]] = SPIN_COUNT
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def make_deterministic(environment: MutableMapping[str, str]) -> None:
    """Give cuBLAS the workspace with which its products have the same bits in every run."""
    environment.setdefault(CUBLAS_WORKSPACE, ":4096:8")


def rank_environment(
    caller: Mapping[str, str], ranks_per_host: int, *, deterministic: bool, cuda: bool | None
) -> dict[str, str]:
    """The whole environment of a rank that a launcher starts; caller: the environment of the process that calls the launcher.

    cuda: whether ranks compute on CUDA devices; None = each host sees for itself.
    Threads and the allocator are set on GPU machines too: tables in host memory and offloaded optimizers compute on the CPU.
    DeepSpeed's launcher replaces CUDA_VISIBLE_DEVICES by its own numbers and cannot read names of devices (UUIDs), so the
    caller's value is passed under another name, and `restore_visible_devices` restores it in the rank.
    """
    environment = dict(caller)
    wanted = {} if cuda is None else {ACCELERATOR: "cuda" if cuda else "cpu"}
    wanted |= {
        "OMP_NUM_THREADS": str(max(1, available_cores() // ranks_per_host)),
        "PYTHONSAFEPATH": "1",  # a file of the caller's folder must not stand in for a module of the same name
        **ALLOCATOR,
    }
    for name, value in wanted.items():
        environment.setdefault(name, value)
    # an empty part of this path is that folder, too
    path = [part for part in environment.pop("PYTHONPATH", "").split(os.pathsep) if part]
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(path)
    set_library_defaults(environment)
    if deterministic:
        make_deterministic(environment)
    if VISIBLE in environment:
        environment[_CALLERS_VISIBLE] = environment.pop(VISIBLE)
    return environment


def callers_devices(environment: Mapping[str, str]) -> str | None:
    """The devices that the launcher's caller sees, in an environment of `rank_environment`; None where all are visible."""
    return environment.get(_CALLERS_VISIBLE)


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """What of a rank's environment must be set on other hosts as well; PYTHONPATH also where it is empty.

    DeepSpeed's launcher would put the current folder into it, whose files must not stand in for modules.
    """
    found = {name: value for name, value in environment.items() if name.startswith(_TRAVEL) and name != "DS_ENV_FILE"}
    return {"PYTHONPATH": ""} | found


def restore_visible_devices(environment: MutableMapping[str, str]) -> None:
    """In a rank, before CUDA is used: make visible the devices that the launcher's caller sees, not those that it counted."""
    if _CALLERS_VISIBLE in environment:
        environment[VISIBLE] = environment.pop(_CALLERS_VISIBLE)

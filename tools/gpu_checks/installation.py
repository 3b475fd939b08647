"""What is installed, and whether the pieces that are needed are there: the first check, and the head of the JSON file."""

import platform
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gpu_checks.registry import Context, Result
from overtok_megatron.kernels.build import load_library
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.parallel.devices import num_accelerators

ROOT = Path(__file__).parent.parent.parent
_SEEN = (
    "torch",
    "triton",
    "deepspeed",
    "numpy",
    "pydantic",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "apex",
    "liger-kernel",
)


def _output(*command: str) -> str | None:
    """What a command prints, on one line; None where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    return " / ".join(done.stdout.split("\n")).strip(" /") if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Versions of packages, libraries, driver and this source tree. Takes no memory on a device."""
    found: dict[str, Any] = {name: _version(name) for name in _SEEN}
    found |= {
        "python": platform.python_version(),
        "torch": torch.__version__,  # says which build it is, which the package's own version does not
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain")),
        "devices": num_accelerators(),
    }
    return found


def device_name(cuda: bool) -> str:
    """The name of the card, or of the processor; a process that asks for the card's takes memory on it."""
    if cuda:
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    name = re.search(r"model name\s*: (.*)", text)
    return f"CPU ({name[1].strip() if name else platform.machine()})"


def _requirements() -> list[tuple[str, str | None, str]]:
    """(package, found version, wanted versions) of what pyproject.toml requires and is missing or of another version."""
    from packaging.requirements import Requirement

    wrong = []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in project["dependencies"]:
        wanted = Requirement(text)
        found = _version(wanted.name)
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            wrong.append((wanted.name, found, str(wanted.specifier) or "any"))
    return wrong


def installation(context: Context) -> Result:
    """Requirements are met, DeepSpeed imports, and rows have the kernels that belong to the device."""
    import deepspeed

    found = versions()
    problems = [f"{name} {have or 'is missing'} (needs {wanted})" for name, have, wanted in _requirements()]
    rows = type(choose_kernels("auto", context.device).rows)
    if context.cuda and rows is RowKernels:
        problems.append("triton does not import, so rows use torch's operators")
    if load_library() is None:
        problems.append("the CPU loops do not compile (no C++ compiler?), so tables in host memory are slow")
    if context.cuda:
        card = torch.cuda.get_device_properties(context.device)
        found |= {"capability": [card.major, card.minor], "memory_bytes": card.total_memory}
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    words = f"torch {torch.__version__}, deepspeed {deepspeed.__version__}, {rows.__name__}"
    return Result(not problems, "; ".join(problems) or words, "pyproject.toml", found)

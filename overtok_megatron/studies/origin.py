"""What computed a cell: the commit of this package, the processor, and torch."""

import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Origin:
    """commit: None = the package does not lie in a git repository. clean: whether its files are those of the commit."""

    commit: str | None
    clean: bool
    processor: str
    torch: str


def origin(devices: int) -> Origin:
    """What this host would compute a run with now. devices: how many CUDA devices the run may use."""
    commit = _git("rev-parse", "HEAD")
    # The package alone: a study writes results and pictures beside itself, and they change no number.
    changes = None if commit is None else _git("status", "--porcelain", "--", str(PACKAGE))
    return Origin(commit=commit, clean=changes == "", processor=processor(devices), torch=version("torch"))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def processor(devices: int) -> str:
    """The accelerator that a run would use, or the model of the CPU."""
    if devices:
        from overtok_megatron.parallel.devices import device_name, first_device  # late: it imports torch

        return device_name(first_device()) or "unknown"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return models[0] if models else platform.machine()

"""How much memory the contenders of a benchmark may take together, and which of them are left out because they need more."""

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import psutil
import torch

_SHARE = 0.8  # of what is available, where nobody names a limit
_CGROUP = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int:
    """Bytes that this process may still take, of the device or of the host; a container's limit counts."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    left: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # no such files outside Linux, and "max" where there is no limit
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        left = min(left, max(0, limit - used + int(kept["inactive_file"])))  # pages of files, which give way
    return left


def held(device: torch.device) -> int:
    """Bytes that this process holds, once what nobody refers to has been given back."""
    gc.collect()  # modules lie in cycles, and hold gigabytes
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)
    with suppress(OSError, AttributeError):  # glibc's: it keeps freed buffers up to its threshold, and they count
        ctypes.CDLL(None).malloc_trim(0)
    resident: int = psutil.Process().memory_info().rss
    return resident


class Budget:
    """limit: bytes that this process may hold in all. What it holds already counts, and so do the pages that a contender
    has been promised but has not touched yet, which no figure of the system shows."""

    def __init__(self, gibibytes: float | None, device: torch.device) -> None:
        """gibibytes: None = four fifths of what is available now, and what the process holds."""
        self.device = device
        own = held(device)
        self.limit = own + int(_SHARE * available(device)) if gibibytes is None else int(gibibytes * 2**30)
        self.left_out: dict[str, int] = {}
        self._words: list[str] = []
        self._base, self._promised = own, 0

    def begin(self) -> None:
        """Start anew: nothing that was promised is still held, or it is part of what the process holds now."""
        self._base, self._promised, self.left_out, self._words = held(self.device), 0, {}, []

    def fits(self, size: int) -> bool:
        return self._base + self._promised + size <= self.limit

    def take(self, name: str, size: int) -> bool:
        """Whether a contender of `size` bytes may be made beside what is there; one that may not is noted by its name."""
        if self.fits(size):
            self._promised += size
            return True
        self.left_out[name] = size
        needs, before, limit = (part / 2**30 for part in (size, self._base + self._promised, self.limit))
        self._words.append(
            f"{name} left out: {needs:.2f} GiB beside {before:.2f} GiB is more than {limit:.2f} GiB (--memory)"
        )
        return False

    def give_back(self, size: int) -> None:
        """A contender that was promised `size` bytes is gone."""
        self._promised -= size

    def words(self) -> str:
        """What was left out and why, for people; "" = nothing was."""
        return "; ".join(self._words)

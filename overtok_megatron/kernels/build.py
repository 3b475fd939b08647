"""Compiles the C++ kernels of this folder with the machine's compiler, once; the library is kept in the user's cache folder."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / f"{name}.cpp" for name in ("cpu", "row_hash", "row_lookups", "row_gradients", "row_optimizers")]
_HEADERS = [_FOLDER / f"{name}.h" for name in ("bfloat16", "rows")]
# The parts of fast-math that let loops be vectorised. Not all of it: NaN must stay NaN, or a diverged run would look healthy,
# and a library linked with -ffast-math makes the whole process flush subnormal numbers when it is loaded.
_MATH = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"]
_FLAGS = ["-O3", "-march=native", *_MATH, "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-std=c++17"]


def _processor() -> str:
    """What -march=native depends on: a cached library must not travel to a machine without its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL | None:
    """The compiled library, or None where there is no compiler or it fails; then torch's operators serve."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        log.warning("no C++ compiler: torch's own operators are used on CPU, which are slower")
        return None
    text = b"".join(source.read_bytes() for source in [*_SOURCES, *_HEADERS])
    content = text + " ".join([compiler, *_FLAGS]).encode() + _processor().encode()
    folder = Path.home() / ".cache" / "overtok_megatron"
    path = folder / f"cpu-{hashlib.sha256(content).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several ranks may build at once: each its own
                built = Path(scratch) / path.name
                command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True)
                os.replace(built, path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().splitlines()[:1]
    except OSError as error:
        reason = [str(error)]
    log.warning("the CPU kernels could not be built (%s): torch's own operators are used, which are slower", *reason)
    return None

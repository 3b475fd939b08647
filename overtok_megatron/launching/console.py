"""The command `overtok`, for programs that run it in a process of its own."""

import subprocess
import sys


def overtok_command(*arguments: object) -> list[str]:
    """The command line of `overtok` in this Python. -P: no file of the current folder is imported in place of a module."""
    return [sys.executable, "-P", "-m", "overtok_megatron.cli", *map(str, arguments)]


def run_overtok(*arguments: object) -> None:
    """Run `overtok`; its output is shown as it comes. Raises subprocess.CalledProcessError where it fails."""
    subprocess.run(overtok_command(*arguments), check=True)


def overtok_output(*arguments: object) -> str:
    """What `overtok` prints; raises as `run_overtok`."""
    return subprocess.run(overtok_command(*arguments), check=True, stdout=subprocess.PIPE, text=True).stdout

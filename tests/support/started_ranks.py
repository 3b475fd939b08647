"""Ranks that a test starts as a batch system does: each a process of its own with that system's variables."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from overtok_megatron.launching.local import ENTRY, free_port

# Variables that tell a process its rank; those of the tests' own environment must not reach a rank.
_PREFIXES = ("SLURM_", "OMPI_", "PMI", "MPI_", "TORCHELASTIC_")
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def plain_environment() -> dict[str, str]:
    """The tests' environment without any rank, for a run on the CPU with one thread per process."""
    kept = {name: value for name, value in os.environ.items() if name not in _NAMES and not name.startswith(_PREFIXES)}
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def slurm_tasks(hosts: int, per_host: int) -> list[dict[str, str]]:
    """The variables of the tasks of a step; all its hosts are this one, by its name."""
    job = str(free_port())  # another number in every test: the port of a run follows from it
    return [
        {
            "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_PROCID": str(host * per_host + local),
            "SLURM_LOCALID": str(local), "SLURM_NODEID": str(host), "SLURM_NTASKS": str(hosts * per_host),
            "SLURM_STEP_NUM_TASKS": str(hosts * per_host), "SLURM_STEP_TASKS_PER_NODE": f"{per_host}(x{hosts})",
            "SLURM_STEP_NODELIST": ",".join([socket.gethostname()] * hosts),
        }
        for host in range(hosts) for local in range(per_host)
    ]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    code: int
    output: str
    errors: list[str]  # its lines for the user


def run_started(
    tasks: Sequence[Mapping[str, str]],
    *arguments: object,
    folders: Sequence[Path] | None = None,
    others: Mapping[int, Sequence[object]] | None = None,
    timeout: float = 150,
) -> list[Ended]:
    """Start one rank for each of `tasks`, the variables of a rank, and wait until all have ended.

    folders: in which each is started; None = the current one. others: arguments of the ranks that have other ones.
    """
    processes = []
    for number, variables in enumerate(tasks):
        words = (others or {}).get(number, arguments)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-P", "-m", ENTRY, *map(str, words)],
                env=plain_environment() | variables,
                cwd=None if folders is None else folders[number],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    deadline = time.monotonic() + timeout
    ended = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            errors = [line for line in output.splitlines() if line.startswith("error")]
            ended.append(Ended(process.returncode, output, errors))
    finally:
        for process in processes:
            process.kill()
    return ended

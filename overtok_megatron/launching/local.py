"""Start a run from this host: everything is checked in one process before DeepSpeed's launcher starts the ranks.

The ranks run on this host, or on those of a cluster (cluster.py).
"""

import os
import re
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import psutil

from overtok_megatron.config.derived import train_iters
from overtok_megatron.config.loading import LoadedConfig, save_resolved
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate
from overtok_megatron.environment import rank_environment, usable_devices
from overtok_megatron.errors import CheckpointError, ConfigError
from overtok_megatron.launching.cluster import (
    Cluster,
    check_cluster,
    cluster_command,
    deepspeed_launcher,
    signal_first_rank,
)
from overtok_megatron.launching.preparation import check_inputs, make_folder, store_inputs
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.run_lock import RunLock, hold
from overtok_megatron.watching.supervisor import Reached, Supervisor

ENTRY = "overtok_megatron.training.entry"  # the module that every rank runs
STORED = "--stored"  # its option: the configuration was checked and stored by this process


def free_port() -> int:
    """A port on which nobody listens at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def launch(
    loaded: LoadedConfig,
    processes: int,
    master_port: int | None = None,
    cluster: Cluster | None = None,
    *,
    max_restarts: int = 0,
) -> int:
    """Validate, store the resolved configuration beside the run, and train on `processes` ranks.

    master_port: where the ranks meet; None = a free one. cluster: the hosts of the ranks; None = this one. max_restarts: how
    many times the job is started again after a failure. Returns the exit code of the ranks (watching/supervisor.py).
    """
    config = loaded.config
    here, most = (processes, processes) if cluster is None else (cluster.ranks_here, cluster.most_ranks)
    devices = _check(loaded, processes, here)
    environment = rank_environment(
        os.environ, most, deterministic=config.training.deterministic, cuda=devices > 0 if here else None
    )
    if cluster is not None:
        check_cluster(cluster, environment)
    directory = make_folder(config)
    with hold(directory, "overtok train") as lock:
        resolved = store_inputs(config, directory)
        made_before = _latest_mark(directory)
        words = [str(resolved), STORED]

        def start() -> "subprocess.Popen[bytes]":
            if config.training.resume == "never" and _latest_mark(directory) != made_before:
                # the start before this one began the run anew, as asked for; this one goes on with it
                training = config.training.model_copy(update={"resume": "auto"})
                save_resolved(config.model_copy(update={"training": training}), resolved)
            if cluster is None:
                command = launcher_command(ENTRY, words, processes, master_port)
                return subprocess.Popen(command, env=environment, process_group=0)
            files.close()  # those of the start before
            variables = dict(environment)
            command = files.enter_context(cluster_command(cluster, ENTRY, words, variables, master_port))
            return subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, process_group=0)

        if cluster is None:
            lock.lend()  # the ranks hold the run as well: this process may be killed while they live
            ask = signal_ranks
        else:
            lock.release()  # the first rank takes it: on its own host, or not as a descendant of this process
            ask = partial(_signal_cluster, cluster, directory, environment)
        with ExitStack() as files:
            supervisor = Supervisor(start, ask, lambda: _wait_for_ranks(lock), lambda: finished(directory, config))
            return supervisor.run(max_restarts)


def _signal_cluster(cluster: Cluster, directory: Path, environment: dict[str, str], _: int, number: int) -> Reached:
    """Send a signal to the first rank, which is ready for it when its host can be found: all ranks stop together."""
    return Reached.READY if signal_first_rank(cluster, directory, environment, number) else Reached.NOBODY


def finished(directory: Path, config: RunConfig) -> bool:
    """Whether the run's latest checkpoint is that of its last step."""
    from overtok_megatron.checkpoint.store import CheckpointStore, read_manifest

    latest = CheckpointStore(directory).latest()
    return latest is not None and read_manifest(latest).step >= train_iters(config)


def devices_here() -> int:
    """How many CUDA devices a run that is started from here may use; 0 = it computes on the CPU."""
    # late: it imports torch, and `overtok --help` and configuration errors need not wait for it
    from overtok_megatron.parallel.devices import num_accelerators

    return usable_devices(os.environ, num_accelerators())


def _check(loaded: LoadedConfig, world_size: int, processes: int) -> int:
    """Check all that can be checked before the ranks start; returns how many CUDA devices ranks of this host may use.

    processes: how many of the run's `world_size` ranks this host has.
    """
    validate(loaded.config, world_size, loaded.locate)
    devices = devices_here()
    if devices and processes > devices:
        raise ConfigError(
            f"--processes: {processes}, but this host has {devices} CUDA devices; ask for at most that many"
        )
    check_inputs(loaded, world_size=world_size, ranks_of_host=processes, devices=devices)
    return devices


def _latest_mark(directory: Path) -> int | None:
    """What changes with each complete checkpoint of a run; None before the first."""
    from overtok_megatron.checkpoint.store import LATEST

    latest = RunFolder(directory).checkpoints / LATEST
    return latest.stat().st_mtime_ns if latest.exists() else None


def _wait_for_ranks(lock: RunLock, seconds: float = 120.0) -> None:
    """Return when no rank holds the run any more, on any host that the lock reaches; raises CheckpointError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not lock.ranks_gone():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{lock.run}: ranks of this run still live {seconds:.0f} s after their launcher; end them"
            )
        time.sleep(0.1)


def launcher_command(module: str, arguments: list[str], processes: int, master_port: int | None = None) -> list[str]:
    """The command line of DeepSpeed's launcher that runs `python -m module arguments` in so many processes of this host."""
    return [
        *deepspeed_launcher(os.environ),
        "--hostfile",
        os.devnull,  # the default, /job/hostfile, exists in pods of some Kubernetes operators, and names other hosts
        "--num_gpus",
        str(processes),
        "--master_port",
        str(master_port or free_port()),
        "--log_level",
        "critical",
        "--module",
        module,
        *arguments,
    ]


def signal_ranks(launcher: int, number: int) -> Reached:
    """Send a signal to the ranks below a launcher, and say whom it reached; SIGKILL ends all that the launcher has started.

    The launcher itself gets no other signal: DeepSpeed's dies of SIGTERM at once, and its process on each host kills the
    ranks after half a minute.
    """
    if number == signal.SIGKILL:
        return _kill_launcher(launcher)
    reached = Reached.NOBODY
    with suppress(psutil.Error):  # the launcher has gone
        for process in psutil.Process(launcher).children(recursive=True):
            with suppress(psutil.Error):
                words = process.cmdline()
                if ENTRY in words and any(word.startswith("--local_rank") for word in words):
                    ready = reached is not Reached.STARTING and _catches(process.pid, number)
                    process.send_signal(number)
                    reached = Reached.READY if ready else Reached.STARTING
    return reached


def _catches(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal, as a rank has once it has met the others; True where it is not known."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return True
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is None or bool(int(caught[1], 16) >> (number - 1) & 1)


def _kill_launcher(launcher: int) -> Reached:
    """SIGKILL a launcher and all below it. They are stopped first, so that none starts a rank after they were listed."""
    stopped: list[psutil.Process] = []
    with suppress(psutil.Error):
        top = psutil.Process(launcher)
        while new := [process for process in (top, *top.children(recursive=True)) if process not in stopped]:
            for process in new:
                with suppress(psutil.Error):
                    process.suspend()
            stopped += new
    for process in stopped:
        with suppress(psutil.Error):
            process.kill()
    return Reached.READY if stopped else Reached.NOBODY

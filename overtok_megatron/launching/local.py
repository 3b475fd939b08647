"""Start a run from this host: everything is checked in one process before DeepSpeed's launcher starts the ranks.

The ranks run on this host, or on those of a cluster (cluster.py).
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from overtok_megatron.config.loading import LoadedConfig
from overtok_megatron.config.validation import validate
from overtok_megatron.environment import rank_environment, usable_devices
from overtok_megatron.errors import ConfigError
from overtok_megatron.launching.cluster import Cluster, check_cluster, cluster_command, signal_first_rank
from overtok_megatron.launching.preparation import check_inputs, make_folder, store_inputs
from overtok_megatron.run_lock import hold

ENTRY = "overtok_megatron.training.entry"  # the module that every rank runs
STORED = "--stored"  # its option: the configuration was checked and stored by this process


def free_port() -> int:
    """A port on which nobody listens at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def launch(loaded: LoadedConfig, processes: int, master_port: int | None = None, cluster: Cluster | None = None) -> int:
    """Validate, store the resolved configuration beside the run, and train on `processes` ranks.

    master_port: where the ranks meet; None = a free one. cluster: the hosts of the ranks; None = this one. Returns the
    launcher's exit code.
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
        words = [str(resolved), STORED]
        if cluster is None:
            lock.lend()  # the ranks hold the run as well: this process may be killed while they live
            return run_ranks(launcher_command(ENTRY, words, processes, master_port), environment, stop_ranks)
        lock.release()  # the first rank takes it: on its own host, or not as a descendant of this process
        with cluster_command(cluster, ENTRY, words, environment, master_port) as command:
            return run_ranks(
                command, environment, lambda _, number: signal_first_rank(cluster, directory, number), apart=True
            )


def _check(loaded: LoadedConfig, world_size: int, processes: int) -> int:
    """Check all that can be checked before the ranks start; returns how many CUDA devices ranks of this host may use.

    processes: how many of the run's `world_size` ranks this host has.
    """
    # late: it imports torch, and `overtok --help` and configuration errors need not wait for it
    from overtok_megatron.parallel.devices import num_accelerators

    validate(loaded.config, world_size, loaded.locate)
    devices = usable_devices(os.environ, num_accelerators())
    if devices and processes > devices:
        raise ConfigError(
            f"--processes: {processes}, but this host has {devices} CUDA devices; ask for at most that many"
        )
    check_inputs(loaded, world_size=world_size, ranks_of_host=processes, devices=devices)
    return devices


def run_ranks(
    command: list[str], environment: dict[str, str], stop: Callable[[int, int], None], *, apart: bool = False
) -> int:
    """Run a launcher to its end and pass SIGTERM and SIGUSR1 on to its ranks; returns its exit code.

    stop: asks the ranks to save and leave, given the launcher's process and the signal. apart: whether the launcher must not
    get Ctrl-C from the terminal: DeepSpeed's kills the ranks of other hosts when it does.
    """
    group = 0 if apart else None
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL if apart else None, process_group=group
    )
    passed_on = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda received, _: stop(process.pid, received)) for number in passed_on]
    try:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the ranks save and leave; a second Ctrl-C is raised
            if apart:
                stop(process.pid, signal.SIGTERM)
            return process.wait()
    finally:
        for number, handler in zip(passed_on, before, strict=True):
            signal.signal(number, handler)


def launcher_command(module: str, arguments: list[str], processes: int, master_port: int | None = None) -> list[str]:
    """The command line of DeepSpeed's launcher that runs `python -m module arguments` in so many processes of this host."""
    launcher = shutil.which(
        "deepspeed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    assert launcher is not None, "deepspeed is installed without its launcher"
    return [
        sys.executable,
        launcher,
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


def stop_ranks(launcher: int, number: int) -> None:
    """Ask the ranks below a launcher to save and leave, by the signal `number`.

    The launcher itself gets no signal: DeepSpeed's dies of SIGTERM at once, and its process on each host kills the ranks after
    half a minute.
    """
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.Error):
            words = process.cmdline()
            if ENTRY in words and any(word.startswith("--local_rank") for word in words):
                process.send_signal(number)

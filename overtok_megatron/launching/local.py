"""Start a run on this host: everything is checked in one process before DeepSpeed's launcher starts the ranks."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from overtok_megatron.config.loading import LoadedConfig
from overtok_megatron.config.validation import validate
from overtok_megatron.environment import rank_environment, usable_devices
from overtok_megatron.errors import ConfigError
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


def launch(loaded: LoadedConfig, processes: int, master_port: int | None = None) -> int:
    """Validate, store the resolved configuration beside the run, and train on `processes` ranks of this host.

    master_port: where the ranks meet; None = a free one. Returns the launcher's exit code.
    """
    config = loaded.config
    devices = _check(loaded, processes)
    directory = make_folder(config)
    environment = rank_environment(os.environ, processes, deterministic=config.training.deterministic, cuda=devices > 0)
    with hold(directory, "overtok train") as lock:
        resolved = store_inputs(config, directory)
        lock.lend()  # the ranks hold the run as well: this process may be killed while they live
        return run_ranks(launcher_command(ENTRY, [str(resolved), STORED], processes, master_port), environment)


def _check(loaded: LoadedConfig, processes: int) -> int:
    """Check all that can be checked before the ranks start; returns how many CUDA devices the run may use."""
    # late: it imports torch, and `overtok --help` and configuration errors need not wait for it
    from overtok_megatron.parallel.devices import num_accelerators

    validate(loaded.config, processes, loaded.locate)
    devices = usable_devices(os.environ, num_accelerators())
    if devices and processes > devices:
        raise ConfigError(
            f"--processes: {processes}, but this host has {devices} CUDA devices; ask for at most that many"
        )
    check_inputs(loaded, world_size=processes, ranks_of_host=processes, devices=devices)
    return devices


def run_ranks(command: list[str], environment: dict[str, str]) -> int:
    """Run a launcher to its end and pass SIGTERM and SIGUSR1 on to its ranks; returns its exit code."""
    process = subprocess.Popen(command, env=environment)
    passed_on = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda received, _: stop_ranks(process.pid, received)) for number in passed_on]
    try:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the ranks got it too: they save and leave; a second Ctrl-C is raised
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

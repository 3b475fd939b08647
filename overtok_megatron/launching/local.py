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

from overtok_megatron.config.loading import LoadedConfig, save_resolved
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate, validate_host
from overtok_megatron.environment import rank_environment, usable_devices
from overtok_megatron.errors import ConfigError
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.run_lock import hold

ENTRY = "overtok_megatron.training.entry"  # the module that every rank runs


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
    directory = _make_folder(config)
    environment = rank_environment(os.environ, processes, deterministic=config.training.deterministic, cuda=devices > 0)
    with hold(directory, "overtok train") as lock:
        resolved = _store_inputs(config, directory)
        lock.lend()  # the ranks hold the run as well: this process may be killed while they live
        return run_ranks(launcher_command(ENTRY, [str(resolved)], processes, master_port), environment)


def _check(loaded: LoadedConfig, processes: int) -> int:
    """Check all that can be checked before the ranks start; returns how many CUDA devices the run may use.

    Compiles the kernels, too, so that the ranks find them compiled. Raises the named errors of a user's mistake.
    """
    # late: they import torch, and `overtok --help` and configuration errors need not wait for it
    from overtok_megatron.checkpoint.starting_point import starting_point
    from overtok_megatron.data.run_data import open_run_data
    from overtok_megatron.kernels.choice import choose_kernels
    from overtok_megatron.parallel.devices import CPU, first_device, num_accelerators

    config = loaded.config
    validate(config, processes, loaded.locate)
    devices = usable_devices(os.environ, num_accelerators())
    if devices and processes > devices:
        raise ConfigError(
            f"--processes: {processes}, but this host has {devices} CUDA devices; ask for at most that many"
        )
    if not devices:
        memory = psutil.virtual_memory().total + psutil.swap_memory().total
        validate_host(config, processes, memory, loaded.locate)
    open_run_data(config)
    starting_point(config)
    choose_kernels(config.training.kernels, first_device() if devices else CPU)
    return devices


def _make_folder(config: RunConfig) -> Path:
    directory = Path(config.training.output_directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"training.output_directory: {directory}: cannot be written ({error.strerror})") from None
    return directory


def _store_inputs(config: RunConfig, directory: Path) -> Path:
    """Put the tokenizer and the resolved configuration into the run's folder; returns the configuration's file."""
    from overtok_megatron.data.tokenizers.kept import keep_tokenizer

    keep_tokenizer(config.tokenizer, directory)
    resolved = RunFolder(directory).config
    try:
        save_resolved(config, resolved)
    except OSError as error:
        raise ConfigError(f"training.output_directory: {resolved}: cannot be written ({error.strerror})") from None
    return resolved


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

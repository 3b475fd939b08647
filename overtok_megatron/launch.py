"""Starting a run: everything is checked here, in one process, before the deepspeed launcher spawns the others."""

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
from overtok_megatron.config.validation import validate
from overtok_megatron.errors import ConfigError

ENTRY = "overtok_megatron.training.entry"  # the module that every rank runs
# glibc returns every large buffer to the system and takes it anew, page by page; keeping them halves a CPU step. Huge pages
# spare walks through page tables: rows of the n-gram tables lie anywhere.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "THP_MEM_ALLOC_ENABLE": "1",
}


def process_environment(ranks_per_host: int, *, deterministic: bool, cuda: bool) -> dict[str, str]:
    """What a rank's environment needs beyond the caller's; what the caller has set already stands."""
    wanted = {"DS_ACCELERATOR": "cuda" if cuda else "cpu"}
    if not cuda:
        wanted |= ALLOCATOR
        wanted["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks_per_host))
    if deterministic:
        wanted["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return {name: value for name, value in wanted.items() if name not in os.environ}


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
    import torch  # late: `overtok --help` and configuration errors need not wait for it

    from overtok_megatron.checkpoint.weights_only import starting_point
    from overtok_megatron.data.checks import open_run_data
    from overtok_megatron.data.kept_tokenizer import keep_tokenizer
    from overtok_megatron.kernels.choice import choose_kernels

    config = loaded.config
    validate(config, processes, loaded.locate)
    cuda = torch.cuda.is_available()
    if cuda and processes > torch.cuda.device_count():
        raise ConfigError(
            f"--processes: {processes}, but this host has {torch.cuda.device_count()} CUDA devices; ask for that many"
        )
    open_run_data(config)
    starting_point(config)
    choose_kernels(
        config.training.kernels, torch.device("cuda" if cuda else "cpu")
    )  # compiles once, before the ranks do
    directory = Path(config.training.output_directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        resolved = directory / "config.yaml"
        save_resolved(config, resolved)
    except OSError as error:
        raise ConfigError(f"training.output_directory: {directory}: cannot be written ({error.strerror})") from None
    keep_tokenizer(config.tokenizer, directory)
    launcher = shutil.which(
        "deepspeed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    assert launcher is not None, "deepspeed is installed without its launcher"
    extra = process_environment(processes, deterministic=config.training.deterministic, cuda=cuda)
    command = [
        sys.executable,
        launcher,
        "--num_gpus",
        str(processes),
        "--master_port",
        str(master_port or free_port()),
        "--log_level",
        "critical",
        "--module",
        ENTRY,
        str(resolved),
    ]
    process = subprocess.Popen(command, env={**os.environ, **extra})
    before = signal.signal(signal.SIGTERM, lambda *_: stop_ranks(process.pid))
    try:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the ranks got it too: they save and leave; a second one goes through
            return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_ranks(launcher: int) -> None:
    """Ask the ranks below a launcher to save and leave.

    Not the launcher itself: DeepSpeed's dies of SIGTERM at once, and its part for each host kills after half a minute.
    """
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.Error):
            words = process.cmdline()
            if ENTRY in words and any(word.startswith("--local_rank") for word in words):
                process.terminate()

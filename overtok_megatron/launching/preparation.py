"""What one process does for all ranks before they compute: it reads the configuration, checks, and stores the run's inputs.

Whoever starts the ranks, it is done once: by `overtok train` before it starts them, else by the first rank.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from overtok_megatron.config.loading import COMMAND_LINE, LoadedConfig, load_config, save_resolved
from overtok_megatron.config.moved_runs import find_moved_run, relocate
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate_host
from overtok_megatron.errors import CheckpointError, ConfigError
from overtok_megatron.run_folder import RunFolder


def load_run(path: str, overrides: Sequence[str], tell: Callable[[str], object]) -> LoadedConfig:
    """The configuration with `section.key=value` overrides; for a run that was moved, with its paths as they are now.

    tell: is given a sentence where the run was moved. Raises ConfigError as load_config does.
    """
    loaded = load_config(path, overrides)
    run = find_moved_run(loaded, Path(path))
    if run is None:
        return loaded
    # late: they import torch, and errors of the configuration need not wait for it
    from overtok_megatron.checkpoint.store import CheckpointStore, read_manifest
    from overtok_megatron.data.tokenizers.kept import find_tokenizer

    tell(
        f"{path}: training.output_directory is {loaded.config.training.output_directory}, but the file lies in {run}: the run "
        f"goes on in {run}"
    )
    moved = relocate(loaded, run)
    latest = CheckpointStore(run).latest()
    if latest is not None and loaded.locate("tokenizer.path") != COMMAND_LINE:
        with suppress(CheckpointError):  # a missing tokenizer is reported where the file is opened
            section = find_tokenizer(loaded.config, run, read_manifest(latest).tokenizer_fingerprint)
            return replace(moved, config=moved.config.model_copy(update={"tokenizer": section}))
    return moved


def check_inputs(loaded: LoadedConfig, *, world_size: int, ranks_of_host: int, devices: int) -> None:
    """Check memory, data, starting point and kernels of a configuration that `validate` has passed.

    ranks_of_host: how many ranks run on this host; where none does, its memory and kernels say nothing. devices: how many CUDA
    devices the run may use on this host; 0 = it computes on the CPU. Compiles the kernels, too, so
    that the ranks of this host find them compiled. Raises the named errors of a user's mistake.
    """
    # late: they import torch
    from overtok_megatron.checkpoint.starting_point import starting_point
    from overtok_megatron.data.run_data import open_run_data
    from overtok_megatron.kernels.choice import choose_kernels
    from overtok_megatron.parallel.devices import CPU, first_device

    config = loaded.config
    if ranks_of_host and not devices:
        memory = psutil.virtual_memory().total + psutil.swap_memory().total
        validate_host(config, ranks_of_host, memory, loaded.locate, world_size=world_size)
    open_run_data(config)
    starting_point(config)
    if ranks_of_host:
        choose_kernels(config.training.kernels, first_device() if devices else CPU)


def make_folder(config: RunConfig) -> Path:
    """Make the run's folder where it is missing. Raises ConfigError where it cannot be made."""
    directory = Path(config.training.output_directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"training.output_directory: {directory}: cannot be written ({error.strerror})") from None
    return directory


def store_inputs(config: RunConfig, directory: Path) -> Path:
    """Put the tokenizer and the resolved configuration into the run's folder; returns the configuration's file."""
    from overtok_megatron.data.tokenizers.kept import keep_tokenizer

    keep_tokenizer(config.tokenizer, directory)
    resolved = RunFolder(directory).config
    try:
        save_resolved(config, resolved)
    except OSError as error:
        raise ConfigError(f"training.output_directory: {resolved}: cannot be written ({error.strerror})") from None
    return resolved

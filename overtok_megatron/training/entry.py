"""What every process of a run executes: `python -m overtok_megatron.training.entry RESOLVED_CONFIG`, by the launcher.

It prepares logging, runs the loop, and turns a user's mistake into one line and exit code 2.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

from overtok_megatron.config.loading import parse_resolved
from overtok_megatron.environment import (
    available_cores,
    make_deterministic,
    restore_visible_devices,
    set_library_defaults,
    usable_devices,
)
from overtok_megatron.errors import OvertokError
from overtok_megatron.run_folder import RunFolder


def set_up_logging(directory: Path, rank: int, console: bool) -> None:
    """Write log lines with time and rank to `train.log` on the first rank, and to the console unless a bar is drawn there."""
    root = logging.getLogger("overtok_megatron")
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False
    form = logging.Formatter(f"%(asctime)s [rank {rank}] %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.FileHandler(RunFolder(directory).log)] if rank == 0 else []
    stream = logging.StreamHandler(sys.stdout)
    stream.setLevel(logging.INFO if console else logging.WARNING)
    for handler in [*handlers, stream]:
        handler.setFormatter(form)
        root.addHandler(handler)


def prepare_environment(environment: MutableMapping[str, str], *, deterministic: bool) -> None:
    """Set what the environment must hold before torch is imported, however this process was started."""
    restore_visible_devices(environment)
    set_library_defaults(environment)
    if deterministic:
        make_deterministic(environment)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One process of a training run; started by the deepspeed launcher.")
    parser.add_argument("config", help="a resolved configuration, as `overtok train` stores it")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    options = parser.parse_args(arguments)

    rank = int(os.environ.get("RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    try:
        config = parse_resolved(options.config)
        prepare_environment(os.environ, deterministic=config.training.deterministic)

        # imported only now: torch's libraries read the environment when they are loaded
        from overtok_megatron.parallel.devices import CPU, local_device, num_accelerators

        device = CPU
        if usable_devices(os.environ, num_accelerators()):
            device = local_device(int(os.environ.get("LOCAL_RANK", "0")))
            # DeepSpeed takes the device of that number, also where a batch system shows each rank just one device
            os.environ["LOCAL_RANK"] = str(device.index)

        from overtok_megatron.training.trainer import Trainer, show_bar

        set_up_logging(Path(config.training.output_directory), rank, console=not show_bar(config))
        run = Trainer(config, device=device, num_threads=max(1, available_cores() // local_ranks))
        run.run()
    except OvertokError as error:
        if rank > 0:
            time.sleep(3)  # where the first rank says the same, the launcher ends this process before it repeats it
        prefix = "error" if rank == 0 else f"error on rank {rank}"
        print("\n".join(f"{prefix}: {line}" for line in error.lines), file=sys.stderr, flush=True)
        return 2
    run.grid.wait_for_all()  # all ranks leave together
    return run.exit_code


def run_and_leave() -> None:
    """Exit at once with main's code: gloo's threads sometimes abort the process when the interpreter exits."""
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_and_leave()

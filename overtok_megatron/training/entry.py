"""What every process of a run executes: `python -m overtok_megatron.training.entry CONFIG section.key=value ...`.

Started by `overtok train`, torchrun, srun, mpirun, or DeepSpeed's launcher. It finds out which rank it is, agrees with the
others, prepares logging, runs the loop, and turns a user's mistake into one line and exit code 2 of every rank.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

from overtok_megatron.environment import (
    available_cores,
    make_deterministic,
    restore_visible_devices,
    set_library_defaults,
)
from overtok_megatron.errors import OvertokError
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.training.before_training import place_process, prepare_rank
from overtok_megatron.training.meeting import AlreadySaidError, Meeting, NotMetError

log = logging.getLogger("overtok_megatron.training.entry")  # run as a script, this module has another name


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One process of a training run, started by a launcher.")
    parser.add_argument("config", help="a YAML file of a run, or the resolved one in a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    parser.add_argument("--local_rank", type=int, default=0, help="given by DeepSpeed's launcher")
    parser.add_argument("--stored", action="store_true", help="the file was checked and stored by `overtok train`")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    meeting: Meeting | None = None
    try:
        place = place_process(os.environ)
        meeting = Meeting(place)
        prepare_environment(os.environ, deterministic=False)
        start = prepare_rank(meeting, os.environ, options.config, options.overrides, stored=options.stored)
        config = start.config

        # imported only now: torch's libraries read the environment when they are loaded
        from overtok_megatron.training.trainer import Trainer, show_bar

        set_up_logging(Path(config.training.output_directory), place.rank, console=not show_bar(config))
        for line in start.warnings:
            log.warning("%s", line)
        run = Trainer(config, device=start.device, num_threads=place.num_threads(available_cores()))
        run.run()
    except AlreadySaidError as error:
        assert meeting is not None
        meeting.leave(error.code)
        return error.code
    except OvertokError as error:
        _tell(error.lines, meeting, 2)
        return 2
    except NotMetError as error:
        _tell([str(error)], meeting, 1)
        return 1
    run.grid.wait_for_all()  # all ranks leave together
    return run.exit_code


def _tell(lines: list[str], meeting: Meeting | None, code: int) -> None:
    """Print what no other rank of this start has said, and leave the meeting with an exit code."""
    rank = 0 if meeting is None else meeting.place.rank
    if rank > 0:
        time.sleep(3)  # the first rank says it where it finds the same
    prefix = "error" if rank == 0 else f"error on rank {rank}"
    news = [line for line in lines if meeting is None or meeting.is_news(line)]
    if news:
        print("\n".join(f"{prefix}: {line}" for line in news), file=sys.stderr, flush=True)
    if meeting is not None:
        meeting.leave(code)


def run_and_leave() -> None:
    """Exit at once with main's code: gloo's threads sometimes abort the process when the interpreter exits."""
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_and_leave()

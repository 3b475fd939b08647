"""What every process of a run executes: `python -m overtok_megatron.training.entry CONFIG section.key=value ...`.

Started by `overtok train`, torchrun, srun, mpirun, or DeepSpeed's launcher. It finds out which rank it is, agrees with the
others, prepares logging, runs the loop, and turns an error that has a name into one line and the exit code of its kind: 2 for
a user's mistake.
"""

import argparse
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import MutableMapping
from pathlib import Path

from overtok_megatron.environment import (
    available_cores,
    make_deterministic,
    restore_visible_devices,
    set_library_defaults,
)
from overtok_megatron.errors import OvertokError
from overtok_megatron.launching.batch_systems import forgotten_tasks
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.training.before_training import place_process, prepare_rank
from overtok_megatron.training.exit_codes import START_AGAIN, TERMINATED
from overtok_megatron.training.meeting import AlreadySaidError, Meeting, NotMetError
from overtok_megatron.watching.rank import Watch
from overtok_megatron.watching.starting import join_watchdogs, start_watch
from overtok_megatron.watching.supervisor import line_before_training

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
    watch = Watch()
    try:
        place = place_process(os.environ)
        if (forgotten := forgotten_tasks(os.environ, place)) is not None:
            print(f"warning: {forgotten}", file=sys.stderr, flush=True)
        meeting = Meeting(place)
        prepare_environment(os.environ, deterministic=False)
        start = prepare_rank(
            meeting, os.environ, options.config, options.overrides, stored=options.stored, joined=_leave_when_asked
        )
        config = start.config
        folder = Path(config.training.output_directory)
        watch = start_watch(place, folder, config.training.hang_timeout)
        join_watchdogs(place, watch, meeting.store)

        # imported only now: torch's libraries read the environment when they are loaded
        from overtok_megatron.training.trainer import Trainer, show_bar

        set_up_logging(folder, place.rank, console=not show_bar(config))
        for line in start.warnings:
            log.warning("%s", line)
        num_threads = place.num_threads(available_cores())
        run = Trainer(config, device=start.device, num_threads=num_threads, watch=watch, attempt=place.attempt)
        run.run()
        run.grid.wait_for_all()  # all ranks leave together
    except (Exception, _AskedToLeave) as error:
        return _leave_after(error, meeting, watch)
    watch.goodbye(run.exit_code)
    return run.exit_code


class _AskedToLeave(BaseException):
    """A signal asked this rank to leave before it began to train. No error, so that nothing on the way takes it for one."""

    def __init__(self, number: int) -> None:
        code = START_AGAIN if number == signal.SIGUSR1 else TERMINATED
        super().__init__(code)
        self.code = code
        self.line = line_before_training(number, code)


def _leave_when_asked() -> None:
    """From now on SIGTERM and SIGUSR1 end this rank with the codes that they have in training (leaving.py takes them over)."""

    def leave(number: int, _: object) -> None:
        raise _AskedToLeave(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, leave)


def _leave_after(error: BaseException, meeting: Meeting | None, watch: Watch) -> int:
    """Say what ended this rank, unless another process has said it; returns the exit code."""
    if isinstance(error, _AskedToLeave):
        code = error.code
        if meeting is None or meeting.is_news(error.line):
            print(error.line, file=sys.stderr, flush=True)
        if meeting is not None:
            meeting.leave(code)
    elif isinstance(error, AlreadySaidError):
        assert meeting is not None
        meeting.leave(error.code)
        code = error.code
    elif isinstance(error, OvertokError):
        code = error.exit_code
        _tell(error.lines, meeting, code)
    elif isinstance(error, NotMetError):
        code = 1
        _tell([str(error)], meeting, code)
    else:
        known = watch.failed(error)
        code = 1 if known is None else known
        if known is None:
            traceback.print_exception(error)
        if meeting is not None and not watch.watches:
            meeting.leave(code)  # no watchdog ends the others before the training
        watch.goodbye(code, repr(error)[:200])
        return code
    watch.goodbye(code, said=True)
    return code


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

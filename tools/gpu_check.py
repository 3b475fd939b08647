"""Check that this installation computes right, and how fast, on this card. Prints a line per check: result, figure, limit.

Correctness comes first (row kernels, output head, whole runs, every way of training against a float32 run on the CPU), then
speed (row kernels beside a copy, a model with about 1B parameters beside the card's peak, saving). --processes N checks N
GPUs together: exchange of rows, layouts against one process, speed of links. Without a GPU the checks that do not need CUDA
run at toy sizes. Each check has its own time limit, and the others go on after one that fails. Exit code: 0 if all passed,
1 if a check failed or was not reached in time, 2 if the arguments are wrong.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from gpu_checks.installation import versions
from gpu_checks.listing import all_checks, references
from gpu_checks.registry import Check, Outcome
from gpu_checks.workers import Workers

from overtok_megatron.environment import usable_devices
from overtok_megatron.errors import ConfigError
from overtok_megatron.parallel.devices import num_accelerators

_SECONDS = {False: 600.0, True: 120.0}  # after which no further check begins, long and quick


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer checks and smaller sizes, meant for two minutes instead of ten"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="number of GPUs to check together; on the CPU, of ranks over gloo (default: 1)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="run only the checks whose names begin with one of these"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the checks and exit")
    parser.add_argument("--json", type=Path, help="also write results, versions and tracebacks to this file")
    parser.add_argument(
        "--seconds", type=float, help="start no further check after this many seconds (default: 600; with --quick 120)"
    )
    parser.add_argument(
        "--folder", help="existing folder for scratch files, up to 5 GB (default: the system's temporary folder)"
    )
    options = parser.parse_args(arguments)
    try:
        ranks, cuda = options.processes, _uses_cuda()
    except ConfigError as error:
        parser.error(str(error))
    _check_places(parser, options)
    if ranks < 1 or (cuda and ranks > num_accelerators()):
        most = f"1 to {num_accelerators()}, the CUDA devices of this machine" if cuda else "1 or more"
        parser.error(f"--processes: {ranks}; write {most}")
    checks = [check for check in all_checks(ranks) if check.quick or not options.quick or options.only]
    names = [check.name for check in checks]
    for wanted in options.only or []:
        if not any(name.startswith(wanted) for name in names):
            parser.error(f"--only: {wanted}: no check has a name that begins so; --list prints the names")
    if options.only:
        checks = [check for check in checks if check.name.startswith(tuple(options.only))]
    if options.list:
        print("\n".join(check.name for check in checks))
        return 0
    limit = _SECONDS[options.quick] if options.seconds is None else options.seconds
    folder = Path(tempfile.mkdtemp(prefix="gpu_check-", dir=options.folder))
    try:
        device, outcomes = run(checks, ranks, folder, quick=options.quick, limit=limit)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json is not None:
        head = {"device": device, "versions": versions(), "processes": ranks, "quick": options.quick}
        records = [asdict(outcome) for outcome in outcomes]
        options.json.write_text(json.dumps(head | {"checks": records}, indent=1) + "\n", encoding="utf-8")
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in _STATUSES}
    print(", ".join(f"{count} {status}" for status, count in counts.items() if count), flush=True)
    return 1 if counts["failed"] or counts["not run"] else 0


def _check_places(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What would otherwise fail after minutes of checks."""
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds: {options.seconds:g}; write a number above 0")
    if options.folder is not None and not os.access(options.folder, os.W_OK | os.X_OK):
        parser.error(f"--folder: {options.folder}: is not a folder in which this user can write; name one that is")
    if options.json is not None and options.json.is_dir():
        parser.error(f"--json: {options.json}: is a folder; name a file")
    if options.json is not None and not os.access(options.json.absolute().parent, os.W_OK | os.X_OK):
        parser.error(f"--json: {options.json}: cannot be written; name a file in a folder where this user can write")


_STATUSES = ("passed", "failed", "measured", "skipped", "not run")


def run(checks: list[Check], ranks: int, folder: Path, *, quick: bool, limit: float) -> tuple[str, list[Outcome]]:
    """Run the checks one after the other and print a line for each; return the device's name and the outcomes.

    limit: seconds after which no further check begins.
    """
    cuda = _uses_cuda()
    width = max(len(check.name) for check in checks)
    begin, outcomes = time.monotonic(), []
    workers = Workers(ranks, folder, quick=quick, cuda=cuda)
    wanted = references([check for check in checks if check.references], ranks, cuda)
    helper = Workers(1, folder, quick=quick, cuda=False, name="reference")
    try:
        if wanted is not None:
            helper.begin(wanted)
        workers.start()  # where that fails, the first check says why
        print(f"{workers.device}{f', {ranks} processes' if ranks > 1 else ''}")
        print(f"{'check':{width}}  {'':8}  {'figure'} | {'limit'}", flush=True)
        for number, check in enumerate(checks):
            try:
                outcome = _outcome(check, workers, cuda, limit - (time.monotonic() - begin))
            except KeyboardInterrupt:  # what is known by now goes into the JSON file
                outcomes += [Outcome(left.name, "not run", "interrupted") for left in checks[number:]]
                break
            outcomes.append(outcome)
            beside = f" | {outcome.limit}" if outcome.limit else ""
            print(f"{outcome.name:{width}}  {outcome.status:8}  {outcome.figure}{beside}", flush=True)
    finally:
        workers.close()
        helper.close()
    return workers.device, outcomes


def _uses_cuda() -> bool:
    return usable_devices(os.environ, num_accelerators()) > 0


def _outcome(check: Check, workers: Workers, cuda: bool, left: float) -> Outcome:
    if check.cuda and not cuda:
        return Outcome(check.name, "skipped", "needs a CUDA device")
    if left <= 0:
        return Outcome(check.name, "not run", "the time for all checks was over; give more by --seconds")
    return workers.run(check)


if __name__ == "__main__":
    sys.exit(main())

"""Runs the cells of a study one after the other, each as `overtok train` in its own folder, and records what is finished.

A cell whose line is there is skipped. A run that is complete is recorded without a start; one that was stopped goes on
from its latest checkpoint. A cell that fails is named at the end with the line of its error, and the others are trained.
"""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

from overtok_megatron.errors import InUseError, OvertokError
from overtok_megatron.launching.console import overtok_command
from overtok_megatron.launching.local import finished
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.run_lock import RunLock
from overtok_megatron.studies.cells import BrokenCell, Cell
from overtok_megatron.studies.origin import origin
from overtok_megatron.studies.results import append_records, describe_result, read_results, results_beside
from overtok_megatron.studies.study_file import Study

# What a study returns when one of these signals has stopped it. `overtok train` returns the same, but 143 for one Ctrl-C.
_CODES = {signal.SIGUSR1: 75, signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}
STOPPED = frozenset(_CODES.values())
_ERROR = re.compile(r"^(?:\[[^\]]*\]:? *)*(error(?: on rank \d+)?: .*)$")
_RAISED = re.compile(r"^(?:\[[^\]]*\]:? *)*((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)$")
Tell = Callable[[str], object]  # is given a line for the user


@dataclass
class Outcome:
    """What became of a study's cells. failed: (cell, its error); stopped: the exit code of a run that a signal has stopped."""

    num_finished: int = 0
    num_skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    stopped: int | None = None

    @property
    def exit_code(self) -> int:
        """0 where every cell is finished, 1 where one failed, or that of a study that was stopped."""
        return self.stopped if self.stopped is not None else int(bool(self.failed))


def run_cells(study: Study, cells: Sequence[Cell | BrokenCell], processes: int, devices: int, tell: Tell) -> Outcome:
    """Run what is not finished yet. devices: CUDA devices that a run may use. The caller holds the study's folder."""
    outcome = Outcome()
    with _passing_signals() as child:
        for number, cell in enumerate(cells, 1):
            where = f"{number}/{len(cells)} {cell.label}"
            if isinstance(cell, BrokenCell):
                outcome.failed.append((cell.label, cell.error.lines[0]))
                tell(f"{where}: cannot run: {cell.error.lines[0]}")
                continue
            try:
                code = _run_cell(study, cell, processes, devices, child, partial(_tell_of, tell, where))
            except OvertokError as error:
                outcome.failed.append((cell.label, error.lines[0]))
                tell(f"{where}: failed: {error.lines[0]}")
                continue
            outcome.num_skipped += code is None
            outcome.num_finished += code == 0
            outcome.stopped = code if code in STOPPED else child.stopped
            if outcome.stopped is not None:
                break
    return outcome


def _tell_of(tell: Tell, where: str, text: str) -> None:
    tell(f"{where}: {text}")


class FailedRunError(OvertokError):
    """A cell's run ended with an error."""


def _run_cell(study: Study, cell: Cell, processes: int, devices: int, child: "_Child", tell: Tell) -> int | None:
    """Record a cell. Returns None where its line was there, 0 where it is there now, else the code of a run that was stopped.

    Raises FailedRunError with the line of the run's error, and the named errors of reading and writing.
    """
    if cell.fingerprint in read_results(study.results):
        return None
    known = results_beside(study.results).get(cell.fingerprint)
    if known is not None:
        append_records(study.results, [known.record])
        tell(f"finished in the study {known.record['study']}")
        return None
    _wait_until_free(cell.run, tell)
    now = origin(devices)
    if not finished(cell.run, cell.config):
        began = time.monotonic()
        log = study.root / "logs" / f"{cell.run.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        tell(f"trains; its output: {log}")
        code, begin = child.run(_command(study, cell, processes), log)
        if code in STOPPED or child.stopped is not None:
            return child.stopped or code
        if code != 0 or not finished(cell.run, cell.config):
            raise FailedRunError(f"{error_line(log, begin) or f'exit code {code}'} ({log})")
        tell(f"trained in {time.monotonic() - began:.0f} s")
    record = describe_result(cell, study.name, processes, now)
    append_records(study.results, [record])
    losses = ", ".join(f"{name or 'validation'} {curve[-1][1]:.4f}" for name, curve in record["validation"].items())
    tell(f"finished: {losses}")
    if not study.section.keep_checkpoints:
        shutil.rmtree(RunFolder(cell.run).checkpoints, ignore_errors=True)
    return 0


def _command(study: Study, cell: Cell, processes: int) -> list[str]:
    overrides = [*cell.overrides, "logging.progress_bar=off"]
    return overtok_command("train", study.base, *overrides, "--processes", processes)


def _wait_until_free(run: Path, tell: Tell) -> None:
    """Return when nobody writes into a run's folder: the run of a study that was killed may still train."""
    told = False
    while run.is_dir():
        lock = RunLock(run, "overtok study")
        try:
            lock.take()
        except InUseError as error:
            if not told:
                tell(f"waits: {error}")
            told = True
            time.sleep(0.5)
        else:
            lock.release()
            return


def error_line(log: Path, begin: int = 0) -> str | None:
    """The line of a run's output, from byte `begin` on, that says why it failed; None if there is no output.

    It is the first line that begins with `error`, else the last one that names an exception, else the last of all.
    """
    with log.open("rb") as file:
        file.seek(begin)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    for pattern, which in ((_ERROR, 0), (_RAISED, -1)):
        found = [match[1] for line in lines if (match := pattern.match(line))]
        if found:
            return found[which].removeprefix("error: ")
    return lines[-1] if lines else None


class _Child:
    """The run that goes on now. stopped: the exit code of a study that a signal has asked to stop; None = no signal came."""

    def __init__(self) -> None:
        self.stopped: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, command: list[str], log: Path) -> tuple[int, int]:
        """(exit code, where in `log` the output of this command begins). It runs in a process group of its own:
        otherwise Ctrl-C on a terminal would reach it twice, from the terminal and through `pass_on`."""
        with log.open("ab") as file:
            begin = file.tell()
            if self.stopped is not None:
                return self.stopped, begin
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, process_group=0
            )
            try:
                return self._process.wait(), begin
            finally:
                self._process = None

    def pass_on(self, number: int, _: FrameType | None) -> None:
        """Ask the run to save and leave, as `overtok train` does on this signal; the study then stops."""
        self.stopped = _CODES[signal.Signals(number)]
        if self._process is not None:
            self._process.send_signal(number)


@contextmanager
def _passing_signals() -> Iterator[_Child]:
    child = _Child()
    before = {number: signal.getsignal(number) for number in _CODES}
    for number in _CODES:
        if before[number] is not signal.SIG_IGN:  # as nohup ignores SIGHUP
            signal.signal(number, child.pass_on)
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

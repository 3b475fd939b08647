"""The process that measures, from the side of the rank: one job at a time, killed where it does not answer in time.

A process that was killed is replaced at once by a fork of one that has imported torch and done nothing else. Nothing
here imports torch before a prober is made: `prepare_probers` is called before the rank imports it itself.
"""

import multiprocessing
import multiprocessing.forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overtok_megatron.doctor.meeting import Address
    from overtok_megatron.doctor.probing import Job


def prepare_probers() -> None:
    """Start the process from which probers are forked; it imports torch while this one does."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["overtok_megatron.doctor.probing"])
    multiprocessing.forkserver.ensure_running()


class Prober:
    """Runs jobs in a process of its own, which is started for the first job, and again after it was killed."""

    def __init__(self, address: "Address", local_rank: int) -> None:
        self._address = address
        self._local_rank = local_rank
        self._process: BaseProcess | None = None
        self._jobs: Connection | None = None

    def run(self, job: "Job", seconds: float) -> dict[str, Any]:
        """What the job measured, or {"failure": a line} where it failed, or has not ended after `seconds`."""
        process, jobs = self._started()
        try:
            jobs.send(job)
            if jobs.poll(seconds):
                answer: dict[str, Any] = jobs.recv()
                if "failure" in answer:
                    self.stop()  # a library that has failed is not used again
                return answer
            failure = f"no answer within {seconds:.0f} s"
        except (EOFError, OSError):
            process.join(1)
            failure = f"the measuring process ended with code {process.exitcode}"
        self.stop()
        return {"failure": failure}

    def _started(self) -> tuple[BaseProcess, Connection]:
        if self._process is None or self._jobs is None:
            from overtok_megatron.doctor.probing import serve  # late: it imports torch

            context = multiprocessing.get_context("forkserver")
            self._jobs, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs, self._address, self._local_rank), daemon=True)
            self._process.start()
            theirs.close()
        return self._process, self._jobs

    def stop(self) -> None:
        """Kill the process."""
        if self._process is not None and self._jobs is not None:
            self._process.kill()
            self._process.join()
            self._jobs.close()
        self._process = self._jobs = None

"""A file that records how far a long job is, one line of JSON per record; the file is also the lock on what the job writes."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from overtok_megatron.errors import DataError
from overtok_megatron.files import sync_file


class Journal:
    """Opening it takes the lock, which ends with the process. Raises DataError where another process holds it.

    The first line names the job; a line that a kill cut short is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = path.open("a+b")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise DataError(f"{path}: another process is writing this dataset; wait for it or end it") from None
            try:
                if path.stat().st_ino == os.fstat(self._file.fileno()).st_ino:
                    return
            except FileNotFoundError:
                pass
            self._file.close()  # its last owner removed it meanwhile

    def last(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """The newest record of this very job, or None where the file holds none or those of another."""
        self._file.seek(0)
        lines = self._file.read().split(b"\n")[:-1]  # what follows the last line end was cut
        try:
            records = [json.loads(line) for line in lines]
        except ValueError:
            return None
        if len(records) < 2 or records[0] != json.loads(json.dumps(job)):
            return None
        self._file.truncate(sum(len(line) + 1 for line in lines))
        record: dict[str, Any] = records[-1]
        return record

    @property
    def names_a_job(self) -> bool:
        """Whether anything was recorded: an empty file says nothing about what was done."""
        return os.fstat(self._file.fileno()).st_size > 0

    def begin(self, job: dict[str, Any]) -> None:
        """Remove all records and name a new job."""
        self._file.truncate(0)
        self.record(job)

    def record(self, state: dict[str, Any]) -> None:
        """Append a line; it is on the disk when this returns."""
        self._file.write(json.dumps(state).encode() + b"\n")
        sync_file(self._file)

    def remove(self) -> None:
        """Remove the file: the job has finished or failed."""
        self.path.unlink(missing_ok=True)
        self._file.close()

    def close(self) -> None:
        """Release the lock; the records stay."""
        self._file.close()

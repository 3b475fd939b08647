"""A run of one torchrun per host, with one rank each. Both hosts are this machine: it needs neither root nor namespaces."""

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from overtok_megatron.config.loading import load_config, save_resolved
from overtok_megatron.launching.local import ENTRY, free_port
from support.host_runs import FINDS_SUPPORT, torchrun
from support.workspace import records


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class TorchrunPair:
    """Started by the constructor; in a `with` block, at whose end nothing of it lives. ranks, watchdogs: processes, by host."""

    def __init__(self, config: Path, run: Path, *overrides: str, module: str = ENTRY) -> None:
        self.run = run
        run.mkdir()
        save_resolved(load_config(str(config), list(overrides)).config, run / "config.yaml")
        port = free_port()
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **FINDS_SUPPORT}
        self.launchers = [
            subprocess.Popen(
                torchrun(host, "127.0.0.1", port, 1, module, run / "config.yaml"),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for host in range(2)
        ]
        self.lines: list[str] = []
        for launcher in self.launchers:
            threading.Thread(target=self._read, args=(launcher,), daemon=True).start()
        self.ranks: list[int] = []
        self.watchdogs: list[int] = []

    def __enter__(self) -> "TorchrunPair":
        return self

    def __exit__(self, *_: object) -> None:
        self._find()
        for process in (*self.ranks, *self.watchdogs, *(launcher.pid for launcher in self.launchers)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for launcher in self.launchers:
            launcher.wait()

    def train_until(self, step: int, seconds: float = 120) -> None:
        """Return when a step has been reported."""
        deadline = time.monotonic() + seconds
        while len(records(self.run)) < step:
            assert all(launcher.poll() is None for launcher in self.launchers), self._end()
            assert time.monotonic() < deadline, self._end()
            time.sleep(0.02)
        self._find()

    def seconds_until_gone(self, most: float) -> float:
        """How long it takes until no rank lives any more; fails where it takes longer than `most` seconds."""
        begin = time.monotonic()
        while any(map(alive, self.ranks)):
            assert time.monotonic() - begin < most, self._end()
            time.sleep(0.01)
        took = time.monotonic() - begin
        for launcher in self.launchers:
            launcher.wait(60)
        return took

    def watch_lines(self) -> list[str]:
        """What the watchdogs and ranks said about the end, without the time."""
        return [line.split("[watch] ", 1)[1] for line in self.lines if "[watch] " in line]

    def _end(self) -> str:
        """How far the run has come and the end of its output, for a failure's message."""
        return f"{len(records(self.run))} steps are done\n" + "".join(self.lines[-40:])

    def _read(self, launcher: "subprocess.Popen[str]") -> None:
        assert launcher.stdout is not None
        self.lines += launcher.stdout

    def _find(self) -> None:
        config = str(self.run / "config.yaml")
        parents = [launcher.pid for launcher in self.launchers]
        ranks, watchdogs = {}, {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                command = process.cmdline()
                if config in command and process.ppid() in parents:
                    ranks[parents.index(process.ppid())] = process.pid
                elif "overtok_megatron.watching.watchdog" in command and str(self.run) in command[-1]:
                    watchdogs['"first": false' in command[-1]] = process.pid
        self.ranks = [ranks[host] for host in sorted(ranks)]
        self.watchdogs = [watchdogs[host] for host in sorted(watchdogs)]

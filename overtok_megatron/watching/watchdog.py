"""The process on each host that watches the ranks there: `python -m overtok_megatron.watching.watchdog SETTINGS`.

It shares nothing with the ranks but a socket, so it goes on where their Python does not. It sees by the kernel that a rank has
died, and ends the ranks of its host by SIGKILL where they do not leave at once. It leaves when they have gone.
"""

import asyncio
import json
import os
import secrets
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from overtok_megatron.run_folder import RunFolder
from overtok_megatron.watching.clock import RunningClock
from overtok_megatron.watching.job import JobWatch
from overtok_megatron.watching.link_times import LinkTimes
from overtok_megatron.watching.links import (
    INTERVAL,
    LONGEST,
    LOST_AFTER,
    JobLink,
    Message,
    encoded,
    listening_socket,
    messages,
)
from overtok_megatron.watching.processes import how_it_ended, kill, kill_tree, pidfd_of, state_of

_LEAVING = 2.5  # seconds in which a rank leaves by itself when it is told to
_DYING = 30.0  # seconds in which the kernel has ended a process
_ARRIVING = 60.0  # seconds after which a watchdog leaves where no rank has come
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the first rank of the host tells its watchdog. listener: file descriptor of the listening socket.

    ranks: of the whole job; host_ranks: of this host; first: whether the job's first rank is among them.
    """

    listener: int
    ranks: int
    host_ranks: int
    first: bool
    folder: str
    hang_timeout: float | None


@dataclass(kw_only=True)
class WatchedRank:
    """A rank of this host. pidfd: becomes readable when the process has died; None where it had when it was registered."""

    rank: int
    process: int
    pidfd: int | None
    writer: asyncio.StreamWriter
    heard: float
    beat: Message = field(default_factory=lambda: {"phase": "start", "step": None, "seconds": 0.0, "collectives": []})
    state: str = "alive"  # then `left`, having said so, or `died`
    how: str = ""
    code: int | None = None
    why: str = ""
    said: bool = False  # whether the user has been told why it left
    gone: bool = False


class HostWatch:
    """Watches the ranks of one host; on the first host also the whole job."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._host = socket.gethostname()
        self._name = secrets.token_hex(8)  # of this watchdog: in containers several hosts may have one name
        self._clock = RunningClock()
        self._ranks: dict[int, WatchedRank] = {}
        self._last_change = self._clock.now()
        self._link: JobLink | None = None
        self._others: set[asyncio.StreamWriter] = set()  # connections from the watchdogs of the other hosts
        self._port = 0  # where they connect; 0: the job has one host
        self._token = secrets.token_hex(16)
        self._link_times = LinkTimes(self._say)
        self._ending: asyncio.Task[None] | None = None
        # Until this host's watchdog has met the first host's, it judges its own ranks alone.
        self._job: JobWatch | None = JobWatch(
            expected=settings.ranks if settings.first else settings.host_ranks,
            hang_timeout=settings.hang_timeout,
            folder=Path(settings.folder),
            clock=self._clock,
            command=self._command,
            say=self._say,
        )

    async def run(self) -> None:
        """Watch until the ranks have gone."""
        listener = socket.socket(fileno=self._settings.listener)
        if self._settings.first and self._settings.host_ranks < self._settings.ranks:
            others = listening_socket()
            await asyncio.start_server(self._serve_host, sock=others, limit=LONGEST)
            self._port = others.getsockname()[1]  # known before a rank comes, which is told it
        server = await asyncio.start_unix_server(self._serve_rank, sock=listener, limit=LONGEST)
        while not self._done():
            self._clock.tick()
            self._report()
            if self._job is not None:
                self._job.tick()
            self._send_to_others({"type": "alive", "sent": time.monotonic()})
            if self._link is not None and self._link.silence() > LOST_AFTER:
                self._lost()
            await asyncio.sleep(INTERVAL)
        server.close()
        if self._ending is not None:
            await self._ending
        self._report()
        if self._job is not None:
            self._job.finish()
        if self._link is not None:
            await self._link.close()

    def _done(self) -> bool:
        quiet = self._clock.now() - self._last_change
        if not self._ranks:
            return quiet > _ARRIVING
        if not all(rank.gone for rank in self._ranks.values()):
            return False
        if self._settings.first and self._job is not None and not self._job.all_gone:
            # Ranks of other hosts are not known to have gone. Where no connection is left, nobody will tell that they have.
            return quiet > _DYING if self._ending is not None else not self._others and quiet > LOST_AFTER
        return self._ending is not None or len(self._ranks) >= self._settings.host_ranks or quiet > _ARRIVING

    async def _serve_rank(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        process, user = _peer(writer)
        rank: WatchedRank | None = None
        async for message in messages(reader):
            if rank is not None:
                self._hear(rank, message)
            elif user == os.getuid() and message["type"] == "hello":
                rank = self._register(message["rank"], process, writer)
            else:
                break
        if rank is not None and rank.pidfd is None:
            self._gone(rank)  # now that all has been read which it had said before it died
        writer.close()

    def _register(self, number: int, process: int, writer: asyncio.StreamWriter) -> WatchedRank:
        self._last_change = self._clock.now()
        pidfd = pidfd_of(process)
        rank = WatchedRank(rank=number, process=process, pidfd=pidfd, writer=writer, heard=self._clock.now())
        self._ranks[number] = rank
        if pidfd is not None:
            asyncio.get_running_loop().add_reader(pidfd, self._gone, rank)
        if number == 0 and self._port:
            writer.write(encoded({"type": "port", "port": self._port, "token": self._token}))
        if self._ending is not None:  # it came while the others were ended
            kill(rank.pidfd)
        return rank

    def _hear(self, rank: WatchedRank, message: Message) -> None:
        kind = message.pop("type")
        rank.heard = self._clock.now()
        if kind == "beat":
            rank.beat = message
        elif kind == "text":
            self._pass_on_text(rank.rank, message["text"])
        elif kind == "bye":
            rank.state, rank.code, rank.why, rank.said = "left", message["code"], message["why"], message["said"]
            self._report()
        elif kind == "failed":
            self._rank_failed()
        elif kind == "meet":
            self._job = None
            address, port, token = message["address"], message["port"], message["token"]
            self._link = JobLink(
                address, port, token, clock=self._clock, obey=self._command, report=self._report_of_host
            )
        elif kind == "all come" and self._job is not None:
            self._job.all_come()

    def _rank_failed(self) -> None:
        """A rank has an error that another rank's end may have caused, perhaps on a host that is not connected any more."""
        if self._job is not None:
            self._job.rank_failed()
        elif self._link is not None and self._link.broken:
            self._lost()
        elif self._link is not None:
            self._link.send({"type": "failed"})

    def _gone(self, rank: WatchedRank) -> None:
        """The kernel says that a rank's process has ended."""
        if rank.pidfd is not None:
            asyncio.get_running_loop().remove_reader(rank.pidfd)
        self._last_change = self._clock.now()
        rank.gone = True
        if rank.state == "alive":
            rank.state, rank.how = "died", how_it_ended(rank.process)
        self._report()

    def _report(self) -> None:
        """Tell the job's watch the state of this host's ranks."""
        report = self._report_of_host()
        if self._job is not None:
            self._job.receive(report["watchdog"], report["host"], report["ranks"])
        elif self._link is not None:
            self._link.send(report)

    def _report_of_host(self) -> Message:
        now = self._clock.now()
        ranks = [
            {
                "rank": rank.rank,
                "pid": rank.process,
                "process": "" if rank.gone else state_of(rank.process),
                "state": rank.state,
                "how": rank.how,
                "code": rank.code,
                "why": rank.why,
                "said": rank.said,
                "beat": rank.beat,
                "age": now - rank.heard,
            }
            for rank in self._ranks.values()
        ]
        return {"type": "report", "watchdog": self._name, "host": self._host, "ranks": ranks}

    def _pass_on_text(self, rank: int, text: str) -> None:
        if self._job is not None:
            self._job.receive_text(rank, text)
        elif self._link is not None:
            self._link.send({"type": "text", "rank": rank, "text": text})

    def _command(self, message: Message) -> None:
        """Do what the job's watch wants, on this host and on the others where they are connected here."""
        self._send_to_others(message)
        if message["type"] in ("met", "stacks"):
            self._tell_ranks(message)
        elif message["type"] == "leave" and self._ending is None:
            self._ending = asyncio.create_task(self._end_ranks(message))

    async def _end_ranks(self, order: Message) -> None:
        """Let the ranks leave, and end those that do not; return when none has a process any more."""
        self._tell_ranks(order)
        await self._wait_until_gone(_LEAVING)
        for rank in self._ranks.values():
            if not rank.gone:
                kill_tree(rank.process, rank.pidfd)
        await self._wait_until_gone(_DYING)
        stuck = [str(rank.process) for rank in self._ranks.values() if not rank.gone]
        if stuck:
            self._say(
                f"processes {', '.join(stuck)} on {self._host} do not end by SIGKILL: they are stuck in the kernel"
            )
            os._exit(1)

    async def _wait_until_gone(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not all(rank.gone for rank in self._ranks.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    def _lost(self) -> None:
        if self._ending is None:
            ranks = ", ".join(map(str, sorted(self._ranks)))
            assert self._link is not None
            self._say(
                f"{self._host}: the watchdog of the first host has not been heard for {self._link.silence():.0f} s; ending "
                f"ranks {ranks} of this host"
            )
            self._command({"type": "leave", "code": 1})

    def _tell_ranks(self, message: Message) -> None:
        for rank in self._ranks.values():
            if not rank.gone:
                rank.writer.write(encoded(message))

    async def _serve_host(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """On the first host: the connection of another host's watchdog."""
        arriving = messages(reader)
        hello: Message = await anext(arriving, {})
        if hello.get("type") == "hello" and secrets.compare_digest(str(hello.get("token")), self._token):
            self._others.add(writer)
            name = host = ""
            async for message in arriving:
                assert self._job is not None
                if message["type"] == "report":
                    self._job.receive(message["watchdog"], message["host"], message["ranks"])
                    if not name:
                        writer.write(encoded({"type": "met"}))  # from now on the host's silence is noticed
                    name, host = message["watchdog"], message["host"]
                elif message["type"] == "back" and host:
                    self._link_times.heard(host, time.monotonic() - message["sent"])
                elif message["type"] == "text":
                    self._job.receive_text(message["rank"], message["text"])
                elif message["type"] == "failed":
                    self._job.rank_failed()
            self._others.discard(writer)
            assert self._job is not None
            self._job.disconnected(name)
        writer.close()

    def _send_to_others(self, message: Message) -> None:
        for writer in self._others:
            writer.write(encoded(message))

    def _say(self, line: str) -> None:
        """Print a line, and add it to the run's log."""
        text = f"{time.strftime('%H:%M:%S')} [watch] {line}\n"
        with suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()
        with suppress(OSError), RunFolder(Path(self._settings.folder)).log.open("a", encoding="utf-8") as log:
            log.write(text)


def _peer(writer: asyncio.StreamWriter) -> tuple[int, int]:
    """Process and user at the other end, as the kernel says."""
    one = struct.Struct("3i")
    credentials = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, one.size)
    process, user, _ = one.unpack(credentials)
    return process, user


def main() -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if os.fork():
        os._exit(0)  # a launcher ends all that its ranks have started; this process is not among it any more
    asyncio.run(_watch_and_leave(Settings(**json.loads(sys.argv[1]))))


async def _watch_and_leave(settings: Settings) -> None:
    """Leave from inside: asyncio would cancel what still reads from other hosts, and print a traceback for it."""
    await HostWatch(settings).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

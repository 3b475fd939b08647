"""An examination on the hosts of a file: each is asked over ssh whether it can take part, then runs its ranks over ssh.

One connection per host, and not pdsh, which trains: what each connection says is known by host, and the others go on.
"""

import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from tempfile import TemporaryFile
from typing import IO

from overtok_megatron.doctor.one_host import Ranks
from overtok_megatron.doctor.report import Report
from overtok_megatron.environment import travelling
from overtok_megatron.launching.cluster import Host, ssh_command
from overtok_megatron.launching.hosts import addresses_of

_REACHED_SECONDS = 30.0
_CLOSING_SECONDS = 10.0
_NO_CONNECTION = 255  # ssh's exit code where it is not the command's
_LONGEST = 200  # characters of what a host said


@dataclass(frozen=True)
class Answer:
    """What a host said when it was asked whether it can take part: an address of it, or why it cannot."""

    address: str
    problem: str


def ask(host: Host, ssh: Sequence[str]) -> Answer:
    """Whether ssh reaches a host, and the same Python runs there, in the same folder. ssh: the beginning of its command."""
    command = [*ssh, host.name, f"{_here()} -P -c 'import overtok_megatron' && hostname -I"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_REACHED_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Answer("", f"no answer within {_REACHED_SECONDS:.0f} s; can you run `ssh {host.name} true`?")
    said = _last_line(done.stderr) or f"exit code {done.returncode}"
    if done.returncode == _NO_CONNECTION:
        return Answer("", f"is not reached by ssh ({said}); can you run `ssh {host.name} true`?")
    if done.returncode:
        return Answer("", f"cannot run {sys.executable} in {os.getcwd()} ({said}); every host needs both")
    return Answer((done.stdout.split() or [host.address])[0], "")


def _here() -> str:
    """The beginning of a remote command that runs this Python in this folder."""
    return f"cd {shlex.quote(os.getcwd())} && {shlex.quote(sys.executable)}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:_LONGEST]


def examine_hosts(
    hosts: Sequence[Host], arguments: Sequence[str], environment: Mapping[str, str], master_port: int | None
) -> Report:
    """Run the ranks of all hosts that can take part and return the first rank's report, with what is wrong with the others.

    arguments: of `overtok` for a rank, without those that say where the report goes. environment: the caller's, whose
    MASTER_ADDR wins over the first host's name. master_port: None = one at random. Where no report comes, the returned one has
    the findings that say why.
    """
    ssh = ssh_command(environment)
    with ThreadPoolExecutor(max_workers=64) as pool:
        answers = dict(zip(hosts, pool.map(lambda host: ask(host, ssh), hosts), strict=True))
    problems = [f"host {host.name}: {answer.problem}" for host, answer in answers.items() if answer.problem]
    fit = [host for host in hosts if not answers[host].problem]
    if not fit:
        return Report(ranks=0, findings=problems)
    started = ",".join(f"{host.name}:{host.ranks}" for host in fit)
    # DeepSpeed's launcher, which trains, takes the same address: a name that only ssh knows is no address
    known = fit[0].address if addresses_of(fit[0].address) else answers[fit[0]].address
    everywhere = Ranks(
        arguments=[*arguments, "--started", started, "--json", "-"],
        environment=travelling(environment),
        first=0,
        count=0,
        world=sum(host.ranks for host in fit),
        master_address=environment.get("MASTER_ADDR") or known,
        master_port=master_port or 10_000 + secrets.randbelow(20_000),
    )
    report, failures = _run(fit, everywhere, ssh)
    if report is None:
        failures.setdefault(fit[0].name, f"host {fit[0].name}: no report came from its first rank")
        return Report(ranks=everywhere.world, findings=[*problems, *failures.values()])
    silent = tuple(f"host {name}: no answer" for name in failures)  # it is known better
    told = [line for line in report.findings if not line.startswith(silent)]
    return replace(report, findings=[*problems, *failures.values(), *told])


def _run(hosts: Sequence[Host], everywhere: Ranks, ssh: Sequence[str]) -> tuple[Report | None, dict[str, str]]:
    """The report, and a line for each host that the report knows nothing of, although its connection has ended."""
    with ExitStack() as files:
        # the first host's errors are shown as they come, with what the first rank says of its progress
        errors = [None, *(files.enter_context(TemporaryFile("w+", errors="replace")) for _ in hosts[1:])]
        connections: list[subprocess.Popen[str]] = []
        try:
            before = 0
            for host, output in zip(hosts, errors, strict=True):
                connections.append(_connect(host, replace(everywhere, first=before, count=host.ranks), output, ssh))
                before += host.ranks
            report = _read_report(connections[0])
            failures = {}
            for host, connection, output in zip(hosts, connections, errors, strict=True):
                if connection.poll() and (report is None or host.name not in report.facts):
                    line = "as shown above" if output is None else _last_line(_content(output)) or "in silence"
                    failures[host.name] = (
                        f"host {host.name}: its ranks ended with code {connection.returncode} ({line})"
                    )
            return report, failures
        finally:
            for connection in connections:
                _close(connection)


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _connect(host: Host, given: Ranks, output: IO[str] | None, ssh: Sequence[str]) -> subprocess.Popen[str]:
    """Run the ranks of a host. Their standard output can be read, their errors go to `output`; they end with the connection."""
    command = f"{_here()} -P -m overtok_megatron.doctor.one_host {shlex.quote(given.as_json())}"
    return subprocess.Popen(
        [*ssh, host.name, command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True
    )


def _read_report(connection: subprocess.Popen[str]) -> Report | None:
    """The report that the first rank prints; None where its connection ends without one."""
    assert connection.stdout is not None
    for line in connection.stdout:
        if line.startswith("{"):
            return Report.from_json(json.loads(line))
    connection.wait()
    return None


def _close(connection: subprocess.Popen[str]) -> None:
    """End a connection: the ranks notice that their input ends."""
    assert connection.stdin is not None
    with suppress(OSError):
        connection.stdin.close()
    try:
        connection.wait(_CLOSING_SECONDS)
    except subprocess.TimeoutExpired:
        connection.kill()
        connection.wait()

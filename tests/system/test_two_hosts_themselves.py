"""The two hosts of the tests: what tests of broken links and dead hosts rely on."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from support.namespaces import reason_to_skip, signal_to, two_hosts

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(bool(reason := reason_to_skip()), reason=reason or ""),
]


def test_hosts_reach_each_other_until_the_link_is_cut(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as hosts:
        for host, other in (tuple(hosts), tuple(hosts)[::-1]):
            assert host.check("hostname").strip() == host.name
            assert host.check("hostname", "-I").split() == [host.address]
            assert host.check("ssh", other.name, "hostname").strip() == other.name
        hosts.cut()
        for host, other in (tuple(hosts), tuple(hosts)[::-1]):
            code, output = host.run("ssh", other.name, "hostname")
            assert code == 255
            assert f"connect to host {other.name}" in output
        hosts.heal()
        assert hosts.alpha.check("ssh", "beta", "hostname").strip() == "beta"


def test_processes_are_told_apart_and_get_signals(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as hosts:
        sleeper = hosts.beta.start("sleep", "1234")
        while not hosts.beta.processes("1234"):
            assert sleeper.poll() is None
        assert not hosts.alpha.processes("1234")
        assert "1234" not in hosts.alpha.check("ps", "ax")
        signal_to(sleeper, signal.SIGUSR1)
        assert sleeper.wait(timeout=20) == -signal.SIGUSR1


def test_hosts_end_with_the_test(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as hosts:
        firsts = [host.first for host in hosts]
        ssh = hosts.alpha.start("ssh", "beta", "setsid", "sleep", "1234")
        while not (sleeper := hosts.beta.processes("1234")):
            assert ssh.poll() is None
    wait_for_end([*firsts, *(process.pid for process in sleeper)])


def test_hosts_end_when_the_test_is_killed(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from support.namespaces import two_hosts
        with two_hosts(Path(sys.argv[1])) as hosts:
            hosts.alpha.start("sleep", "1234")
            print(*(host.first for host in hosts), flush=True)
            time.sleep(600)
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    firsts = [int(word) for word in process.stdout.readline().split()]
    assert len(firsts) == 2
    process.kill()
    process.wait()
    wait_for_end(firsts)


def wait_for_end(processes: list[int]) -> None:
    deadline = time.monotonic() + 20
    while left := [pid for pid in processes if psutil.pid_exists(pid) and alive(pid)]:
        assert time.monotonic() < deadline, f"processes {left} live on"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

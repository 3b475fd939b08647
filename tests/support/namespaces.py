"""Two hosts on one machine: Linux namespaces with a network card, a host name, processes and an sshd of their own.

Each host is a process of `unshare` whose child is the first process of a PID namespace. That child ends when the pipe to this
process closes, also when this process is killed, and the kernel then kills every process of the host and removes its network.
The files are shared, as a cluster's are, except /dev/shm, /run, /etc/hosts and /etc/ssh. Needs root, and Debian's packages
iproute2 and openssh-server (which brings the client).
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

NAMES = ("alpha", "beta")
INTERFACE = "eth0"
_PROGRAMS = ("ip", "unshare", "nsenter", "sshd", "ssh-keygen", "mount")
_SYSTEM_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"  # sshd and ip are not on every user's path

# the first process of a host: ready once its sshd listens, and reaping the processes that outlive their parents, as init does
_FIRST = """
set -e
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/ssh" /etc/ssh
hostname "$2"
read -r wired
ip address add "$3/24" dev {interface}
ip link set {interface} up
ip link set lo up
"$4" -E "$1/sshd-$2.log"
echo ready
trap '' CHLD
exec cat >/dev/null
"""

_SSH = """
Host *
  IdentityFile {folder}/ssh/key
  UserKnownHostsFile {folder}/ssh/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
"""

_SSHD = """
HostKey {folder}/ssh/host_key
AuthorizedKeysFile {folder}/ssh/key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""


@dataclass(frozen=True)
class Host:
    """One host; `first` is its first process, in this machine's numbers."""

    name: str
    address: str
    first: int

    def command(self, *words: object) -> list[str]:
        """The command line that runs these words on this host, in the current folder."""
        folder = f"--wd={os.getcwd()}"
        return [_program("nsenter"), f"--target={self.first}", "--all", folder, "--", *map(str, words)]

    def start(self, *words: object, **settings: Any) -> subprocess.Popen[str]:
        """Start a program on this host. Its signals go through `signal_to`: the process that is returned only waits for it."""
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True} | settings
        return subprocess.Popen(self.command(*words), text=True, **settings)

    def run(self, *words: object, timeout: float = 120, **settings: Any) -> tuple[int, str]:
        """(exit code, output) of a program on this host. Raises subprocess.TimeoutExpired after so many seconds."""
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | settings
        done = subprocess.run(self.command(*words), text=True, timeout=timeout, **settings)
        return done.returncode, done.stdout

    def check(self, *words: object, timeout: float = 120, **settings: Any) -> str:
        """The output of a program on this host, which must succeed."""
        code, output = self.run(*words, timeout=timeout, **settings)
        assert code == 0, f"{self.name}: {words} left with {code}:\n{output}"
        return output

    def processes(self, *words: str) -> list[psutil.Process]:
        """The processes of this host whose command line has all of these words, in this machine's numbers."""
        found = []
        namespace = os.readlink(f"/proc/{self.first}/ns/pid")
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == namespace and set(words) <= set(process.cmdline()):
                    found.append(process)
            except (OSError, psutil.Error):  # it has just ended
                continue
        return found


@dataclass(frozen=True)
class TwoHosts:
    """The hosts `alpha` and `beta`, and the link between them."""

    alpha: Host
    beta: Host

    def __iter__(self) -> Iterator[Host]:
        return iter((self.alpha, self.beta))

    def cut(self) -> None:
        """Take down beta's end of the link: alpha's end has no carrier then, and packets of either side are lost."""
        self.beta.check("ip", "link", "set", INTERFACE, "down", env=environment())

    def heal(self) -> None:
        """Bring the link up again."""
        self.beta.check("ip", "link", "set", INTERFACE, "up", env=environment())

    def hostfile(self, path: Path, slots: int) -> Path:
        """Write DeepSpeed's file of hosts with so many ranks on each."""
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self), encoding="utf-8")
        return path


def signal_to(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to the program that `Host.start` started."""
    for child in psutil.Process(process.pid).children():
        child.send_signal(number)


def reason_to_skip(*programs: str) -> str | None:
    """Why hosts that need these programs cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    missing = [name for name in (*_PROGRAMS, *programs) if _program(name) is None]
    if missing:
        return f"these programs are missing: {', '.join(missing)}; .ci/run installs them on Debian"
    probe = [_program("unshare"), "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        return "this machine allows no new namespaces"
    return None


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Two hosts that reach each other by name and by ssh, with their keys and logs in `folder`; gone afterwards."""
    addresses = [f"10.83.0.{number}" for number in (1, 2)]
    _write_settings(folder, addresses)
    with ExitStack() as stack:
        firsts = [
            stack.enter_context(_first_process(folder, name, address))
            for name, address in zip(NAMES, addresses, strict=True)
        ]
        hosts = [
            Host(name, address, psutil.Process(first.pid).children()[0].pid)
            for name, address, first in zip(NAMES, addresses, firsts, strict=True)
        ]
        near, far = (str(host.first) for host in hosts)
        link = [_program("ip"), "link", "add", INTERFACE, "netns", near]
        subprocess.run([*link, "type", "veth", "peer", "name", INTERFACE, "netns", far], check=True)
        for first, host in zip(firsts, hosts, strict=True):
            assert first.stdin is not None
            assert first.stdout is not None
            first.stdin.write("wired\n")
            first.stdin.flush()
            said = first.stdout.readline()
            assert said == "ready\n", f"{host.name} did not start: {said}{first.stdout.read()}"
        yield TwoHosts(*hosts)


@contextmanager
def _first_process(folder: Path, name: str, address: str) -> Iterator[subprocess.Popen[str]]:
    """`unshare` with the first process of a host below it, which waits for its network card."""
    namespaces = ("--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
    script = _FIRST.format(interface=INTERFACE)
    process = subprocess.Popen(
        [_program("unshare"), *namespaces, "sh", "-c", script, "sh", folder, name, address, _program("sshd")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment(),
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        _wait_for_child(process)
        yield process
    finally:
        process.kill()  # and, by --kill-child, the host with all its processes
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _wait_for_child(process: subprocess.Popen[str]) -> None:
    while not psutil.Process(process.pid).children():
        assert process.poll() is None, f"unshare left with {process.returncode}"


def _write_settings(folder: Path, addresses: list[str]) -> None:
    """Names of the hosts, and keys and settings of ssh, which every user on a host finds in /etc."""
    names = "".join(f"{address} {name}\n" for address, name in zip(addresses, NAMES, strict=True))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="utf-8")
    ssh = folder / "ssh"
    ssh.mkdir()
    for key in ("key", "host_key"):
        subprocess.run([_program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", ssh / key], check=True)
    known = (ssh / "host_key.pub").read_text(encoding="utf-8")
    (ssh / "known_hosts").write_text(f"{','.join((*NAMES, *addresses))} {known}", encoding="utf-8")
    (ssh / "ssh_config").write_text(_SSH.format(folder=folder), encoding="utf-8")
    (ssh / "sshd_config").write_text(_SSHD.format(folder=folder), encoding="utf-8")


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}")


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"}

"""A run on the hosts that a file names: the file, the environment that travels, and the command of DeepSpeed's launcher.

DeepSpeed's launcher connects to the hosts by pdsh and ssh, or calls mpirun, mpiexec or srun. It takes variables from a file,
which lies in a temporary folder here, so that nothing is written into the user's home.
"""

import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from overtok_megatron.environment import callers_devices, travelling
from overtok_megatron.errors import ConfigError
from overtok_megatron.launching.hosts import addresses_of, is_own_address
from overtok_megatron.run_lock import holder_of

# What each of DeepSpeed's launchers calls, and who brings it.
LAUNCHERS = {"pdsh": "pdsh", "openmpi": "mpirun", "mpich": "mpirun", "impi": "mpirun", "slurm": "srun"}
# A host that falls silent is noticed after a minute, and nobody is asked for a password.
_SSH = "-o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"  # appended to the user's own
_DEEPSPEEDS_FILE, _DEEPSPEEDS_NAME = ".deepspeed_env", "DS_ENV_FILE"
_PLAIN = re.compile(r"[\w@%+=:,./-]*")  # what DeepSpeed writes into a remote command without quotes


@dataclass(frozen=True)
class Host:
    """A host by the name under which ssh and the other hosts know it, and how many ranks run there."""

    name: str
    ranks: int

    @property
    def address(self) -> str:
        """The name without that of a user."""
        return self.name.rpartition("@")[2]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The hosts of a run, the first rank's host first, and how DeepSpeed starts ranks there.

    launcher: one of LAUNCHERS. launcher_arguments: words for pdsh, mpirun or srun.
    """

    hosts: tuple[Host, ...]
    launcher: str = "pdsh"
    launcher_arguments: str = ""

    @property
    def world_size(self) -> int:
        return sum(host.ranks for host in self.hosts)

    @property
    def most_ranks(self) -> int:
        """Of one host."""
        return max(host.ranks for host in self.hosts)

    @property
    def ranks_here(self) -> int:
        """How many ranks run on this host; 0 where it only starts them."""
        return next((host.ranks for host in self.hosts if any(map(is_own_address, addresses_of(host.address)))), 0)


def read_hostfile(path: Path, ranks_per_host: int | None) -> tuple[Host, ...]:
    """The hosts of a file with lines "HOST slots=N"; empty lines and those that begin with # are left out.

    ranks_per_host: None = one rank per slot. Raises ConfigError naming the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors of Windows write a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text"
        raise ConfigError(
            f"--hostfile {path}: cannot be read ({reason}); it holds a line per host: HOST slots=N"
        ) from None
    found: dict[str, tuple[int, Host]] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        parts = re.fullmatch(r"((?:[\w.-]+@)?[A-Za-z0-9_][\w.-]*)\s+slots=(\d{1,6})", text)
        if parts is None:
            name = " with its name, not an IPv6 address" if text.split()[0].count(":") > 1 else ""
            raise ConfigError(f"{path}:{number}: {text[:60]!r}; write one line per host{name}, such as node1 slots=8")
        name, slots = parts[1], int(parts[2])
        if name in found:
            raise ConfigError(f"{path}:{number}: {name} stands in line {found[name][0]} already; name each host once")
        if not slots:
            raise ConfigError(f"{path}:{number}: {name} has slots=0; write how many ranks it runs, or remove the line")
        if ranks_per_host is not None and ranks_per_host > slots:
            raise ConfigError(
                f"--processes: {ranks_per_host} per host, but {name} has slots={slots} ({path}:{number}); ask for fewer"
            )
        found[name] = number, Host(name, ranks_per_host or slots)
    if not found:
        raise ConfigError(f"--hostfile {path}: names no host; write one line per host, such as node1 slots=8")
    local = next((name for name in found if name.startswith(("localhost", "127."))), None)
    if local is not None and len(found) > 1:
        raise ConfigError(
            f"{path}:{found[local][0]}: {local} is another host to each of the {len(found)}; write its name on the network"
        )
    return tuple(host for _, host in found.values())


def check_cluster(cluster: Cluster, environment: Mapping[str, str]) -> None:
    """Raise ConfigError, a line, where a program is missing, or a host is not reached or has not the same Python.

    environment: of the ranks.
    """
    program = LAUNCHERS[cluster.launcher]
    if shutil.which(program, path=environment.get("PATH", "")) is None:
        raise ConfigError(
            f"--launcher {cluster.launcher}: {program} is not installed here; install it, or start ranks with torchrun or srun"
        )
    devices = callers_devices(environment)
    if len(cluster.hosts) > 1 and devices is not None and not re.fullmatch(r"[\d,\s]*", devices):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES: {devices[:60]} names devices of this host alone; write their numbers, or unset it"
        )
    for path in (os.getcwd(), sys.executable):
        if not _PLAIN.fullmatch(path):
            raise ConfigError(
                f"{path}: DeepSpeed's launcher cannot hand this path to other hosts; use one of plain characters"
            )
    if cluster.launcher == "pdsh":
        _check_reachable(cluster.hosts, environment)


def ssh_command(environment: Mapping[str, str]) -> list[str]:
    """The beginning of a command that runs something on another host, with the options with which pdsh will call ssh."""
    return ["ssh", *shlex.split(environment.get("PDSH_SSH_ARGS_APPEND", "")), *_SSH.split()]


def _check_reachable(hosts: Sequence[Host], environment: Mapping[str, str]) -> None:
    """Raise ConfigError naming the hosts that ssh does not reach, or that cannot import this package from this folder."""
    here = f"cd {shlex.quote(os.getcwd())} && PYTHONPATH={shlex.quote(environment.get('PYTHONPATH', ''))}"
    remote = f"{here} {shlex.quote(sys.executable)} -P -c 'import overtok_megatron'"
    ssh = ssh_command(environment)

    def reason(host: Host) -> str | None:
        command = [*ssh, host.name, remote]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:120]
        if done.returncode == 0:
            return None
        return f"is not reached by ssh ({said})" if done.returncode == 255 else f"cannot run the same Python ({said})"

    with ThreadPoolExecutor(max_workers=64) as pool:
        failed = [(host, why) for host, why in zip(hosts, pool.map(reason, hosts), strict=True) if why is not None]
    if failed:
        host, why = failed[0]
        others = ", ".join(one.name for one, _ in failed[1:9]) + (", ..." if len(failed) > 9 else "")
        also = f"; the same may hold for {others}" if others else ""
        raise ConfigError(
            f"--hostfile: {host.name} {why}; each host needs ssh without a password, this folder and {sys.executable}{also}"
        )


def deepspeed_launcher(environment: Mapping[str, str]) -> list[str]:
    """The command line, without arguments, of the launcher of DeepSpeed that belongs to this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    launcher = shutil.which("deepspeed", path=path)
    assert launcher is not None, "deepspeed is installed without its launcher"
    return [sys.executable, launcher]


@contextmanager
def cluster_command(
    cluster: Cluster,
    module: str,
    arguments: Sequence[str],
    environment: MutableMapping[str, str],
    master_port: int | None,
) -> Iterator[list[str]]:
    """The command line of DeepSpeed's launcher that runs `python -m module arguments` on all hosts, while the block runs.

    environment: of the ranks; is changed into that of the launcher. master_port: None = one of many, at random, because
    this host cannot know which are free on the first one.
    """
    port = str(master_port or 10_000 + secrets.randbelow(20_000))
    address = cluster.hosts[0].address
    arguments = [_for_remote_shell(word) for word in arguments] if cluster.launcher == "pdsh" else list(arguments)
    words = cluster.launcher_arguments
    if cluster.launcher == "openmpi":  # DeepSpeed gives it neither, and would ask MPI for the address
        words = f"{words} -x MASTER_ADDR={address} -x MASTER_PORT={port}".strip()
    with TemporaryDirectory(prefix="overtok-") as folder:
        hostfile, variables = Path(folder) / "hosts", Path(folder) / "environment"
        hostfile.write_text("".join(f"{host.name} slots={host.ranks}\n" for host in cluster.hosts), encoding="utf-8")
        variables.write_text(_environment_file(environment, cluster.launcher), encoding="utf-8")
        environment[_DEEPSPEEDS_NAME] = str(variables)
        environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {_SSH}".strip()
        # srun is given a script by DeepSpeed, whatever --module says
        code = [_file_of(module)] if cluster.launcher == "slurm" else ["--module", module]
        # a name that ssh alone knows, by its configuration, is left to DeepSpeed, which asks the host for its address
        named = ["--master_addr", address] if addresses_of(address) else []
        yield [
            *[
                *deepspeed_launcher(environment),
                "--hostfile",
                str(hostfile),
                "--launcher",
                cluster.launcher,
                "--force_multi",
            ],
            *["--no_ssh_check", "--master_port", port, *named],
            *(["--launcher_args", words] if words else []),
            *["--log_level", "critical", *code, *arguments],
        ]


def signal_first_rank(cluster: Cluster, run: Path, environment: Mapping[str, str], number: int) -> bool:
    """Send a signal to the first rank of the training in the folder `run`, on its host; all ranks then stop together.

    environment: as for `check_cluster`. Returns whether the rank was there to get it.
    """
    holder = holder_of(run)
    if holder is None:  # no rank has come so far
        return False
    host, process = holder
    command = ["kill", f"-{number}", str(process)]
    if host != socket.gethostname():
        own = shlex.split(environment.get("PDSH_SSH_ARGS_APPEND", ""))
        command = ["ssh", *own, *_SSH.split(), cluster.hosts[0].name, *command]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def _environment_file(environment: Mapping[str, str], launcher: str) -> str:
    """The lines NAME=VALUE of what travels. What the user's own files of DeepSpeed say comes last, and wins.

    Raises ConfigError where a value cannot travel.
    """
    values = travelling(environment)
    for name, value in values.items():
        if "\n" in value:
            raise ConfigError(f"{name}: holds a line break and cannot travel to other hosts; unset it")
    if launcher == "pdsh":
        values = {name: _quoted(value) for name, value in values.items()}
    lines = [f"{name}={value}\n" for name, value in values.items()]
    for folder in dict.fromkeys((Path.home(), Path.cwd())):
        path = folder / environment.get(_DEEPSPEEDS_NAME, _DEEPSPEEDS_FILE)
        if path.is_file():
            lines += [f"{line}\n" for line in path.read_text(encoding="utf-8").splitlines() if "=" in line]
    return "".join(lines)


def _quoted(value: str) -> str:
    """A value as DeepSpeed must find it, which puts it between double quotes where it is not plain; pdsh replaces %n."""
    value = value.replace("%", "%%")
    return value if _PLAIN.fullmatch(value) else re.sub(r'([\\"$`])', r"\\\1", value)


def _for_remote_shell(word: str) -> str:
    """An argument as DeepSpeed must find it, which puts those with spaces between double quotes, and escapes these only."""
    word = word.replace("%", "%%")
    if _PLAIN.fullmatch(word):
        return word
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def _file_of(module: str) -> str:
    return str(Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py"))

"""A SLURM cluster of two hosts in namespaces: munge and slurmd on each, slurmctld on the first; gone with the hosts.

Needs Debian's packages slurmctld, slurmd, slurm-client and munge. Nothing is accounted and no control groups are used, so that
it runs in a container.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.namespaces import Host, TwoHosts, environment, two_hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
CORES = 2
GPUS = 2

_SLURM = """
ClusterName=test
SlurmctldHost=alpha
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket,cred_expire={requeue}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=5
ReturnToService=2
KillWait=5
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_REQUEUE = 5  # seconds that a job waits before it starts again; SLURM's own choice is 120


@dataclass(frozen=True)
class Slurm:
    """A cluster; commands are given on its first host."""

    hosts: TwoHosts
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need to find this cluster."""
        return environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self, *words: object, **variables: str) -> subprocess.Popen[str]:
        """Start a command of SLURM, with these environment variables beside the usual ones."""
        return self.hosts.alpha.start(*words, env=self.environment | variables)

    def check(self, *words: object, timeout: float = 120, **variables: str) -> str:
        """The output of a command of SLURM, which must succeed."""
        return self.hosts.alpha.check(*words, timeout=timeout, env=self.environment | variables)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by name."""
        shown = self.check("scontrol", "show", "job", number, "--oneliner")
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for_job(self, number: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Until a job is in one of these states; returns what SLURM says of it."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']} ({job['Reason']}), not in {states}"
            time.sleep(0.2)
        return job


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """Two hosts on which jobs can be started, with logs and state in `folder`."""
    with two_hosts(folder) as hosts:
        nodes = "\n".join(
            f"NodeName={host.name} NodeAddr={host.address} CPUs={CORES} Gres=gpu:{GPUS} State=UNKNOWN" for host in hosts
        )
        text = _SLURM.format(folder=folder, nodes=nodes, requeue=_REQUEUE)
        (folder / "slurm.conf").write_text(text, encoding="utf-8")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n", encoding="utf-8")
        (folder / "gres.conf").write_text("Name=gpu File=/dev/zero,/dev/null\n", encoding="utf-8")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "state").mkdir()
        slurm = Slurm(hosts, folder)
        for host in hosts:
            _start_munge(host, folder)
        daemons = [hosts.alpha.start("slurmctld", "-D", env=slurm.environment)]
        daemons += [host.start("slurmd", "-D", "-N", host.name, env=slurm.environment) for host in hosts]
        _wait_for_nodes(slurm, daemons)
        yield slurm


def _start_munge(host: Host, folder: Path) -> None:
    """munged, which proves to SLURM's daemons who sent a message; --force: the folders of tests are writable by others."""
    files = [f"--{name}-file={folder}/munge-{host.name}.{name}" for name in ("log", "seed")]
    files += [f"--key-file={folder}/munge.key", "--socket=/run/munge.socket", "--pid-file=/run/munge.pid"]
    host.check("munged", "--force", *files, env=environment())


def _wait_for_nodes(slurm: Slurm, daemons: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 60
    while True:
        code, shown = slurm.hosts.alpha.run("sinfo", "--noheader", "--format=%D %t", env=slurm.environment)
        if code == 0 and shown.split() == ["2", "idle"]:
            return
        for daemon in daemons:
            assert daemon.poll() is None, f"a daemon of SLURM ended: {daemon.stdout.read() if daemon.stdout else ''}"
        assert time.monotonic() < deadline, f"SLURM's nodes are not ready: {shown}"
        time.sleep(0.2)

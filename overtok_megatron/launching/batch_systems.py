"""Which rank a process is and where the ranks meet, from the environment in which it was started: pure functions.

| started by | known by | master, unless MASTER_ADDR and MASTER_PORT are set |
| --- | --- | --- |
| torchrun, DeepSpeed's launcher, Kubernetes | RANK, WORLD_SIZE | always set by them |
| mpirun of OpenMPI, prterun | OMPI_COMM_WORLD_* | the first host of the SLURM allocation, else the host on which mpirun runs |
| srun | SLURM_PROCID and the number of a step | the first host of the step; a port from the numbers of job and step |
| mpiexec of MPICH and of Intel MPI (Hydra) | PMI_RANK, PMI_SIZE | the first host of the SLURM allocation, if there is one |
| nobody | none of these | one rank, on this host |

What stands above in the table wins: mpirun starts its own daemons with srun, and torchrun is often started by srun. In the
shell of `salloc` and in the script of `sbatch` SLURM's variables are set, too, but no task was started there: such a
process is one rank, whatever SLURM_NTASKS says.

Sources of the names: the manual pages of sbatch and srun ("OUTPUT ENVIRONMENT VARIABLES"), the FAQ of OpenMPI, and the
environment of ranks started by OpenMPI 5.0 and MPICH 5.0.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from overtok_megatron.errors import ConfigError
from overtok_megatron.placement import Placement

Environment = Mapping[str, str]
THIS_HOST = "127.0.0.1"
ALONE = "a process alone"
DEFAULT_PORT = 29500  # of torch, where neither the caller nor a number of the job gives one
# Ports from 10000 up to 29996, below those of Kubernetes' services and those that Linux gives to clients. A prime number of
# them, so that jobs and steps whose numbers are close never share one.
_FIRST_PORT, _PORTS, _STEPS = 10_000, 19_997, 97
# What numbers the hosts of a job, by launcher: torchrun, DeepSpeed's, SLURM. Several "hosts" may be one machine.
_HOST_NUMBERS = ("GROUP_RANK", "CROSS_RANK", "SLURM_NODEID")
_SPECIAL_STEPS = 0xFFFFFFF0  # numbers from here on are of shells and scripts of a job, and of steps that are pending


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What the variables of one batch system say; None = they do not say it. mend: how its users set MASTER_ADDR."""

    started_by: str
    rank: int
    world_size: int
    local_rank: int | None = None
    ranks_of_host: int | None = None
    address: str | None = None
    port: int | None = None
    cores: int | None = None
    mend: str = "set it to the host of rank 0"


def find_placement(environment: Environment) -> Placement:
    """The placement of the process with this environment. What the caller has set wins over what batch systems say.

    Raises ConfigError, one line, where variables are missing, are not numbers, or contradict each other.
    """
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    task = _task(environment)
    if task is not None and (rank not in (None, task.rank) or world_size not in (None, task.world_size)):
        task = None  # it tells of the process that started the launcher
    if task is None:
        task = _callers_task(environment, rank, world_size)
    world_size, rank = task.world_size, task.rank
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"{task.started_by}: rank {rank} of {world_size}; ranks are numbered from 0 to WORLD_SIZE - 1: correct "
            "RANK or WORLD_SIZE"
        )
    ranks_of_host = _ranks_of_host(environment, task)
    local_rank = _local_rank(environment, task, ranks_of_host)
    address, port = environment.get("MASTER_ADDR") or None, _number(environment, "MASTER_PORT")
    if port is None:
        port = task.port if task.port is not None else DEFAULT_PORT
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"MASTER_PORT: {port} is not a port; ports are numbers from 1 to 65535")
    named = address or (THIS_HOST if ranks_of_host == world_size else task.address)
    if named is None:
        raise ConfigError(
            f"MASTER_ADDR: not set, and {task.started_by} started {world_size} ranks on several hosts without naming the "
            f"first; {task.mend}"
        )
    return Placement(
        started_by=task.started_by,
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        ranks_of_host=ranks_of_host or 1,
        master_address=named,
        master_port=port,
        master_given=named in (address, THIS_HOST),
        cores=task.cores,
        host_number=next((environment[name] for name in _HOST_NUMBERS if name in environment), ""),
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def forgotten_tasks(environment: Environment, place: Placement) -> str | None:
    """A line where a process is one rank alone in a SLURM job of several tasks, as in a script without srun; else None."""
    asked = environment.get("SLURM_NTASKS", "").strip()
    if place.started_by != ALONE or not asked.isdecimal() or int(asked) < 2:
        return None
    return f"SLURM_NTASKS is {asked}, but srun has not started this process, so it trains on one rank only; start it with srun"


def _callers_task(environment: Environment, rank: int | None, world_size: int | None) -> _Task:
    """The task where no batch system started it: that of RANK and WORLD_SIZE, or a single process where neither is set."""
    if rank is None and world_size is None:
        local_rank = _number(environment, "LOCAL_RANK")
        if local_rank:
            raise ConfigError(f"RANK: not set, but LOCAL_RANK is {local_rank}; set RANK and WORLD_SIZE, or unset it")
        return _Task(started_by=ALONE, rank=0, world_size=1, local_rank=0, ranks_of_host=1, address=THIS_HOST, port=0)
    missing, other = ("RANK", "WORLD_SIZE") if rank is None else ("WORLD_SIZE", "RANK")
    if rank is None or world_size is None:
        raise ConfigError(f"{missing}: not set, but {other} is {environment[other]}; set both, or neither")
    alone = 1 if world_size == 1 else None
    return _Task(started_by="the caller's RANK and WORLD_SIZE", rank=rank, world_size=world_size, ranks_of_host=alone)


def _ranks_of_host(environment: Environment, task: _Task) -> int | None:
    found = _number(environment, "LOCAL_WORLD_SIZE")
    if found is None:
        found = _number(environment, "LOCAL_SIZE")  # DeepSpeed's name for it
    if found is None:
        found = task.ranks_of_host
    if found is not None and not 1 <= found <= task.world_size:
        raise ConfigError(
            f"{task.started_by}: {found} ranks on this host of {task.world_size} in all; correct LOCAL_WORLD_SIZE or WORLD_SIZE"
        )
    return found


def _local_rank(environment: Environment, task: _Task, ranks_of_host: int | None) -> int:
    found = _number(environment, "LOCAL_RANK")
    if found is None:
        found = 0 if ranks_of_host == 1 else task.local_rank
    if found is None:
        raise ConfigError(
            f"LOCAL_RANK: not set for rank {task.rank} of {task.world_size}; set it to the number of the rank on its host, "
            "as torchrun, srun and mpirun do"
        )
    if found < 0 or (ranks_of_host is not None and found >= ranks_of_host):
        raise ConfigError(
            f"LOCAL_RANK: {found}, but this host has {ranks_of_host} ranks, numbered from 0; correct it or LOCAL_WORLD_SIZE"
        )
    return found


def _task(environment: Environment) -> _Task | None:
    """The task that a batch system started; None where none did."""
    if "OMPI_COMM_WORLD_RANK" in environment:
        return _open_mpi(environment)
    step, process = _slurm_step(environment), _hydra(environment)
    if process is None:
        return step
    # `srun --mpi=pmi2` sets the variables of Hydra as well; Hydra starts one proxy per host with srun
    same = step is not None and (step.rank, step.world_size) == (process.rank, process.world_size)
    return step if same else process


def _open_mpi(environment: Environment) -> _Task:
    allocated, job_port = _allocation(environment)
    host, port = _host_of_mpirun(environment)
    return _Task(
        started_by="mpirun",
        rank=_needed(environment, "OMPI_COMM_WORLD_RANK"),
        world_size=_needed(environment, "OMPI_COMM_WORLD_SIZE"),
        local_rank=_number(environment, "OMPI_COMM_WORLD_LOCAL_RANK"),
        ranks_of_host=_number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        address=allocated or host,
        port=job_port if port is None else port,
        mend="give the host of rank 0 by mpirun -x MASTER_ADDR=HOST",
    )


def _host_of_mpirun(environment: Environment) -> tuple[str | None, int | None]:
    """Where mpirun runs, and a port that follows from the number of its job; the first rank is there in most cases.

    OpenMPI 5 names the host in PMIX_NAMESPACE, "prterun-HOST-PROCESS@1"; OpenMPI 4 gives the addresses of mpirun in
    OMPI_MCA_orte_hnp_uri, "JOB.0;tcp://10.0.0.1,192.168.0.1:37415".
    """
    space = environment.get("PMIX_NAMESPACE", "")
    named = re.fullmatch(r"prterun-(.+)-\d+@\d+", space)
    if named:
        return named[1], _port(zlib.crc32(space.encode()))
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    addresses = re.match(r"(\d+)\.\d+;(?:tcp://([^,:\[]+)|tcp6://\[([^,\]]+))", uri)
    if addresses:
        return addresses[2] or addresses[3], _port(int(addresses[1]) >> 12)  # the lowest bits number the parts of a job
    return None, _port(zlib.crc32(space.encode())) if space else None


def _hydra(environment: Environment) -> _Task | None:
    rank, world_size = _number(environment, "PMI_RANK"), _number(environment, "PMI_SIZE")
    if rank is None or world_size is None:
        return None
    host, port = _allocation(environment)
    return _Task(
        started_by="mpiexec",
        rank=rank,
        world_size=world_size,
        local_rank=_number(environment, "MPI_LOCALRANKID"),
        ranks_of_host=_number(environment, "MPI_LOCALNRANKS"),
        address=host,
        port=port,
        mend="give the host of rank 0 by mpiexec -genv MASTER_ADDR HOST",
    )


def _slurm_step(environment: Environment) -> _Task | None:
    """The task that srun started; None in the shell or script of a job, where no task was started."""
    rank, step = _number(environment, "SLURM_PROCID"), _step(environment)
    if rank is None or step is None:
        return None
    world_size = _number(environment, "SLURM_STEP_NUM_TASKS")
    if world_size is None:
        world_size = _needed(environment, "SLURM_NTASKS")
    host, port = _allocation(environment, step)
    return _Task(
        started_by="srun",
        rank=rank,
        world_size=world_size,
        local_rank=_number(environment, "SLURM_LOCALID"),
        ranks_of_host=_tasks_of_node(environment, world_size),
        address=host,
        port=port,
        cores=_number(environment, "SLURM_CPUS_PER_TASK"),
    )


def _step(environment: Environment) -> int | None:
    """The number of the step that srun started; None for a shell or the script of a job."""
    step = _number(environment, "SLURM_STEP_ID" if "SLURM_STEP_ID" in environment else "SLURM_STEPID")
    return None if step is None or step >= _SPECIAL_STEPS else step


def _allocation(environment: Environment, step: int | None = None) -> tuple[str | None, int | None]:
    """The first host of a SLURM job, or of a step of it, and a port that no other job or step derives.

    step: None for ranks that mpirun or mpiexec started. Only some of their daemons lie in a step, so that ranks see
    different numbers of steps.
    """
    nodes = environment.get("SLURM_JOB_NODELIST")
    if step is not None:
        nodes = environment.get("SLURM_STEP_NODELIST") or nodes
    job = _number(environment, "SLURM_JOB_ID")
    return (first_host(nodes) if nodes else None), None if job is None else _port(job * _STEPS + (step or 0))


def _tasks_of_node(environment: Environment, world_size: int) -> int | None:
    node = _number(environment, "SLURM_NODEID")
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in environment:
            counts = tasks_per_node(environment[name], name)
            if sum(counts) != world_size:
                continue  # it counts the tasks of the whole job
            if node is not None and node < len(counts):
                return counts[node]
            if len(set(counts)) == 1:
                return counts[0]
    return None


def tasks_per_node(text: str, name: str) -> list[int]:
    """How many tasks run on each host: "2(x3),1" is [2, 2, 2, 1]. Raises ConfigError; name: of the variable."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise ConfigError(f"{name}: {text!r} cannot be read; SLURM writes numbers of tasks as in 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first host of SLURM's compressed list: that of "rack[2-3]n[01-04,9],gpu7" is rack2n01. Raises ConfigError."""
    first = re.match(r"(?:[^,\[\]]+|\[[^\[\]]*\])+", nodes.strip())
    host = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]) if first else ""
    if not host or "[" in host:
        raise ConfigError(f"SLURM_JOB_NODELIST: {nodes!r} cannot be read; set MASTER_ADDR to the host of rank 0")
    return host


def _port(number: int) -> int:
    return _FIRST_PORT + number % _PORTS


def _needed(environment: Environment, name: str) -> int:
    found = _number(environment, name)
    if found is None:
        raise ConfigError(
            f"{name}: not set, though other variables of its launcher are; set RANK, WORLD_SIZE and LOCAL_RANK"
        )
    return found


def _number(environment: Environment, name: str) -> int | None:
    """The value of a variable; None where it is not set, or empty."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"-?\d{1,18}", text):
        raise ConfigError(f"{name}: {text[:50]!r} is not a number; correct the variable, or unset it")
    return int(text)

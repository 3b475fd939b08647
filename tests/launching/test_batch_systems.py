"""Environments as launchers and batch systems set them, each with the rank, the grid and the device that must follow."""

from dataclasses import dataclass, field

import pytest

from overtok_megatron.errors import ConfigError
from overtok_megatron.launching.batch_systems import find_placement, first_host, forgotten_tasks, tasks_per_node
from overtok_megatron.parallel import devices
from overtok_megatron.parallel.grid import GridShape
from overtok_megatron.placement import Placement


@dataclass(frozen=True)
class Case:
    """An environment, and (rank, local rank, world size, ranks of the host, master) of the process in it.

    port: None where it is derived from a number of the job.
    """

    environment: dict[str, str]
    expected: tuple[int, int, int, int, str]
    port: int | None = None
    own: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, str]:
        return self.environment | self.own


def slurm(rank: int, local: int, node: int, **others: str) -> dict[str, str]:
    """Of task `rank` in step 3 of job 41877, which has tasks 2, 2, 2 and 1 on four hosts."""
    return {
        "SLURM_JOB_ID": "41877", "SLURM_STEP_ID": "3", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node), "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7", "SLURM_NNODES": "4",
        "SLURM_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        "SLURM_JOB_NODELIST": "login1,gpu[007-009,12]", "SLURM_STEP_NODELIST": "gpu[007-009,12]",
    } | others  # fmt: skip


def open_mpi(rank: int, local: int, *, size: int = 4, local_size: int = 2, **others: str) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(size), "OMPI_COMM_WORLD_LOCAL_RANK": str(local),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size), "OMPI_COMM_WORLD_NODE_RANK": str(local),
    } | others  # fmt: skip


MASTER = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29411"}
# a sbatch script, and a shell that salloc started as a step of its own: no task was started in them
SCRIPT = {
    "SLURM_JOB_ID": "9", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
SHELL = SCRIPT | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "a1"}
TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", **MASTER}
DEEPSPEED = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2", **MASTER,
}  # fmt: skip
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "PMI_HOSTNAME": "b"}
PRRTE = {"PMIX_NAMESPACE": "prterun-head-node-3492@1", "PMIX_HOSTNAME": "head-node"}

CASES = {
    "torchrun": Case(TORCHRUN, (5, 1, 8, 4, "10.0.0.7"), 29411),
    "torchrun below srun": Case(slurm(3, 0, 3), (5, 1, 8, 4, "10.0.0.7"), 29411, own=TORCHRUN),
    "DeepSpeed, pdsh": Case(DEEPSPEED, (3, 1, 4, 2, "10.0.0.7"), 29411),
    "DeepSpeed in a sbatch script": Case(SCRIPT, (3, 1, 4, 2, "10.0.0.7"), 29411, own=DEEPSPEED),
    "DeepSpeed, mpich": Case(
        HYDRA, (2, 0, 4, 2, "10.0.0.7"), 29411,
        own={"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", **MASTER},
    ),
    "Kubernetes, a rank per pod": Case(
        {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "JOB_COMPLETION_INDEX": "2", **MASTER},
        (2, 0, 3, 1, "10.0.0.7"), 29411,
    ),
    "srun": Case(slurm(3, 1, 1), (3, 1, 7, 2, "gpu007"), 10_000 + (41877 * 97 + 3) % 19_997),
    "srun, the last host": Case(slurm(6, 0, 3), (6, 0, 7, 1, "gpu007")),
    "srun, one task": Case(
        {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
         "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1", "SLURM_JOB_NODELIST": "a1"}, (0, 0, 1, 1, "127.0.0.1"), 10_097
    ),
    "srun, another number of tasks than the job": Case(
        SCRIPT | {"SLURM_STEP_ID": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_NTASKS": "2",
                  "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, (1, 0, 2, 1, "a1")
    ),
    "srun with PMI 2": Case(slurm(2, 0, 1), (2, 0, 7, 2, "gpu007"), own={"PMI_RANK": "2", "PMI_SIZE": "7"}),
    "srun, the caller's master": Case(slurm(2, 0, 1), (2, 0, 7, 2, "10.0.0.7"), 29411, own=MASTER),
    "srun, the caller's ranks": Case(
        slurm(2, 0, 1), (2, 0, 7, 2, "gpu007"), own={"RANK": "2", "WORLD_SIZE": "7", "LOCAL_RANK": "0"}
    ),
    "a sbatch script": Case(SCRIPT, (0, 0, 1, 1, "127.0.0.1"), 0),
    "a shell of salloc": Case(SHELL, (0, 0, 1, 1, "127.0.0.1"), 0),
    "a shell of salloc, older": Case(
        {name: value for name, value in SCRIPT.items() if name != "SLURM_PROCID"}, (0, 0, 1, 1, "127.0.0.1"), 0
    ),
    "OpenMPI 5": Case(open_mpi(3, 1, **PRRTE), (3, 1, 4, 2, "head-node")),
    "OpenMPI 4": Case(
        open_mpi(2, 0, OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"), (2, 0, 4, 2, "10.96.0.1")
    ),
    "OpenMPI 4 over IPv6": Case(
        open_mpi(2, 0, OMPI_MCA_orte_hnp_uri="1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370"),
        (2, 0, 4, 2, "fe80::b9b:ac5d"),
    ),
    "OpenMPI on one host": Case(open_mpi(1, 1, size=2, **PRRTE), (1, 1, 2, 2, "127.0.0.1")),
    "OpenMPI, the caller's master": Case(open_mpi(3, 1), (3, 1, 4, 2, "10.0.0.7"), 29411, own=MASTER),
    "OpenMPI within a SLURM job": Case(open_mpi(3, 1), (3, 1, 4, 2, "login1"), own=slurm(1, 0, 1)),
    "MPICH": Case(HYDRA, (2, 0, 4, 2, "10.0.0.7"), 29411, own=MASTER),
    "MPICH on one host": Case(HYDRA | {"MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4"}, (2, 2, 4, 4, "127.0.0.1"), 29500),
    "MPICH within a SLURM job": Case(HYDRA, (2, 0, 4, 2, "login1"), own=slurm(1, 0, 1)),
    "nobody": Case({}, (0, 0, 1, 1, "127.0.0.1"), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_environment_gives_the_rank(name: str) -> None:
    case = CASES[name]
    found = find_placement(case.all)
    assert (
        found.rank, found.local_rank, found.world_size, found.ranks_of_host, found.master_address
    ) == case.expected  # fmt: skip
    if case.port is not None:
        assert found.master_port == case.port
    assert found.master_given == (found.master_address in ("10.0.0.7", "127.0.0.1"))
    again = find_placement(case.all | found.variables())  # a process that reads what another one has set
    assert again.variables() == found.variables()


# (tensor-parallel size, place of every rank as (data, tensor) coordinates) of a whole job, by what started it
WHOLE_JOBS = {
    "torchrun": [
        {"RANK": str(2 * host + local), "LOCAL_RANK": str(local), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", **MASTER}
        for host in range(2) for local in range(2)
    ],
    "DeepSpeed": [
        {"RANK": str(2 * host + local), "LOCAL_RANK": str(local), "WORLD_SIZE": "4", "LOCAL_SIZE": "2", **MASTER}
        for host in range(2) for local in range(2)
    ],
    "srun": [
        slurm(2 * host + local, local, host, SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="4", SLURM_STEP_TASKS_PER_NODE="2(x2)")
        for host in range(2) for local in range(2)
    ],
    "mpirun": [open_mpi(2 * host + local, local, **PRRTE) for host in range(2) for local in range(2)],
    "mpiexec": [
        HYDRA | {"PMI_RANK": str(2 * host + local), "MPI_LOCALRANKID": str(local), **MASTER}
        for host in range(2) for local in range(2)
    ],
}  # fmt: skip


@pytest.mark.parametrize("visible", ["all", "one"])
@pytest.mark.parametrize("started_by", WHOLE_JOBS)
def test_a_whole_job_gets_its_grid_and_its_devices(
    started_by: str, visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor-parallel ranks lie within a host, and two ranks of a host have two devices."""
    shown = 2 if visible == "all" else 1
    monkeypatch.setattr(devices, "num_accelerators", lambda: shown)
    monkeypatch.setattr(devices, "make_current", lambda device: None)
    places = [find_placement(environment) for environment in WHOLE_JOBS[started_by]]
    shape = GridShape(data=2, tensor=2)
    assert [shape.coordinates(place.rank) for place in places] == [
        {"pipe": 0, "data": data, "context": 0, "tensor": tensor} for data in range(2) for tensor in range(2)
    ]
    assert {place.world_size for place in places} == {shape.world_size}
    assert len({(place.master_address, place.master_port) for place in places}) == 1
    indices = [devices.local_device(place.local_rank).index for place in places]
    assert indices == (
        [0, 1, 0, 1] if visible == "all" else [0, 0, 0, 0]
    )  # a device of its own is device 0 to its task


def test_jobs_and_steps_do_not_share_a_port() -> None:
    """Jobs whose numbers are close may run side by side on a host, and so may the steps of one of them."""
    ports = {
        find_placement(slurm(0, 0, 0, SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))).master_port
        for job in range(41_800, 41_900)
        for step in range(97)
    }
    assert len(ports) == 97 * 100
    assert all(10_000 <= port < 30_000 for port in ports)


def test_lists_of_hosts_and_tasks() -> None:
    assert tasks_per_node("2(x3),1", "X") == [2, 2, 2, 1]
    assert tasks_per_node("8", "X") == [8]
    for nodes, first in {
        "a": "a", "a,b": "a", "gpu[007-009,12]": "gpu007", "n[5,7]": "n5", "rack[2-3]n[01-04,9],gpu7": "rack2n01",
        "a-b[1-3]-ib0,c": "a-b1-ib0", "host.example.org": "host.example.org",
    }.items():  # fmt: skip
        assert first_host(nodes) == first
    for nodes in ("", "[", "a[x]", ",b"):
        with pytest.raises(ConfigError, match="set MASTER_ADDR to the host of rank 0"):
            first_host(nodes)


WRONG = {
    "RANK or WORLD_SIZE": ({"RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "4", **MASTER}, "rank 4 of 4; ranks are numbered"),
    "a negative rank": ({"RANK": "-1", "LOCAL_RANK": "0", "WORLD_SIZE": "4", **MASTER}, "rank -1 of 4; ranks are numbered"),
    "no WORLD_SIZE": ({"RANK": "1", "LOCAL_RANK": "1"}, "WORLD_SIZE: not set, but RANK is 1; set both, or neither"),
    "no RANK": ({"WORLD_SIZE": "2"}, "RANK: not set, but WORLD_SIZE is 2; set both, or neither"),
    "a local rank alone": ({"LOCAL_RANK": "1"}, "RANK: not set, but LOCAL_RANK is 1"),
    "no LOCAL_RANK": ({"RANK": "1", "WORLD_SIZE": "2", **MASTER}, "LOCAL_RANK: not set for rank 1 of 2; set it to"),
    "too high a LOCAL_RANK": (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK: 4, but this host has 4 ranks"),
    "more on the host than in all": (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "9 ranks on this host of 8 in all"),
    "no number": (TORCHRUN | {"RANK": "5a"}, "RANK: '5a' is not a number"),
    "no port": (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT: 70000 is not a port"),
    "no master": (
        {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, "MASTER_ADDR: not set, and the caller's"
    ),
    "mpirun without a host": (open_mpi(2, 0), "give the host of rank 0 by mpirun -x MASTER_ADDR=HOST"),
    "mpiexec without a host": (HYDRA, "give the host of rank 0 by mpiexec -genv MASTER_ADDR HOST"),
    "half of a step": (
        {name: value for name, value in slurm(1, 1, 0).items() if name not in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")},
        "SLURM_NTASKS: not set",
    ),
    "tasks in another form": (
        slurm(1, 1, 0, SLURM_STEP_TASKS_PER_NODE="2*3"), "SLURM_STEP_TASKS_PER_NODE: '2*3' cannot be read"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_contradictions_are_told_in_one_line(name: str) -> None:
    environment, words = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        find_placement(environment)
    (line,) = caught.value.lines
    assert words in line
    assert "\n" not in line
    assert len(line) <= 300


def test_several_ranks_with_too_few_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "num_accelerators", lambda: 3)
    place: Placement = find_placement(TORCHRUN | {"LOCAL_RANK": "3"})
    with pytest.raises(ConfigError, match="rank 3 of this host: only 3 CUDA devices are visible"):
        devices.local_device(place.local_rank)


@pytest.mark.parametrize("environment", [SCRIPT, SHELL], ids=["script", "shell"])
def test_a_script_without_srun_is_told(environment: dict[str, str]) -> None:
    line = forgotten_tasks(environment, find_placement(environment))
    assert line is not None and line.startswith("SLURM_NTASKS is 8, but srun has not started this process")


@pytest.mark.parametrize(
    "environment",
    [{}, SCRIPT | {"SLURM_NTASKS": "1"}, SCRIPT | TORCHRUN, slurm(0, 0, 0)],
    ids=["no job", "one task", "torchrun", "srun"],
)
def test_nothing_is_told_where_ranks_were_started(environment: dict[str, str]) -> None:
    assert forgotten_tasks(environment, find_placement(environment)) is None

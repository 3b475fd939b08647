"""The templates of launchers/ for batch systems, with commands in place of the batch systems that note what they are asked.

tests/system/test_system_slurm.py and its neighbours give the same templates to the real ones.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepspeed.launcher.runner import fetch_hostfile

from overtok_megatron.environment import ALLOCATOR
from overtok_megatron.launching.batch_systems import find_placement

LAUNCHERS = Path(__file__).parent.parent / "launchers"
SHELL = sorted(path for path in LAUNCHERS.iterdir() if path.suffix in (".sh", ".sbatch"))
# what stands for a rank: it notes its variables and arguments, waits where it is told to, and leaves with the code it is told
RANK = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then exec {python} "$@"; fi
trap 'echo "$RANK got USR1" >>{folder}/signals; exit 75' USR1
trap 'echo "$RANK got TERM" >>{folder}/signals; exit 143' TERM
printf '%s\\n' "$*" >{folder}/arguments-${{RANK:-none}}
env -0 >{folder}/rank-${{RANK:-none}}
while [[ -e {folder}/wait ]]; do sleep 0.05; done
exit "$(cat {folder}/code)"
"""


class Stand:
    """A folder with commands that stand for a rank and for batch systems, and what they noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands = folder / "commands"
        self.commands.mkdir()
        self.leave_with(0)
        self.command("rank", RANK.format(folder=folder, python=sys.executable))

    def command(self, name: str, text: str) -> None:
        (self.commands / name).write_text(text, encoding="utf-8")
        (self.commands / name).chmod(0o755)

    def leave_with(self, code: int) -> None:
        (self.folder / "code").write_text(str(code), encoding="utf-8")

    def start(self, *words: object, **variables: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
        environment |= {"PYTHON": str(self.commands / "rank"), "PATH": f"{self.commands}:{os.environ['PATH']}"}
        return subprocess.Popen(
            [str(word) for word in words],
            env=environment | variables,
            cwd=LAUNCHERS.parent,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: object, **variables: str) -> tuple[int, str]:
        process = self.start(*words, **variables)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    def rank(self, number: int) -> dict[str, str]:
        """The environment of a rank."""
        text = (self.folder / f"rank-{number}").read_text(encoding="utf-8")
        return dict(entry.split("=", 1) for entry in text.split("\0") if entry)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 20
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"waited too long for {names}"
            time.sleep(0.02)


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_is_correct(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        sources = ["--external-sources", "--source-path", LAUNCHERS.parent]
        exempt = "--exclude=SC1091"  # a file that is sourced by a path that only running tells
        done = subprocess.run(["shellcheck", "--shell=bash", exempt, *sources, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_ranks_start_with_the_allocator_of_the_package() -> None:
    """glibc reads these when a process starts, so that the entry cannot set them."""
    script = f"source {LAUNCHERS / 'rank_environment.sh'}; env -0"
    shown = subprocess.run(
        ["bash", "-c", script], env={"MALLOC_TOP_PAD_": "1"}, capture_output=True, text=True, check=True
    )
    found = dict(entry.split("=", 1) for entry in shown.stdout.split("\0") if entry)
    assert {name: found[name] for name in ALLOCATOR} == ALLOCATOR | {
        "MALLOC_TOP_PAD_": "1"
    }  # the caller's value is kept
    assert found["PYTHONSAFEPATH"] == "1"


HOSTS = {"HOSTS": "2", "HOST_NUMBER": "1", "RANKS_PER_HOST": "2", "MASTER_ADDR": "first"}


def test_ranks_of_one_host(stand: Stand) -> None:
    stand.leave_with(0)
    assert stand.run(LAUNCHERS / "host.sh", "run.yaml", "training.seed=2", **HOSTS)[0] == 0
    for local_rank, rank in enumerate((2, 3)):
        placement = find_placement(stand.rank(rank))
        assert (placement.rank, placement.local_rank, placement.ranks_of_host) == (rank, local_rank, 2)
        assert (placement.world_size, placement.master_address, placement.master_port) == (4, "first", 29500)
        assert stand.lines(f"arguments-{rank}") == ["-m overtok_megatron.training.entry run.yaml training.seed=2"]
        assert stand.rank(rank)["MALLOC_TOP_PAD_"] == ALLOCATOR["MALLOC_TOP_PAD_"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143)])
def test_ranks_of_one_host_are_asked_to_leave(stand: Stand, number: signal.Signals, code: int) -> None:
    (stand.folder / "wait").touch()
    process = stand.start(LAUNCHERS / "host.sh", "run.yaml", **HOSTS)
    stand.wait_for("rank-2", "rank-3")
    process.send_signal(number)
    assert process.wait(timeout=20) == code
    name = number.name.removeprefix("SIG")
    assert sorted(stand.lines("signals")) == [f"2 got {name}", f"3 got {name}"]


@pytest.mark.parametrize("code", [1, 2, 75])
def test_host_leaves_with_the_code_of_its_ranks(stand: Stand, code: int) -> None:
    stand.leave_with(code)
    assert stand.run(LAUNCHERS / "host.sh", "run.yaml", **HOSTS)[0] == code


def test_host_waits_for_the_ranks_that_go_on_when_one_dies(stand: Stand) -> None:
    (stand.folder / "wait").touch()
    stand.leave_with(3)
    process = stand.start(LAUNCHERS / "host.sh", "run.yaml", **HOSTS)
    stand.wait_for("rank-2", "rank-3")
    (first,) = (pid for pid in children(process.pid) if b"RANK=2\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(first, signal.SIGKILL)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    (stand.folder / "wait").unlink()
    assert process.wait(timeout=20) == 128 + signal.SIGKILL


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_host_refuses_a_bash_that_cannot_tell_which_rank_has_ended(tmp_path: Path) -> None:
    """As in RHEL 8. Such a bash is not at hand, so the script asks for one that is not there yet."""
    text = (LAUNCHERS / "host.sh").read_text(encoding="utf-8")
    assert text.count("< 501") == 1
    script = tmp_path / "host.sh"
    script.write_text(text.replace("< 501", "< 9901"), encoding="utf-8")
    process = subprocess.run(["bash", script, "run.yaml"], capture_output=True, text=True, timeout=20)
    assert process.returncode == 2
    assert process.stderr.startswith("error: host.sh needs bash 5.1 or newer, and ")
    assert process.stderr.count("\n") == 1


def test_host_names_the_variable_that_is_missing(stand: Stand) -> None:
    process = subprocess.run([LAUNCHERS / "host.sh", "run.yaml"], env={"HOSTS": "2"}, capture_output=True, text=True)
    assert process.returncode != 0
    assert "HOST_NUMBER: 0 for the host that MASTER_ADDR names" in process.stderr


SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>{folder}/srun
exec {folder}/commands/rank "$@"
"""
SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>{folder}/scontrol
"""


@pytest.fixture
def slurm(stand: Stand) -> Stand:
    stand.command("srun", SRUN.format(folder=stand.folder))
    stand.command("scontrol", SCONTROL.format(folder=stand.folder))
    return stand


@pytest.mark.parametrize(
    ("code", "starts", "requeued"), [(0, 1, False), (2, 1, False), (143, 1, False), (75, 1, True), (1, 3, False)]
)
def test_what_a_job_of_slurm_does_with_an_exit_code(slurm: Stand, code: int, starts: int, requeued: bool) -> None:
    slurm.leave_with(code)
    left, output = slurm.run("bash", LAUNCHERS / "slurm.sbatch", "run.yaml", SLURM_JOB_ID="7", MAX_RESTARTS="2")
    assert left == code
    assert len(slurm.lines("srun")) == starts
    assert slurm.lines("scontrol") == (["requeue 7"] if requeued else [])
    assert ("job 7 is queued again" in output) == requeued
    assert output.count("started again from its latest checkpoint") == starts - 1


def test_job_of_slurm_passes_sigusr1_on_and_is_queued_again(slurm: Stand) -> None:
    (slurm.folder / "wait").touch()
    process = slurm.start("bash", LAUNCHERS / "slurm.sbatch", "run.yaml", SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="12")
    slurm.wait_for("rank-none")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 75
    assert slurm.lines("signals") == [" got USR1"]
    assert slurm.lines("scontrol") == ["requeue 7"]
    environment = (slurm.folder / "rank-none").read_text(encoding="utf-8").split("\0")
    assert "SRUN_CPUS_PER_TASK=12" in environment
    assert f"MALLOC_TOP_PAD_={ALLOCATOR['MALLOC_TOP_PAD_']}" in environment


def test_job_of_slurm_that_was_asked_before_it_could_save_is_queued_again(slurm: Stand) -> None:
    """A rank that has not yet installed its handler dies of SIGUSR1, and srun then leaves with 138."""
    slurm.command("rank", RANK.format(folder=slurm.folder, python=sys.executable).replace("exit 75", "exit 138"))
    (slurm.folder / "wait").touch()
    process = slurm.start("bash", LAUNCHERS / "slurm.sbatch", "run.yaml", SLURM_JOB_ID="7")
    slurm.wait_for("rank-none")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 138
    assert slurm.lines("scontrol") == ["requeue 7"]
    assert len(slurm.lines("srun")) == 1


def test_mpirun_is_told_the_variables_that_ranks_read(stand: Stand) -> None:
    stand.command("mpirun", f"#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" >{stand.folder}/mpirun\n")
    variables = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "WARN", "DS_ACCELERATOR": "cpu", "UNRELATED": "x"}
    code, _ = stand.run(LAUNCHERS / "mpi.sh", "--host", "a:1,b:1", "--", "run.yaml", "training.seed=2", **variables)
    assert code == 0
    words = stand.lines("mpirun")
    told = {following for word, following in itertools.pairwise(words) if word == "-x"}
    assert {*variables, *ALLOCATOR, "PYTHONSAFEPATH", "PATH"} <= told | {"UNRELATED"}
    assert "UNRELATED" not in told
    assert words[words.index("--host") + 1] == "a:1,b:1"
    assert words[-5:] == [
        str(stand.commands / "rank"),
        "-m",
        "overtok_megatron.training.entry",
        "run.yaml",
        "training.seed=2",
    ]


def test_mpirun_needs_a_configuration(stand: Stand) -> None:
    assert stand.run(LAUNCHERS / "mpi.sh", "--host", "a:1,b:1")[0] == 2
    assert stand.run(LAUNCHERS / "mpi.sh", "--")[0] == 2


@pytest.fixture
def job() -> dict[str, Any]:
    documents = list(yaml.safe_load_all((LAUNCHERS / "kubernetes.yaml").read_text(encoding="utf-8")))
    service, job = documents
    assert service["kind"] == "Service"
    assert service["spec"]["clusterIP"] == "None"  # the word, as Kubernetes wants it
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    return dict(job)


def pod_environment(job: dict[str, Any], index: int) -> dict[str, str]:
    """The variables of a pod's container, with the index that Kubernetes gives it."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    values = {}
    for variable in container["env"]:
        field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        if field is not None:
            assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        values[variable["name"]] = str(index) if field else variable["value"]
    assert all(isinstance(value, str) for value in values.values())
    return values


def test_pods_of_kubernetes_start_all_ranks(job: dict[str, Any], stand: Stand) -> None:
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    pods = spec["completions"]
    assert spec["parallelism"] == pods
    (container,) = spec["template"]["spec"]["containers"]
    assert Path(container["command"][0]).relative_to("/overtok_megatron/launchers") == Path("host.sh")
    ranks = container["resources"]["limits"]["nvidia.com/gpu"]
    for index in range(pods):
        code, _ = stand.run(LAUNCHERS / "host.sh", *container["command"][1:], **pod_environment(job, index))
        assert code == 0
    for rank in range(pods * ranks):
        placement = find_placement(stand.rank(rank))
        assert (placement.rank, placement.world_size) == (rank, pods * ranks)
        assert (placement.local_rank, placement.ranks_of_host) == (rank % ranks, ranks)
        assert (placement.master_address, placement.master_port) == ("overtok-0.overtok", 29500)


def test_kubernetes_is_told_what_the_exit_codes_mean(job: dict[str, Any]) -> None:
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # Kubernetes refuses podFailurePolicy with any other
    actions = {}
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
            assert rule["onExitCodes"]["operator"] == "In"
            actions |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
    assert actions == {2: "FailJob", 75: "Ignore", 143: "Ignore"}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert json.dumps(volumes[mounts["/runs"]]).count("CLAIM") == 1


def test_deepspeed_reads_the_example_of_a_hostfile() -> None:
    assert fetch_hostfile(str(LAUNCHERS / "hostfile.example")) == {"host-1": 8, "host-2": 8}

"""Ranks that are not started by `overtok train`: what the first of them does for all, and the one line of a mistake."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from overtok_megatron.config.loading import load_config
from overtok_megatron.launching.local import ENTRY, free_port
from support.overtok_process import run_overtok
from support.started_ranks import Ended, plain_environment, run_started, slurm_tasks
from support.workspace import Workspace, losses

SHORT = (
    "training.train_iters=2",
    "training.validation_interval=null",
    "checkpoint.interval=null",
    "optimizer.warmup_iters=1",
)


def the_line(ended: list[Ended], code: int = 2) -> str:
    """The only line for the user that the ranks wrote together; all left with `code`, and none with a traceback."""
    assert {one.code for one in ended} == {code}, [one.output for one in ended]
    assert not any("Traceback" in one.output for one in ended), [one.output for one in ended]
    (line,) = [line for one in ended for line in one.errors]
    return line


def test_tasks_of_srun_train_from_a_users_file(workspace: Workspace) -> None:
    """Nobody has made the folder, stored the configuration, or set one of torch's variables."""
    ended = run_started(slurm_tasks(hosts=2, per_host=1), workspace.config("run"), *SHORT, "training.seed=7")
    assert [one.code for one in ended] == [0, 0], [one.output for one in ended]
    run = workspace.scratch / "run"
    assert load_config(run / "config.yaml").config.training.seed == 7
    assert (run / "tokenizer.model").exists()
    assert len(losses(run)) == 2
    assert not list(run.glob(".*")), "locks and tokens are gone"


@pytest.mark.parametrize("started_by", ["srun", "torchrun", "mpirun"])
@pytest.mark.ci
def test_a_run_is_the_same_whoever_starts_it(workspace: Workspace, started_by: str) -> None:
    """Tensor-parallel within a host, data-parallel between two hosts, all of them on this machine."""
    split = "parallel.tensor_parallel_size=2"
    code, output = run_overtok("train", workspace.config("ours"), split, "--processes", 4, env=plain_environment())
    assert code == 0, output
    config = [str(workspace.config("theirs")), split]
    if started_by == "srun":
        ended = run_started(slurm_tasks(hosts=2, per_host=2), *config)
        assert [one.code for one in ended] == [0] * 4, [one.output for one in ended]
    else:
        commands = torchrun(config) if started_by == "torchrun" else mpirun(config)
        started = [subprocess.Popen(command, env=plain_environment()) for command in commands]
        assert [process.wait(timeout=200) for process in started] == [0] * len(commands)
    assert losses(workspace.scratch / "theirs") == losses(workspace.scratch / "ours")


def torchrun(config: list[str]) -> list[list[str]]:
    meet = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    head = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2", *meet]
    return [[*head, "--node_rank", str(host), "-m", ENTRY, *config] for host in range(2)]


def mpirun(config: list[str]) -> list[list[str]]:
    command = shutil.which("mpirun")
    if command is None:
        pytest.skip("mpirun is not installed")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [
        [command, *root, "-n", "4", "--oversubscribe", "--bind-to", "none", sys.executable, "-P", "-m", ENTRY, *config]
    ]


def test_a_mistake_is_told_by_the_first_rank_alone(workspace: Workspace) -> None:
    """The folder cannot be made; all has been read and checked before."""
    (workspace.scratch / "run").write_text("a file")
    line = the_line(run_started(slurm_tasks(hosts=1, per_host=2), workspace.config("run")))
    assert line.startswith("error: training.output_directory: ")
    assert "cannot be written" in line


@pytest.mark.ci
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere.yaml"], "error: nowhere.yaml: no such configuration file"),
        (["CONFIG", "training.train_iters=x"], "error: command line: training.train_iters: 'x'"),
        (["CONFIG", "parallel.tensor_parallel_size=3"], "3; does not divide the 2 ranks"),
        (["CONFIG", "data.train=nowhere/train"], "error: nowhere/train.bin: no such file"),
        (["CONFIG", "training.initial_checkpoint=nowhere"], "error: training.initial_checkpoint: nowhere"),
    ],
)
def test_every_mistake_is_told_once(workspace: Workspace, words: list[str], told: str) -> None:
    config = str(workspace.config("run"))
    ended = run_started(slurm_tasks(hosts=1, per_host=2), *(config if word == "CONFIG" else word for word in words))
    assert told in the_line(ended)
    assert not (workspace.scratch / "run").exists()


def test_a_host_without_the_data_and_the_folder_is_named(workspace: Workspace, tmp_path: Path) -> None:
    """Both hosts are started with the same relative paths, as on machines that share no disk."""
    config = workspace.config("run")
    text = config.read_text().replace(f"{workspace.scratch}/run", "runs/run")
    config.write_text(text.replace(f"{workspace.data}/train", "train"))
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        host.mkdir()
    for path in workspace.data.glob("train.*"):
        shutil.copy(path, hosts[0])
    ended = run_started(slurm_tasks(hosts=2, per_host=1), config, folders=hosts)
    assert [one.code for one in ended] == [2, 2]
    folder, data = ended[0].errors
    assert "training.output_directory: runs/run is another folder on " in folder
    assert "(rank 1); name a folder that all hosts share" in folder
    assert "data.train train: train.json is missing on " in data
    assert "(rank 1); on " in data
    assert not ended[1].errors
    assert "Traceback" not in ended[1].output
    assert not (hosts[1] / "runs").exists()


@pytest.mark.ci
def test_another_configuration_on_one_rank_is_told(workspace: Workspace) -> None:
    config = workspace.config("run")
    other = {1: [config, "optimizer.learning_rate=1e-4"]}
    line = the_line(run_started(slurm_tasks(hosts=1, per_host=2), config, others=other))
    assert "the configuration: optimizer.learning_rate is 0.0001, and 0.003 on the first rank, on " in line
    missing = {1: [workspace.scratch / "gone.yaml"]}
    line = the_line(run_started(slurm_tasks(hosts=1, per_host=2), config, others=missing))
    assert line.endswith("(rank 1): " + f"{workspace.scratch}/gone.yaml: no such configuration file")


@pytest.mark.ci
def test_torchrun_starts_a_job_again_in_which_a_rank_died(workspace: Workspace) -> None:
    """Its static rendezvous keeps one store, in which the first start has left its verdicts and addresses."""
    config, run = workspace.config("run"), workspace.scratch / "run"
    meet = ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--max-restarts", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *meet]
    started = subprocess.run(
        [*torchrun, "-m", "support.dying_entry", config, "training.train_iters=6", "checkpoint.interval=2"],
        env=plain_environment() | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
    )  # fmt: skip
    assert started.returncode == 0, started.stdout
    assert "was ended by SIGKILL, last heard" in started.stdout  # in step 4, or at a beat just before it
    assert "resumed from" in started.stdout
    assert "Gloo" not in started.stdout
    assert [step for step, _, _ in losses(run)] == [1, 2, 3, 4, 5, 6]

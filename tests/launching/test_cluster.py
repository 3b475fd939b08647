"""The hostfile, what is checked before anything starts on its hosts, and what reaches the ranks there."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from overtok_megatron.environment import rank_environment, travelling
from overtok_megatron.errors import ConfigError
from overtok_megatron.launching.cluster import Cluster, Host, check_cluster, cluster_command, read_hostfile
from support.expect_error import command_error
from support.fake_hosts import with_fake_hosts
from support.overtok_process import kill_session, run_overtok, start_overtok, wait_for
from support.started_ranks import plain_environment
from support.workspace import Workspace, losses, records


def test_hosts_are_read_with_their_slots(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the first rack\n\nnode1 slots=8\n  me@node-2.rack   slots=4  # half\n")
    assert read_hostfile(path, None) == (Host("node1", 8), Host("me@node-2.rack", 4))
    hosts = read_hostfile(path, 2)
    assert hosts == (Host("node1", 2), Host("me@node-2.rack", 2))
    assert Cluster(hosts=hosts).world_size == 4
    assert hosts[1].address == "node-2.rack"
    path.write_bytes(b"\xef\xbb\xbfnode1 slots=2\r\n\r\nnode2 slots=2\r\n")  # as editors of Windows write it
    assert read_hostfile(path, None) == (Host("node1", 2), Host("node2", 2))
    path.write_text("localhost slots=3\n")
    assert Cluster(hosts=read_hostfile(path, None)).ranks_here == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("node1\n", "hosts:1: 'node1'; write one line per host, such as node1 slots=8"),
        ("node1 slots=4\nnode2 slots=x\n", "hosts:2: 'node2 slots=x'"),
        ("a slots=2\nb slots=2\na slots=3\n", "hosts:3: a stands in line 1 already"),
        (
            "fe80::1 slots=4\n",
            "hosts:1: 'fe80::1 slots=4'; write one line per host with its name, not an IPv6 address",
        ),
        ("a slots=0\n", "hosts:1: a has slots=0"),
        ("# none\n", "names no host"),
        ("a slots=4\nb slots=1\n", "--processes: 2 per host, but b has slots=1"),
        ("localhost slots=2\nb slots=2\n", "hosts:1: localhost is another host to each of the 2"),
        ("-oProxyCommand=x slots=1\n", "hosts:1: '-oProxyCommand=x slots=1'"),
    ],
)
def test_a_wrong_hostfile_is_told_by_its_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(tmp_path / "hosts", 2)
    assert told in str(caught.value)
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize("words", [("--launcher", "pdsh"), ("--launcher-args", "--partition=gpu")])
def test_words_for_a_launcher_without_a_hostfile_are_not_left_out_silently(
    capsys: pytest.CaptureFixture[str], words: tuple[str, str]
) -> None:
    option = "=".join(words)
    assert f"{words[0]}: {words[1]}; has no effect without --hostfile" in command_error(
        capsys, "train", "x.yaml", option
    )


def test_a_missing_hostfile_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "hosts", None)


def cluster(*names: str, launcher: str = "pdsh") -> Cluster:
    return Cluster(hosts=tuple(Host(name, 1) for name in names), launcher=launcher)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of ranks, on a machine with programs that know all hosts."""
    found = with_fake_hosts(tmp_path / "bin", dict(os.environ))
    monkeypatch.setenv("PATH", found["PATH"])
    return rank_environment(found, 1, deterministic=False, cuda=None)


def test_hosts_that_cannot_serve_are_named(environment: dict[str, str]) -> None:
    check_cluster(cluster("a", "b"), environment)
    for names, told in (
        (
            ("a", "dead"),
            r"--hostfile: dead is not reached by ssh \(ssh: connect to host dead port 22: No route to host\)",
        ),
        (("bare", "a", "dead"), r"bare cannot run the same Python \(sh: 1: python: not found\).*may hold for dead$"),
    ):
        with pytest.raises(ConfigError, match=told) as caught:
            check_cluster(cluster(*names), environment)
        assert len(caught.value.lines) == 1
    with pytest.raises(ConfigError, match="--launcher slurm: srun is not installed here"):
        check_cluster(cluster("a", launcher="slurm"), environment | {"PATH": ""})


def test_names_of_devices_do_not_travel(environment: dict[str, str]) -> None:
    own = rank_environment(environment | {"CUDA_VISIBLE_DEVICES": "GPU-0a1b"}, 1, deterministic=False, cuda=None)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES: GPU-0a1b names devices of this host alone"):
        check_cluster(cluster("a", "b"), own)


def test_what_libraries_read_travels_and_nothing_else() -> None:
    caller = {
        "GLOO_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "INFO", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0,1", "HF_TOKEN": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret", "SLURM_PROCID": "3", "RANK": "5", "HOME": "/root",
    }  # fmt: skip
    found = travelling(rank_environment(caller, 2, deterministic=True, cuda=None))
    for name in (
        "GLOO_SOCKET_IFNAME",
        "NCCL_DEBUG",
        "PATH",
        "MALLOC_MMAP_THRESHOLD_",
        "PYTHONSAFEPATH",
        "GOMP_SPINCOUNT",
    ):
        assert name in found
    assert found["OVERTOK_CUDA_VISIBLE_DEVICES"] == "0,1"
    assert found["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert found["PYTHONPATH"] == ""
    assert "DS_ACCELERATOR" not in found
    assert (
        not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SLURM_PROCID", "RANK", "HOME", "CUDA_VISIBLE_DEVICES"} & found.keys()
    )


def test_each_launcher_is_given_what_it_needs(environment: dict[str, str]) -> None:
    commands = {}
    for launcher in ("pdsh", "openmpi", "mpich", "slurm"):
        with cluster_command(
            cluster("localhost", launcher=launcher), "a.module", ["x"], dict(environment), 4321
        ) as command:
            commands[launcher] = " ".join(command)
    for launcher, command in commands.items():
        assert f"--launcher {launcher} " in command
        assert "--force_multi" in command  # also one host may be another one than this
        assert "--master_addr localhost" in command
        assert command.endswith("--module a.module x") or launcher == "slurm"
    assert "-x MASTER_ADDR=localhost -x MASTER_PORT=4321" in commands["openmpi"]
    assert commands["slurm"].endswith(f"{Path(__file__).parents[2]}/a/module.py x")


def test_values_reach_the_hosts_as_they_are(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through DeepSpeed's launcher and two shells, with all the characters that mean something to them."""
    odd = "a \"b\" $HOME `id` \\ 'c' %n 100% ; & | * #"
    package = tmp_path / "site"
    package.mkdir()
    (package / "probe_values.py").write_text(
        "import os, sys\n"
        "print('PROBE', os.environ['RANK'], repr(os.environ['NCCL_ODD']), repr(sys.argv[-1]), os.environ['OWN'],"
        " os.environ['PYTHONPATH'])\n"
    )
    (tmp_path / ".deepspeed_env").write_text("OWN=from-the-users-file\n")
    monkeypatch.chdir(tmp_path)
    environment |= {"NCCL_ODD": odd, "PYTHONPATH": str(package), "DS_ACCELERATOR": "cpu"}
    argument = "a $b `c` %h's"
    with cluster_command(cluster("node-a", "node-b"), "probe_values", [argument], environment, None) as command:
        variables = Path(environment["DS_ENV_FILE"])
        assert variables.is_file()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert not variables.exists()
    assert done.returncode == 0, done.stdout + done.stderr
    told = sorted(line.partition("PROBE ")[2] for line in done.stdout.splitlines() if "PROBE" in line)
    assert told == [f"{rank} {odd!r} {argument!r} from-the-users-file {package}" for rank in range(2)]


@pytest.mark.ci
def test_two_hosts_train_as_one(workspace: Workspace, tmp_path: Path) -> None:
    """TP 2 within a host and DP 2 across."""
    environment = with_fake_hosts(tmp_path / "bin", plain_environment())
    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=2\nnode-b slots=2\n")
    split = "parallel.tensor_parallel_size=2"
    code, output = run_overtok("train", workspace.config("one"), split, "--processes", 4, env=environment)
    assert code == 0, output
    code, output = run_overtok("train", workspace.config("two"), split, "--hostfile", hosts, env=environment)
    assert code == 0, output
    assert losses(workspace.scratch / "two") == losses(workspace.scratch / "one")


@pytest.mark.ci
def test_two_hosts_save_when_the_command_is_asked_to_stop(workspace: Workspace, tmp_path: Path) -> None:
    """SIGTERM reaches the first rank on its host, and all ranks by it."""
    environment = with_fake_hosts(tmp_path / "bin", plain_environment())
    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    process = start_overtok(
        "train", workspace.config("long"), "training.train_iters=100000", "--hostfile", hosts, env=environment
    )  # fmt: skip
    try:
        wait_for(lambda: len(records(workspace.scratch / "long")) > 3, process)
        os.kill(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 128 + signal.SIGTERM, output
    finally:
        kill_session(process)
    assert (workspace.scratch / "long" / "checkpoints" / "latest").exists()

"""Whole runs over two hosts: network namespaces, each with an sshd. The losses are those of one host, to the last bit."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overtok_megatron.config.loading import load_config, save_resolved
from support.overtok_process import run_overtok
from support.two_hosts import INTERFACE, TwoHosts, reason_to_skip, two_hosts
from support.workspace import Workspace, losses

ENTRY = "overtok_megatron.training.entry"
FP32 = (
    "training.precision=fp32",
    "over_encoding.row_dtype=float32",
    "over_encoding.state_dtype=float32",
    "training.num_threads=1",  # two threads may sum in another order, and one host has fewer cores for each rank
    "checkpoint.interval=6",
)
TENSOR_INSIDE = ("parallel.tensor_parallel_size=2",)  # and the data axis across
Reported = tuple[float, float, float | None]
PIPELINE_ACROSS = ("parallel.pipeline_parallel_size=2",)

pytestmark = [
    pytest.mark.ci,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(reason := reason_to_skip("pdsh")), reason=reason or ""),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


def resolved(workspace: Workspace, name: str, *overrides: str) -> Path:
    config = load_config(str(workspace.config(name)), [*FP32, *overrides]).config
    folder = Path(config.training.output_directory)
    folder.mkdir()
    save_resolved(config, folder / "config.yaml")
    return folder / "config.yaml"


def by_pdsh(hosts: TwoHosts, config: Path, ranks: int) -> str:
    environment = config.parent.parent / ".deepspeed_env"
    environment.write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nDS_ACCELERATOR=cpu\n")
    hostfile = hosts.hostfile(config.parent.parent / "hostfile", ranks // 2)
    launcher = Path(sys.executable).parent / "deepspeed"
    return hosts.alpha.check(
        launcher, "--hostfile", hostfile, "--module", ENTRY, config, env=os.environ | {"DS_ENV_FILE": str(environment)}
    )


def by_torchrun(hosts: TwoHosts, config: Path, ranks: int) -> str:
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={ranks // 2}"]
    words += [f"--master-addr={hosts.alpha.address}", "--master-port=29500", "-m", ENTRY, str(config)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE}
    started = [
        host.start(*words[:5], f"--node-rank={number}", *words[5:], env=environment)
        for number, host in enumerate(hosts)
    ]
    outputs = [process.communicate(timeout=150)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    return "\n".join(outputs)


@pytest.fixture(scope="module")
def one_host(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Reported]]:
    """What one host reports, by the number of its ranks: one, and those of the two layouts."""
    workspace = Workspace(data_folder, tmp_path_factory.mktemp("one"))
    reported = {}
    for ranks, layout in ((1, ()), (2, PIPELINE_ACROSS), (4, TENSOR_INSIDE)):
        config = workspace.config(f"ranks_{ranks}")
        code, output = run_overtok("train", config, "--processes", ranks, *FP32, *layout)
        assert code == 0, output
        reported[ranks] = losses(workspace.scratch / f"ranks_{ranks}")
    return reported


@pytest.mark.parametrize("start", [by_pdsh, by_torchrun])
@pytest.mark.parametrize(("layout", "ranks"), [(TENSOR_INSIDE, 4), (PIPELINE_ACROSS, 2)])
def test_two_hosts_report_the_losses_of_one(
    hosts: TwoHosts,
    workspace: Workspace,
    one_host: dict[int, list[Reported]],
    start: Callable[[TwoHosts, Path, int], str],
    layout: tuple[str, ...],
    ranks: int,
) -> None:
    start(hosts, resolved(workspace, "two", *layout), ranks)
    found = losses(workspace.scratch / "two")
    assert found == one_host[ranks]  # of the same layout
    for (_, loss, validation), (_, wanted, wanted_validation) in zip(found, one_host[1], strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert validation == (None if wanted_validation is None else pytest.approx(wanted_validation, rel=1e-5))

"""Two hosts that differ in what a run needs: the run ends at its start, and the host is named once."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import overtok_megatron
from support.host_runs import PIPELINE_ACROSS, SETTINGS, finish, start_host_scripts
from support.namespaces import TwoHosts, reason_to_skip, two_hosts
from support.workspace import Workspace

pytestmark = [
    pytest.mark.ci,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(reason := reason_to_skip()), reason=reason or ""),
]


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """New ones for each test: what is mounted on a host stays there."""
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


def refusal(hosts: TwoHosts, workspace: Workspace) -> list[str]:
    """The lines with which both hosts refuse to train, with exit code 2 and within a minute."""
    ranks, overrides = PIPELINE_ACROSS
    began = time.monotonic()
    output = finish(start_host_scripts(hosts, [str(workspace.config("run")), *SETTINGS, *overrides], ranks), 2)
    assert time.monotonic() - began < 60
    return [line for line in output.splitlines() if line.startswith("error")]


def test_a_host_without_the_data(hosts: TwoHosts, workspace: Workspace) -> None:
    hosts.beta.check("mount", "-t", "tmpfs", "tmpfs", workspace.data)
    lines = refusal(hosts, workspace)
    assert [line.split()[1] for line in lines] == ["data.train", "data.validation", "tokenizer.path"]
    assert all("missing on beta (rank 1)" in line for line in lines)


def test_a_host_with_another_version(hosts: TwoHosts, workspace: Workspace) -> None:
    package = Path(overtok_megatron.__file__)
    other = workspace.scratch / "other_version.py"
    other.write_text(package.read_text().replace(overtok_megatron.__version__, "0.0.1"), encoding="utf-8")
    hosts.beta.check("mount", "--bind", other, package)
    (line,) = refusal(hosts, workspace)
    assert "beta" in line
    assert "0.0.1" in line


def test_an_output_folder_that_is_not_shared(hosts: TwoHosts, workspace: Workspace) -> None:
    run = workspace.scratch / "run"
    run.mkdir()
    hosts.beta.check("mount", "-t", "tmpfs", "tmpfs", run)
    (line,) = refusal(hosts, workspace)
    assert "beta" in line
    assert "training.output_directory" in line

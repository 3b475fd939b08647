"""`overtok config --write`: a resolved run for a world that is not here."""

import pytest

from overtok_megatron.cli import main
from overtok_megatron.config.loading import load_config
from support.expect_error import command_error
from support.workspace import Workspace

OVERRIDES = ("parallel.tensor_parallel_size=4", "training.global_batch_size=4096", "training.seed=5")


def test_a_run_is_written_for_many_ranks(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    config, target = str(workspace.config("run")), workspace.scratch / "resolved.yaml"
    override = [*OVERRIDES, "model.num_attention_heads=4"]
    assert main(["config", config, *override, "--world-size", "512", "--write", str(target)]) == 0
    assert "512 = 128 data x 4 tensor" in capsys.readouterr().out
    assert load_config(target).config == load_config(config, override).config
    assert not (workspace.scratch / "run").exists()


def test_what_cannot_run_is_not_written(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    config, target = str(workspace.config("run")), workspace.scratch / "resolved.yaml"
    words = ("config", config, "--world-size", "6", "--write")
    assert "training.global_batch_size: 16" in command_error(capsys, *words, target)
    words = ("config", config, "--world-size", "2", "--write")
    target.write_text("mine: 1\n")
    assert "name another --write" in command_error(capsys, *words, target)
    assert target.read_text() == "mine: 1\n"
    assert "is an input" in command_error(capsys, *words, config)
    nowhere = workspace.scratch / "no" / "where.yaml"
    assert f"--write {nowhere}: cannot be written" in command_error(capsys, *words, nowhere)

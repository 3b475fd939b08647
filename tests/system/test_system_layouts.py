"""Whole runs through the command: one run goes from layout to layout; SIGTERM saves and leaves; traces name collectives."""

import json
import os
import signal
from pathlib import Path

import pytest

from overtok_megatron.cli import main
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from support.overtok_process import kill_session, ranks_of, run_overtok, start_overtok, wait_for
from support.workspace import Workspace, losses, records

STEPS = 40  # enough to be stopped on the way
FP32 = (
    "training.precision=fp32",
    "over_encoding.row_dtype=float32",
    "over_encoding.state_dtype=float32",
    "checkpoint.incremental=2",
    "checkpoint.interval=1",
    f"training.train_iters={STEPS}",
)


def train(workspace: Workspace, name: str, ranks: int, *overrides: str) -> str:
    config = str(workspace.config(name))
    code, output = run_overtok("train", config, "--processes", str(ranks), *FP32, *overrides)
    assert code == 0, output
    return output


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_one_run_through_many_layouts(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    train(workspace, "whole", 1)
    expected = losses(workspace.scratch / "whole")
    run = workspace.scratch / "moved"
    layouts = [
        (2, ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")),
        (2, ("parallel.pipeline_parallel_size=2",)),
        (1, ("parallel.zero_stage=3",)),
        (2, ("parallel.context_parallel_size=2", "parallel.zero_stage=0")),
    ]
    for turn, (ranks, overrides) in enumerate(layouts):
        stop = 10 * (turn + 1)
        run_until(workspace, run, ranks, stop, *overrides)
        if turn == 1:
            assert main(("checkpoint", "inspect", str(run))) == 0
            shown = capsys.readouterr().out
            assert "2 pipeline x 1 data x 1 context x 1 tensor, ZeRO 1" in shown
            assert " 0 files" not in shown  # DeepSpeed's scripts lie beside the folders
            assert main(("checkpoint", "reshape", str(run))) == 0
            assert main(("checkpoint", "inspect", str(run))) == 0
            assert "written anew" in capsys.readouterr().out
    found = losses(run)
    assert [step for step, *_ in found] == list(range(1, STEPS + 1))
    for (_, loss, validation), (_, wanted, wanted_validation) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert validation == (None if wanted_validation is None else pytest.approx(wanted_validation, rel=1e-5))
    assert main(("checkpoint", "verify", str(run))) == 0
    assert main(("checkpoint", "prune", str(run), "--keep-last", "1")) == 0
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == [f"step_{STEPS:08d}"]
    assert main(("generate", str(run), "--prompt", "The", "--max-new-tokens", "2")) == 0


@pytest.mark.slow  # the layouts of tests/training have the same in fewer processes
def test_every_stage_of_a_pipeline_tells_documents_apart(workspace: Workspace) -> None:
    """Sentences as documents, of which a sample has several; the middle stage needs the tokens for nothing else."""
    tokenizer = load_tokenizer("sentencepiece", workspace.data / "tokenizer.model")
    sets = workspace.scratch / "sentences", workspace.scratch / "unseen"
    for prefix, speech in zip(sets, sotu_files(), strict=False):
        prepare([speech], prefix, tokenizer, separator=". ")
    overrides = (
        f"data.train={sets[0]}",
        f"data.validation={sets[1]}",
        "data.document_attention=within",
        "data.seq_length=128",
        "model.num_layers=3",
        "training.train_iters=6",
        "training.validation_interval=3",
        "checkpoint.interval=6",
    )
    train(workspace, "whole", 1, *overrides)
    train(workspace, "stages", 3, *overrides, "parallel.pipeline_parallel_size=3")
    found, expected = (losses(workspace.scratch / name) for name in ("stages", "whole"))
    assert [step for step, *_ in found] == list(range(1, 7))
    for (_, loss, validation), (_, wanted, wanted_validation) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert validation == (None if wanted_validation is None else pytest.approx(wanted_validation, rel=1e-5))


def run_until(workspace: Workspace, run: Path, ranks: int, stop: int, *overrides: str) -> None:
    """Train until at least step `stop` is reported, then ask to stop; to the end where that is the last step."""
    command = ("train", str(workspace.config(run.name)), "--processes", str(ranks), *FP32, *overrides)
    process = start_overtok(*command)
    if stop < STEPS:
        wait_for(lambda: len(records(run)) >= stop, process)
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    kill_session(process)
    if stop < STEPS:
        assert process.returncode != 0, output
        assert "asked to stop" in output, output
        saved = int((run / "checkpoints" / "latest").read_text().removeprefix("step_"))
        assert stop <= saved <= len(records(run))
    else:
        assert process.returncode == 0, output


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_sigterm_of_one_rank_saves_what_was_done(workspace: Workspace) -> None:
    train(workspace, "whole", 2)
    run = workspace.scratch / "stopped"
    command = ("train", str(workspace.config("stopped")), "--processes", "2", *FP32, "checkpoint.interval=100")
    process = start_overtok(*command)
    wait_for(lambda: len(records(run)) >= 3, process)
    os.kill(ranks_of(process)[-1], signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    kill_session(process)
    assert "asked to stop" in output
    code, output = run_overtok(*command)
    assert code == 0, output
    assert "resumed from" in output
    assert losses(run) == losses(workspace.scratch / "whole")


@pytest.mark.ci
def test_a_trace_names_every_collective(workspace: Workspace) -> None:
    train(
        workspace,
        "traced",
        2,
        "parallel.tensor_parallel_size=2",
        "logging.trace_steps=[2,3]",
        "training.train_iters=5",  # tokens are broadcast two steps ahead
        "logging.trace_ranks=[1]",
    )
    (trace,) = (workspace.scratch / "traced" / "traces").iterdir()
    assert trace.name == "step_00000002-rank_1.json"
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    for name in (
        "tensor: all-reduce",
        "tables: all-to-all of rows",
        "tables: all-to-all of gradients",
        "batch: broadcast of tokens",
    ):
        assert name in names

"""Studies from the command line, with real runs of a very small model: finished, repeated, killed, failed."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from overtok_megatron.checkpoint.store import CheckpointStore
from overtok_megatron.cli import main
from overtok_megatron.run_lock import hold
from overtok_megatron.studies.results import read_results
from support.overtok_process import kill_session, run_overtok, start_overtok, wait_for
from support.study_cases import STUDY, write_study

pytestmark = pytest.mark.timeout(480)  # half a minute each on an idle machine; starts of runs suffer most from load

FAILING = STUDY.replace("variants:\n", "variants:\n  odd: [model.num_attention_heads=3]\n")
LONG = """
base: ../base.yaml
question: Does it go on?
corpus: {name: some, text: texts}
overrides: [training.train_iters=60, training.validation_interval=60, checkpoint.interval=5]
variants: {over-encoded: [over_encoding.enabled=true, over_encoding.table_rows=4 x V]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_cells_and_a_failing_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The failing cell comes first and is named at the end; the others are recorded, and skipped from then on."""
    path = write_study(folder, FAILING)
    assert main(["study", str(path)]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("error: odd, seed 1234: ")
    assert "model.num_attention_heads: 3" in err.splitlines()[-1]
    lines = [json.loads(line) for line in (folder / path).with_suffix(".jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["plain", "over-encoded"]
    for line in lines:
        assert [step for step, _ in line["validation"][""]] == [3, 6]
        assert [step for step, _ in line["train"]] == [1, 2, 3, 4, 5, 6]
        assert (line["steps"], line["tokens"], line["seed"], line["processes"]) == (6, 6 * 4 * 8, 1234, 1)
        assert line["processor"] and line["torch"]
    assert lines[0]["touched"] == [] and lines[0]["parameters"]["tables"] == 0
    assert [step for step, _ in lines[1]["touched"]] == [3, 6] and lines[1]["parameters"]["tables"] > 0
    assert "Not finished: odd, seed 1234." in out
    for kind in ("curves", "differences", "speedup", "touched"):
        assert (folder / path).with_name(f"tiny-{kind}.png").is_file()

    write_study(folder, STUDY.replace("pictures:", "keep_checkpoints: true\npictures:"))
    assert main(["study", str(path), "--list"]) == 0
    assert capsys.readouterr().out.count("finished") == 2
    shutil.rmtree(folder / "runs" / "studies" / "tiny")  # as in a fresh clone: the lines are all that is known
    assert main(["study", str(path)]) == 0
    assert "trains" not in capsys.readouterr().out
    assert not list((folder / "runs" / "studies").glob("tiny/*-*"))
    assert main(["study", str(path), "--test"]) == 0
    assert "holds no checkpoint; the test set is not read" in capsys.readouterr().out

    with hold(Path("runs/studies/tiny"), "a test"):
        assert main(["study", str(path)]) == 2
    assert "in use by process" in capsys.readouterr().err

    changed = write_study(folder, STUDY.replace("=sum]", "=scaled]"), "changed")
    assert main(["study", str(changed), "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")] == ["to", "to"]
    assert main(["study", str(changed), "--report"]) == 0
    assert "No cell is finished yet." in capsys.readouterr().out


@pytest.mark.ci
def test_killed_it_goes_on_from_its_checkpoint_and_reads_the_test_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(folder, LONG)

    def checkpoint() -> Path | None:
        runs = [run for run in (folder / "runs" / "studies" / "tiny").glob("over-encoded*") if run.is_dir()]
        return CheckpointStore(runs[0]).latest() if runs else None

    first = start_overtok("study", path, cwd=folder)
    wait_for(lambda: checkpoint() is not None, first)
    kill_session(first)
    found = checkpoint()
    assert found is not None
    assert not (folder / path).with_suffix(".jsonl").exists()
    code, output = run_overtok("study", path, cwd=folder)
    assert code == 0, output
    assert "resumed from " in (found.parent.parent / "train.log").read_text(), "it began anew"
    (line,) = (json.loads(text) for text in (folder / path).with_suffix(".jsonl").read_text().splitlines())
    assert line["steps"] == 60 and line["train"][-1][0] == 60
    assert main(["study", str(path), "--test"]) == 0
    told = capsys.readouterr().out
    assert "over-encoded, seed 1234: test " in told
    test = read_results((folder / path).with_suffix(".jsonl"))[line["fingerprint"]].test
    assert test is not None and f"{test:.4f}"[:5] in told
    assert main(["study", str(path), "--test"]) == 0
    assert "test 5" not in capsys.readouterr().out


@pytest.mark.ci
def test_a_signal_stops_the_run_and_the_study(folder: Path) -> None:
    path = write_study(folder, LONG)
    log = folder / "runs" / "studies" / "tiny" / "logs"
    process = start_overtok("study", path, cwd=folder)
    wait_for(lambda: any("step" in file.read_text() for file in log.glob("*.log")), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    kill_session(process)
    assert process.returncode == 143, output
    assert not (folder / path).with_suffix(".jsonl").exists()
    assert "Not finished: over-encoded, seed 1234." in output

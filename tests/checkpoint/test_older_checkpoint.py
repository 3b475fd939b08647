"""A run that commit 99c80d8 wrote is read by today's code: verified, resumed, evaluated, continued and exported as it was then.

The fixture's README.md says how the run was made. Bytes and hashes have to be equal on every machine. Processors differ in
the last bits of sums, so losses are compared to a tolerance; on the processor that wrote the fixture no bit differs.
"""

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from overtok_megatron.cli import main
from overtok_megatron.training import entry
from support.distributed_harness import run_ranks
from support.workspace import records

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint_99c80d8"
RECORDED: dict[str, Any] = json.loads((FIXTURE / "recorded.json").read_text(encoding="utf-8"))
CHECKPOINTS = ("run/checkpoints/step_00000002", "run/checkpoints/step_00000003")  # a full one, and an increment on it
LAST = "run/checkpoints/step_00000005"
ONE_RANK = {"tensor_parallel_size": 1, "sequence_parallel": False}


@pytest.fixture
def older_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder from which the commands of commit 99c80d8 were given, as the current folder."""
    folder = tmp_path / "older"
    shutil.copytree(FIXTURE, folder)
    with tarfile.open(folder / "run.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    monkeypatch.chdir(folder)
    return folder


def test_its_checkpoints_are_whole(older_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in CHECKPOINTS:
        assert main(("checkpoint", "verify", checkpoint)) == 0
    capsys.readouterr()
    assert main(("checkpoint", "inspect", "run")) == 0
    printed = capsys.readouterr().out
    for words in (CHECKPOINTS[-1], "3 (12 samples)", "2 tensor, ZeRO 1", "7,888", "6,292"):
        assert words in printed


def resume(folder: Path, config: str) -> int:
    """One rank's work: continue the run in the configuration's output folder; the exit code."""
    os.chdir(folder)
    return entry.main([config])


@pytest.mark.parametrize(
    ("ranks", "parallel", "tolerance"),
    [
        pytest.param(2, {}, 1e-6, id="same layout"),
        pytest.param(1, ONE_RANK, 1e-5, id="one rank"),
    ],
)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(
    older_run: Path, ranks: int, parallel: dict[str, Any], tolerance: float
) -> None:
    changes = {"base": "config.yaml", "training": {"train_iters": 5}, "parallel": parallel}
    Path("resumed.yaml").write_text(json.dumps(changes), encoding="utf-8")
    assert run_ranks(ranks, resume, older_run, "resumed.yaml") == [0] * ranks
    steps = records(Path("run"))
    assert len(steps) == len(RECORDED["uninterrupted_run"])
    for step, recorded in zip(steps, RECORDED["uninterrupted_run"], strict=True):
        assert {name: step.get(name) for name in recorded} == pytest.approx(recorded, rel=tolerance)
    assert "resumed from run/checkpoints/step_00000003" in Path("run/train.log").read_text(encoding="utf-8")
    assert main(("checkpoint", "verify", LAST)) == 0


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_its_validation_loss(older_run: Path, capsys: pytest.CaptureFixture[str], checkpoint: str) -> None:
    assert main(("evaluate", checkpoint, "--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    (score,) = answer["sets"]
    assert score["loss"] == pytest.approx(RECORDED["evaluated_loss"][str(answer["step"])], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"), [("greedy", ()), ("sampled", ("--temperature", "1", "--seed", "3"))], ids=["greedy", "sampled"]
)
def test_its_continuations(
    older_run: Path, capsys: pytest.CaptureFixture[str], kind: str, options: tuple[str, ...]
) -> None:
    prompts = ("--prompt", "We are", "--prompt", "the living", "--max-new-tokens", "10")
    assert main(("generate", "run", *prompts, *options)) == 0
    assert capsys.readouterr().out.splitlines() == RECORDED["generated"][kind]


def test_its_exported_weights(older_run: Path) -> None:
    assert main(("export", "run", "--output", "exported", "--no-check")) == 0
    exported = {}
    for path in sorted(Path("exported").glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            digest = hashlib.sha256(tensor.tobytes()).hexdigest()
            exported[f"{path.stem}/{name}"] = f"{tensor.dtype} {list(tensor.shape)} {digest[:16]}"
    assert exported == RECORDED["exported"]


@pytest.mark.parametrize("name", ["train", "validation"])
def test_its_datasets_are_prepared_alike(older_run: Path, name: str) -> None:
    words = ("prepare", f"{name}.txt", "--separator", r"\n\n", "--tokenizer", "tokenizer.json", "--workers", "1")
    assert main((*words, "--output", f"again/{name}")) == 0
    for suffix in (".bin", ".idx"):
        assert Path(f"again/{name}{suffix}").read_bytes() == Path(f"data/{name}{suffix}").read_bytes()
    older, today = (json.loads(Path(f"{folder}/{name}.json").read_text()) for folder in ("data", "again"))
    assert {key: today[key] for key in older} == older

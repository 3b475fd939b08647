"""`overtok evaluate` gives the loss that the trainer printed, and every token's loss by the plain formula."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from overtok_megatron.cli import main
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.evaluation import harness
from overtok_megatron.evaluation.perplexity import score_json, score_set, score_table, windows_at_once
from support.dataset_factory import write_dataset
from support.trained_runs import CONTEXT, TrainedRuns


def last_record(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("storage", "batch"), [("device", "8"), ("host", "3"), ("mapped", "64")])
def test_the_trainers_validation_loss(
    trained_runs: TrainedRuns, capsys: pytest.CaptureFixture[str], precision: str, storage: str, batch: str
) -> None:
    run = trained_runs.run(precision)
    assert main(("evaluate", str(run), "--json", "--storage", storage, "--batch-size", batch)) == 0
    (score,) = json.loads(capsys.readouterr().out)["sets"]
    record = last_record(run)
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert score[name] == pytest.approx(record[f"validation/{name}"], rel=1e-5), name
    assert score["data"] == str(trained_runs.folder / "validation")


@torch.no_grad()
def test_every_token_is_scored_once(trained_runs: TrainedRuns) -> None:
    trained = trained_runs.trained()
    dataset = IndexedDataset(trained_runs.folder / "other")
    stream = torch.from_numpy(dataset.tokens(0, dataset.num_tokens))
    total = 0.0
    for begin in range(0, len(stream) - 1, CONTEXT):
        window = stream[begin : begin + CONTEXT + 1].unsqueeze(0)
        fetched = trained.fetch_rows(window[:, :-1])
        logits = trained.model.logits(window[:, :-1], fetched)[0]
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    score = score_set(trained, str(trained_runs.folder / "other"), 5)
    assert score.tokens == len(stream) - 1
    assert score.loss == pytest.approx(total / score.tokens, rel=1e-5)
    text_bytes = sum(len(trained.tokenizer.decode(part).encode()) for part in documents(stream.tolist()))
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / text_bytes, rel=1e-5)


@pytest.mark.parametrize(("tokens", "fed"), [(20, 19), (CONTEXT + 1, CONTEXT), (CONTEXT + 20, 2 * CONTEXT)])
def test_a_small_set_costs_its_own_tokens(
    trained_runs: TrainedRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, fed: int
) -> None:
    """No window is empty, and a set shorter than a window is not padded to one; the loss is that of the plain formula."""
    trained = trained_runs.trained()
    stream = IndexedDataset(trained_runs.folder / "other").tokens(0, tokens)
    write_dataset(tmp_path / "set", [stream.tolist()], trained.tokenizer.vocab_size, trained.tokenizer.fingerprint())
    seen, forward = [], trained.model.forward

    def counted(inputs: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        seen.append(inputs.numel())
        return forward(inputs, *others)

    monkeypatch.setattr(trained.model, "forward", counted)
    score = score_set(trained, str(tmp_path / "set"))
    assert sum(seen) == fed
    alone = score_set(trained, str(tmp_path / "set"), 1)
    assert score.loss == pytest.approx(alone.loss, rel=1e-6)
    assert score.tokens == alone.tokens == tokens - 1


def test_long_contexts_have_few_windows_at_once() -> None:
    assert [windows_at_once(length) for length in (64, 1024, 2048, 8192, 16_384, 131_072)] == [16, 16, 8, 2, 1, 1]


def documents(tokens: list[int]) -> list[list[int]]:
    ends = [place for place, token in enumerate(tokens) if token == 0]
    return [tokens[begin:end] for begin, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def test_a_set_whose_text_is_not_known(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    for kind in ("bin", "idx"):
        (tmp_path / f"set.{kind}").symlink_to(trained_runs.folder / f"other.{kind}")
    manifest = json.loads((trained_runs.folder / "other.json").read_text())
    (tmp_path / "set.json").write_text(json.dumps({**manifest, "source_bytes": 0}))
    score = score_set(trained_runs.trained(), str(tmp_path / "set"), 5)
    assert score.bits_per_byte is None
    assert score_table([score]).endswith("  unknown")
    assert json.loads(score_json([score], 3))["sets"][0]["bits_per_byte"] is None


def test_several_sets_as_a_table(trained_runs: TrainedRuns, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(trained_runs.folder / name) for name in ("validation", "other")]
    assert main(("evaluate", str(trained_runs.run("fp32")), "--data", names[0], "--data", names[1])) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["set", "tokens", "bytes", "loss", "perplexity", "bits/byte"]
    assert [row.split()[0] for row in rows] == names


def test_sets_that_do_not_fit(
    trained_runs: TrainedRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_tasks = partial(harness.TaskManager, include_defaults=False)  # lm-eval's thousands take seconds to look through
    monkeypatch.setattr(harness, "TaskManager", lambda include_path, **_: own_tasks(include_path=include_path))

    def line(*arguments: str) -> str:
        assert main(("evaluate", str(trained_runs.run("fp32")), *arguments)) == 2
        return capsys.readouterr().err.removesuffix("\n")

    text = tmp_path / "text.txt"
    text.write_text("of the people, by the people, for the people. " * 30)
    train_sentencepiece([text], 300, tmp_path / "tokenizer.model")
    prepare([text], tmp_path / "foreign", load_tokenizer("sentencepiece", tmp_path / "tokenizer.model"))
    for arguments, part in (
        (("--data", str(tmp_path / "nothing")), "nothing.bin: no such file"),
        (("--data", str(tmp_path / "foreign")), "was prepared with another tokenizer"),
        (("--data", "x", "--tasks", "lambada"), "give one of the two"),
        (("--tasks", "no_such_task"), "task no_such_task: not known"),
        (("--tasks", "lambada", "--include-path", str(tmp_path / "absent")), "absent: no such folder"),
    ):
        message = line(*arguments)
        assert part in message
        assert "\n" not in message.split("error: ")[-1]

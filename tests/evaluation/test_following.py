"""`overtok evaluate --follow`: each checkpoint once, as it appears, with the figures of a look at it alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from overtok_megatron.checkpoint.store import CheckpointStore, find_checkpoint, read_manifest
from overtok_megatron.cli import main
from overtok_megatron.config.loading import save_resolved
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.evaluation.following import follow
from overtok_megatron.run_folder import RunFolder
from support.trained_runs import TrainedRuns


class Growing:
    """A run whose checkpoints appear when asked; all hold the weights of its last."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.run = folder
        folder.mkdir()
        self._source = find_checkpoint(source)
        save_resolved(RunConfig.model_validate(read_manifest(self._source).config), folder / "config.yaml")
        self._store = CheckpointStore(folder)

    def save(self, step: int, **training: int | None) -> Path:
        shutil.copytree(self._source, self._store.partial(step))
        manifest = read_manifest(self._source)
        config = manifest.config | {"training": manifest.config["training"] | training}
        return self._store.publish(replace(manifest, step=step, config=config))


@pytest.fixture
def growing(trained_runs: TrainedRuns, tmp_path: Path) -> Growing:
    return Growing(trained_runs.run("fp32"), tmp_path / "run")


def lines(run: Path) -> list[dict[str, object]]:
    return RunFolder(run).read_evaluations()


def test_checkpoints_are_scored_as_they_appear(growing: Growing) -> None:
    """The run saves while the first is scored and while nothing is to be done; its last step, 20, ends it."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        growing.save(10 * len(waits))

    def score(path: Path) -> dict[str, float]:
        return {"loss": float(path.name[-2:])}

    found = list(follow(growing.run, {"sets": ["a"]}, score, seconds=3.0, sleep=sleep))
    assert found == [(10, {"loss": 10.0}), (20, {"loss": 20.0})]
    assert waits == [3.0, 3.0]
    board = EventAccumulator(str(RunFolder(growing.run).evaluation_tensorboard))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("evaluation/loss")] == [(10, 10.0), (20, 20.0)]


def test_a_run_given_in_tokens_ends(growing: Growing) -> None:
    """2,100 tokens are 4.1 steps of 8 x 64: five."""
    length = {"train_iters": None, "train_tokens": 2100}
    growing.save(4, **length)
    saves = []

    def sleep(_: float) -> None:
        saves.append(growing.save(5, **length))

    assert [step for step, _ in follow(growing.run, {}, lambda path: {}, sleep=sleep)] == [4, 5]
    assert len(saves) == 1


def test_what_was_scored_is_not_scored_again(growing: Growing) -> None:
    """Nor after a kill that cut a line; another question, or another checkpoint of the same step, is."""
    growing.save(10)
    growing.save(20)

    def steps(asked: dict[str, object]) -> list[int]:
        return [step for step, _ in follow(growing.run, asked, lambda path: {"loss": 1.0}, sleep=pytest.fail)]

    assert steps({"sets": ["a"]}) == [10, 20]
    assert steps({"sets": ["a"]}) == []
    assert steps({"sets": ["b"]}) == [10, 20]
    whole = RunFolder(growing.run).evaluations.read_text()
    RunFolder(growing.run).evaluations.write_text(whole[:-20])
    assert steps({"sets": ["b"]}) == [20]
    assert RunFolder(growing.run).evaluations.read_text().count("\n") == 5  # the cut line stays one of its own
    shutil.rmtree(growing.run / "checkpoints" / "step_00000010")
    manifest = read_manifest(find_checkpoint(growing.run))
    store = CheckpointStore(growing.run)
    shutil.copytree(find_checkpoint(growing.run), store.partial(10))
    store.publish(replace(manifest, step=10, consumed_samples=manifest.consumed_samples + 1))
    assert steps({"sets": ["b"]}) == [10]


def test_a_checkpoint_that_goes_away_is_left_out(growing: Growing) -> None:
    growing.save(10)
    growing.save(20)

    def score(path: Path) -> dict[str, float]:
        if path.name == "step_00000010":
            shutil.rmtree(path)
        return {"files": float(len(read_manifest(path).files))}

    assert [step for step, _ in follow(growing.run, {}, score, sleep=pytest.fail)] == [20]


def test_the_command(growing: Growing, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = growing.save(20)
    assert main(("evaluate", str(growing.run))) == 0
    table = capsys.readouterr().out
    assert main(("evaluate", str(growing.run), "--follow")) == 0
    assert capsys.readouterr().out == f"{checkpoint.name}\n{table}"
    (record,) = lines(growing.run)
    assert main(("evaluate", str(growing.run), "--json")) == 0
    (alone,) = json.loads(capsys.readouterr().out)["sets"]
    assert record["step"] == 20
    expected = {f"{alone['data']}/{name}": alone[name] for name in ("loss", "perplexity", "bits_per_byte")}
    assert record["figures"] == expected
    assert main(("evaluate", str(growing.run), "--follow")) == 0
    assert capsys.readouterr().out == ""


def test_mistakes(growing: Growing, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = growing.save(20)
    for run in (checkpoint, growing.run / "nowhere"):
        assert main(("evaluate", str(run), "--follow")) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --follow: {run} holds no config.yaml") and error.count("\n") == 1
    (checkpoint / "dense").rename(growing.run / "aside")
    assert main(("evaluate", str(growing.run), "--follow")) == 2
    assert "missing; the checkpoint is damaged" in capsys.readouterr().err
    assert not lines(growing.run)

"""Several named validation sets: the same figures on every layout, in all that reads them, before and after resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from overtok_megatron.cli import main
from overtok_megatron.config.loading import save_resolved
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.interchange.model_card import reported_losses
from overtok_megatron.loss_metrics import validation_losses
from overtok_megatron.parallel.devices import CPU
from support.distributed_harness import run_ranks
from support.trained_runs import CONTEXT, TrainedRuns, tiny_run_config

FIGURES = ("loss", "perplexity", "bits_per_byte")
LAYOUTS: dict[str, dict[str, Any]] = {
    "pipeline": {"pipeline_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "tensor": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "data": {"zero_stage": 3},
}


def config_of(folder: Path, output: Path, parallel: dict[str, Any], validation: Any, steps: int) -> RunConfig:
    values = tiny_run_config(folder, "fp32").model_dump(mode="json")
    # state_dtype: sums of squares rounded to bfloat16 would make another path of each layout's last bits
    values["over_encoding"] |= {"row_dtype": "float32", "state_dtype": "float32"}
    values["data"]["validation"] = validation
    values["parallel"] |= parallel
    values["training"] |= {
        "output_directory": str(output),
        "micro_batch_size": 4,
        "train_iters": steps,
        "validation_interval": 2,
    }
    return RunConfig.model_validate(values)


def train(folder: Path, scratch: Path, cases: dict[str, dict[str, Any]], steps: int, validation: Any) -> None:
    """One rank's work."""
    from overtok_megatron.training.trainer import Trainer

    for name, parallel in cases.items():
        (scratch / name).mkdir(exist_ok=True)
        assert Trainer(config_of(folder, scratch / name, parallel, validation, steps), device=CPU, num_threads=1).run()


def tiny_set(folder: Path, scratch: Path) -> IndexedDataset:
    """Of less than a window."""
    (scratch / "tiny.txt").write_text("The state of the Union is that of peace.")
    prepare([scratch / "tiny.txt"], scratch / "tiny", load_tokenizer("sentencepiece", folder / "tokenizer.model"))
    dataset = IndexedDataset(scratch / "tiny")
    assert 10 < dataset.num_tokens < CONTEXT // 2
    return dataset


def validated_tokens(configs: list[RunConfig]) -> list[tuple[float, int]]:
    """One rank's work: the loss of a validation of each, and how many tokens go through the model in it."""
    from overtok_megatron.training.trainer import Trainer

    found = []
    for config in configs:
        run, seen = Trainer(config, device=CPU, num_threads=1), []
        split = run.engine._micro_batches

        def counted(inputs: Tensor, *others: Any, seen: list[int] = seen, split: Any = split) -> Any:
            seen.append(inputs.numel())
            return split(inputs, *others)

        run.engine._micro_batches = counted  # type: ignore[method-assign]
        found.append((run._validate(0)["validation/loss"], sum(seen)))
    return found


def test_a_small_set_costs_its_tokens(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    """Not micro-batches of whole windows. Stages see each token once; of ranks with data of their own each runs as many."""
    folder, tiny = trained_runs.folder, tiny_set(trained_runs.folder, tmp_path)
    configs = [config_of(folder, tmp_path / name, LAYOUTS[name], str(tiny.prefix), 4) for name in ("pipeline", "data")]
    for rank in run_ranks(2, validated_tokens, configs):
        assert [tokens for _, tokens in rank] == [tiny.num_tokens - 1] * 2
        assert rank[0][0] == pytest.approx(rank[1][0], rel=1e-6)


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_named_sets(trained_runs: TrainedRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained_runs.folder
    tiny = tiny_set(folder, tmp_path)
    both = {"speeches": str(folder / "validation"), "tiny": str(tiny.prefix), "early": str(folder / "other")}
    run_ranks(1, train, folder, tmp_path, {"one": {}}, 4, both)
    run_ranks(2, train, folder, tmp_path, LAYOUTS, 4, both, timeout=200)

    wanted = records(tmp_path / "one")
    keys = [f"validation/{name}/{figure}" for name in both for figure in FIGURES]
    assert [[key for key in record if key.startswith("validation")] for record in wanted] == [[], keys, [], keys]
    assert wanted[-1]["validation/speeches/loss"] != wanted[-1]["validation/early/loss"]
    for name in LAYOUTS:
        for record, expected in zip(records(tmp_path / name), wanted, strict=True):
            for key in ("train/loss", *(key for key in keys if key in expected)):
                assert record[key] == pytest.approx(expected[key], rel=1e-5), (name, key)

    board = EventAccumulator(str(tmp_path / "one" / "tensorboard")).Reload()
    for key in keys:
        assert [event.value for event in board.Scalars(key)] == pytest.approx([wanted[step][key] for step in (1, 3)])

    assert main(("evaluate", str(tmp_path / "pipeline"), "--json")) == 0
    scores = json.loads(capsys.readouterr().out)["sets"]
    assert {score["name"]: score["data"] for score in scores} == both
    for score in scores:
        for figure in FIGURES:
            assert score[figure] == pytest.approx(wanted[-1][f"validation/{score['name']}/{figure}"], rel=1e-5)
    assert main(("evaluate", str(tmp_path / "one"), "--data", both["early"])) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()] == ["set", both["early"]]
    assert main(("evaluate", str(tmp_path / "one"))) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()] == ["set", *both]

    save_resolved(config_of(folder, tmp_path / "one", {}, both, 4), tmp_path / "one" / "config.yaml")
    assert main(("evaluate", str(tmp_path / "one"), "--follow")) == 0
    (followed,) = [json.loads(line) for line in (tmp_path / "one" / "evaluations.jsonl").read_text().splitlines()]
    assert followed["asked"] == {"sets": both}
    assert followed["figures"] == {
        key.removeprefix("validation/"): pytest.approx(wanted[-1][key], rel=1e-5) for key in keys
    }

    checkpoint = tmp_path / "one" / "checkpoints" / "step_00000004"
    assert reported_losses(checkpoint, 4) == validation_losses(wanted[-1])
    assert reported_losses(checkpoint, 3) == {}
    assert reported_losses(tmp_path / "none" / "checkpoints" / "step_00000004", 4) == {}

    # sets may change when a run goes on; one without a name has the plain metrics
    run_ranks(2, train, folder, tmp_path, {"one": LAYOUTS["pipeline"]}, 6, both["early"])
    last = records(tmp_path / "one")
    assert [record["step"] for record in last] == list(range(1, 7))
    assert last[:4] == wanted
    assert list(validation_losses(last[-1])) == [""]
    assert last[-1]["validation/loss"] < wanted[-1]["validation/early/loss"]

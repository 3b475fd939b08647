"""A new run from everything that another run's checkpoint holds goes on as that run did, bit for bit on the same layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from overtok_megatron.checkpoint.layout import CheckpointLayout, LayoutKind
from overtok_megatron.checkpoint.starting_point import starting_point
from overtok_megatron.checkpoint.store import CheckpointStore, Manifest, read_manifest
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.parallel.devices import CPU
from support.distributed_harness import run_ranks
from support.expect_error import expect_error
from support.trained_runs import TrainedRuns, tiny_run_config
from support.workspace import records

STEPS, BRANCHED_AT = 8, 3


def config_of(folder: Path, output: Path, **changes: Any) -> RunConfig:
    """changes: values by section__key."""
    values = tiny_run_config(folder, "fp32").model_dump(mode="json")
    values["training"] |= {"output_directory": str(output), "micro_batch_size": 4, "train_iters": STEPS}
    values["training"] |= {"validation_interval": 4}
    values["checkpoint"]["interval"] = BRANCHED_AT
    values["optimizer"]["warmup_iters"] = 2
    values["over_encoding"] |= {"optimizer": "adam", "row_dtype": "float32", "state_dtype": "float32"}
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    return RunConfig.model_validate(values)


def branch_of(scratch: Path) -> dict[str, Any]:
    at = scratch / "whole" / "checkpoints" / f"step_{BRANCHED_AT:08d}"
    return {"training__initial_checkpoint": str(at), "training__initial_state": "everything"}


def train(configs: list[RunConfig]) -> None:
    """One rank's work."""
    from overtok_megatron.training.trainer import Trainer

    for config in configs:
        Path(config.training.output_directory).mkdir(exist_ok=True)
        assert Trainer(config, device=CPU, num_threads=1).run()


def test_a_branch_goes_on_as_the_run_did(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    folder, branch = trained_runs.folder, branch_of(tmp_path)
    bounded = {"training__validation_batches": 1}
    stages = {"parallel__pipeline_parallel_size": 2}
    configs = [
        config_of(folder, tmp_path / "whole"),
        config_of(folder, tmp_path / "branch", **branch),
        config_of(folder, tmp_path / "stages", **branch, **bounded, **stages),
    ]
    run_ranks(2, train, configs)
    run_ranks(1, train, [config_of(folder, tmp_path / "one", **branch, **bounded)])
    whole, found, stages_found, one = (records(tmp_path / name) for name in ("whole", "branch", "stages", "one"))
    timed = ("speed/", "memory/")

    def figures(record: dict[str, float]) -> dict[str, float]:
        return {key: value for key, value in record.items() if not key.startswith(timed)}

    assert [figures(record) for record in found] == [figures(record) for record in whole[BRANCHED_AT:]]
    for record, expected, wanted in zip(stages_found, one, whole[BRANCHED_AT:], strict=True):
        assert record["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-5)
        assert expected["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-5)
        if "validation/loss" in wanted:  # the same samples on every layout, of a part of the set
            assert record["validation/loss"] == pytest.approx(expected["validation/loss"], rel=1e-5)
            assert record["validation/loss"] != pytest.approx(wanted["validation/loss"], rel=2e-5)
    last = [CheckpointStore(tmp_path / name).final(STEPS) for name in ("whole", "branch")]
    manifests = [read_manifest(path) for path in last]
    names = [name for name in manifests[0].files if name.endswith("safetensors")]
    assert len(names) == 3  # weights, and the rows of each rank with their state
    for name in names:  # their metadata come in any order
        parts = [load_file(path / name) for path in last]
        assert parts[0].keys() == parts[1].keys()
        assert all(torch.equal(value, parts[1][key]) for key, value in parts[0].items())
    assert manifests[1].consumed_samples == STEPS * 8
    assert list(manifests[1].data) == ["train/train", "validation/"]
    again = config_of(folder, tmp_path / "branch", **branch)  # from itself, once it has a checkpoint
    start = starting_point(again)
    assert start is not None
    assert (start.path, start.own) == (last[1], True)
    other = config_of(folder, tmp_path / "branch", **branch | {"training__initial_state": "weights"})
    expect_error(lambda: starting_point(other), "training.initial_state is everything there and weights in this run")


def test_what_cannot_be_branched_is_refused_before_ranks_start(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    folder, branch = trained_runs.folder, branch_of(tmp_path)
    store = CheckpointStore(tmp_path / "whole")

    def write(layout: CheckpointLayout) -> None:
        store.start_save(BRANCHED_AT)
        config = config_of(folder, tmp_path / "whole").model_dump(mode="json")
        settings = {"step": BRANCHED_AT, "consumed_samples": 24, "eod_id": 0, "tokenizer_fingerprint": "none"}
        store.publish(Manifest(config=config, layout=layout, files={}, **settings))

    def refused(*words: str, **changes: Any) -> None:
        config = config_of(folder, tmp_path / "new", **branch | changes)
        expect_error(lambda: starting_point(config), "training.initial_checkpoint: ", *words)

    write(CheckpointLayout(zero_stage=1))
    start = starting_point(config_of(folder, tmp_path / "new", **branch))
    assert start is not None
    assert (start.fresh, start.own) == (False, False)
    refused(
        f"is of step {BRANCHED_AT}, and this run has 3 steps", "raise training.train_iters", training__train_iters=3
    )
    refused("training.seed is 1234 there and 5 in this run", training__seed=5)
    write(CheckpointLayout(kind=LayoutKind.WEIGHTS_ONLY))
    refused("holds weights without optimizer state; set training.initial_state: weights")

"""Settings that change when a run goes on: each has the losses of a run whose optimizers were altered by hand at that step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from overtok_megatron.checkpoint.changes import check_continuable
from overtok_megatron.checkpoint.layout import CheckpointLayout
from overtok_megatron.checkpoint.starting_point import StartingPoint, starting_point
from overtok_megatron.checkpoint.store import CheckpointStore, Manifest
from overtok_megatron.config.schema import ModelConfig, RunConfig
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.resuming import load_checkpoint
from overtok_megatron.training.saving import Saver
from support.distributed_harness import run_ranks
from support.expect_error import expect_error
from support.formula_cases import EOD, SEQ, STEPS, Case, case_config, stream

CPU = torch.device("cpu")
SAVED_AT = 2
HALF = {"precision": "bf16"}
# Every class of DeepSpeed's optimizers once; the other layouts are slow.
CASES = [
    *(Case(f"float32, zero {stage}", parallel={"zero_stage": stage}) for stage in (0, 1, 3)),
    Case("bfloat16, zero 0", parallel={"zero_stage": 0}, training=HALF | {"micro_batch_size": 4}),
    Case("bfloat16, zero 1", parallel={"zero_stage": 1}, training=HALF),
    Case("float32, pipeline", parallel={"pipeline_parallel_size": 2}),
]
OTHERS = [
    Case("float32, zero 2", parallel={"zero_stage": 2}),
    *(Case(f"bfloat16, zero {stage}", parallel={"zero_stage": stage}, training=HALF) for stage in (2, 3)),
    Case("float32, pipeline, zero 1", parallel={"pipeline_parallel_size": 2, "zero_stage": 1}),
    Case("bfloat16, pipeline, zero 1", parallel={"pipeline_parallel_size": 2, "zero_stage": 1}, training=HALF),
    Case("bfloat16, tensor, zero 1", parallel={"tensor_parallel_size": 2, "zero_stage": 1}, training=HALF),
    *(
        Case(
            f"{precision}, zero {stage}, offload",
            parallel={"zero_stage": stage, "offload_optimizer": "cpu"},
            training={"precision": precision},
        )
        for precision in ("fp32", "bf16")
        for stage in (1, 2, 3)
    ),
]
Change = dict[str, Any]  # new values by key
CHANGES: Change = {
    "optimizer.weight_decay": 20.0,
    "optimizer.betas": (0.5, 0.6),
    "optimizer.eps": 0.1,
    "optimizer.gradient_clipping": 1e-3,
    "over_encoding.weight_decay": 20.0,
    "over_encoding.betas": (0.5, 0.6),
    "over_encoding.eps": 0.1,
    "over_encoding.learning_rate_factor": 30.0,
}
# By which DeepSpeed lays out its files in another way on the same ranks.
OTHER_FILES: list[tuple[Case, Change]] = [
    (Case("partition", parallel={"pipeline_parallel_size": 2}), {"parallel.pipeline_partition": [2, 0]}),
    (Case("offload", parallel={"zero_stage": 1}, training=HALF), {"parallel.offload_optimizer": "cpu"}),
    (
        Case("sub-groups", parallel={"zero_stage": 3}),
        {"deepspeed": {"zero_optimization": {"sub_group_size": 1000}}},
    ),
]


def alter(engine: TrainingEngine, change: Change) -> None:
    """As if everything had been made with other values."""
    assert engine.tables is not None and engine.tables.optimizer is not None
    for key, value in change.items():
        section, name = key.split(".")
        if key == "over_encoding.learning_rate_factor":
            over = engine.config.over_encoding.model_copy(update={name: value})
            engine.config = engine.config.model_copy(update={"over_encoding": over})
        elif section == "over_encoding":
            setattr(engine.tables.optimizer, name, value)
        elif key == "optimizer.gradient_clipping":
            engine.adapter.set_max_norm(value)
        else:
            for group in engine.optimizer.param_groups:
                if name != "weight_decay" or group[name] > 0:  # norms and the embedding have none
                    group[name] = value


def go_on(engine: TrainingEngine, path: Path, change: Change | None = None) -> list[float]:
    """Losses and norms of the last steps from a checkpoint."""
    assert load_checkpoint(engine, path).step == SAVED_AT
    alter(engine, change or {})
    return losses(engine, range(SAVED_AT, STEPS))


def losses(engine: TrainingEngine, steps: range) -> list[float]:
    tokens, grid = stream(engine.config.model.vocab_size), engine.grid
    parts = [
        tokens[step].view(engine.num_micro_batches, grid.shape.data, -1, SEQ + 1)[:, grid.data_rank] for step in steps
    ]
    results = [engine.step(part, 3e-3) for part in parts]
    return [value for result in results for value in (result.loss, result.grad_norm)]


Found = tuple[str, list[float], list[float], list[float]]  # what changed; losses by configuration, by hand, unchanged


def save(engine: TrainingEngine, folder: Path) -> tuple[Path, list[float]]:
    """A checkpoint after the first steps, and what follows it without a change."""
    losses(engine, range(SAVED_AT))
    saver = Saver(engine, CheckpointStore(folder), eod_id=EOD, tokenizer_fingerprint="none")
    saver.save(SAVED_AT, 0)
    saver.finish()
    path = CheckpointStore(folder).latest()
    assert path is not None
    return path, go_on(engine, path)


def change_case(case: Case, changes: list[Change], folder: Path) -> list[Found]:
    config = case_config(case)
    grid = start_processes(config, CPU)
    old = TrainingEngine(config, grid, CPU, EOD)
    path, unchanged = save(old, folder)
    found: list[Found] = []
    for change in changes:
        by_configuration = go_on(TrainingEngine(changed(config, change), grid, CPU, EOD), path)
        found.append((f"{case.name}: {', '.join(change)}", by_configuration, go_on(old, path, change), unchanged))
        values = config.model_dump()
        alter(old, {key: values[key.split(".")[0]][key.split(".")[1]] for key in change})
    return found


def changed(config: RunConfig, change: Change) -> RunConfig:
    values = config.model_dump()
    for key, value in change.items():
        section, _, name = key.partition(".")
        values[section] = values[section] | {name: value} if name else value
    return RunConfig.model_validate(values)


def change_cases(cases: list[tuple[Case, list[Change]]], folder: Path) -> list[Found]:
    """One rank's work."""
    return [found for index, case in enumerate(cases) for found in change_case(*case, folder / str(index))]


def check(found: list[Found], count: int) -> None:
    assert len(found) == count
    for name, by_configuration, by_hand, unchanged in found:
        assert by_configuration == by_hand, name
        assert by_configuration[-2] != unchanged[-2], name


def other_files(folder: Path) -> list[tuple[str, list[float], list[float]]]:
    """One rank's work: losses that go on with changed files, and without a change."""
    found = []
    for case, change in OTHER_FILES:
        before = case_config(case)
        path, unchanged = save(TrainingEngine(before, start_processes(before, CPU), CPU, EOD), folder / case.name)
        config = changed(before, change)
        found.append(
            (case.name, go_on(TrainingEngine(config, start_processes(config, CPU), CPU, EOD), path), unchanged)
        )
    return found


def all_changes(folder: Path) -> tuple[list[Found], list[tuple[str, list[float], list[float]]]]:
    """One rank's work."""
    return change_cases([(case, [CHANGES]) for case in CASES], folder), other_files(folder)


def test_changes_take_effect_on_every_layout(tmp_path: Path) -> None:
    """Those of settings; and those of what DeepSpeed lays out in another way, which change nothing."""
    for changes, others in run_ranks(2, all_changes, tmp_path, timeout=300):
        check(changes, len(CASES))
        for name, resumed, unchanged in others:
            assert resumed == pytest.approx(unchanged, rel=1e-5), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_changed_setting_takes_effect_by_itself(tmp_path: Path) -> None:
    changes: list[Change] = [{key: value} for key, value in CHANGES.items()]
    cases = [(case, changes) for case in [*CASES, *OTHERS]]
    for rank in run_ranks(2, change_cases, cases, tmp_path, timeout=500):
        check(rank, len(cases) * len(changes))


# Whether a key may change when a run goes on, of every key that there is: a new one must be put here, and into the README.
REFUSED = {
    *(f"model.{name}" for name in ModelConfig.model_fields),
    *(f"over_encoding.{name}" for name in (
        "enabled", "ngram_order", "num_slices", "table_rows", "row_width", "added", "combine", "pad_id", "boundary",
        "hash_base", "row_dtype", "init_std", "optimizer", "word_embedding",
    )),
    "over_decoding.num_tokens", "multi_token_prediction.depth",
    "training.precision", "training.seed", "training.train_only", "data.seq_length",
}  # fmt: skip
UNDER_CONDITIONS = {
    "training.global_batch_size", "training.initial_checkpoint", "training.initial_state", "over_decoding.low_rank",
}  # fmt: skip
ELSEWHERE = {"tokenizer"}  # by its fingerprint, where the data is known
ALLOWED = {
    *(f"over_encoding.{name}" for name in (
        "frozen", "collision_check", "learning_rate_factor", "weight_decay", "betas", "eps", "state_dtype",
        "gradient_dtype", "storage", "ranks_per_host", "dropout",
    )),
    "over_decoding.loss_weights", "multi_token_prediction.loss_weight",
    "data.train", "data.validation", "data.shuffle_seed", "data.document_attention",
    *(f"training.{name}" for name in (
        "output_directory", "micro_batch_size", "train_iters", "train_tokens", "deterministic", "z_loss",
        "validation_interval", "validation_batches", "non_finite", "non_finite_limit", "exit_after_minutes", "resume",
        "recompute", "kernels", "num_threads", "weights_check_interval", "hang_timeout",
        "straggler_report_interval", "straggler_threshold",
    )),
    "parallel", "optimizer", "checkpoint", "logging", "deepspeed",
}  # fmt: skip


def all_keys() -> set[str]:
    judged_whole = {key for key in ALLOWED | ELSEWHERE if "." not in key}
    keys = set(judged_whole)
    for section in RunConfig.model_fields.keys() - judged_whole:
        keys |= {f"{section}.{name}" for name in getattr(case_config(CASES[0]), section).__class__.model_fields}
    return keys


def with_checkpoint(folder: Path, **training: Any) -> tuple[RunConfig, Manifest]:
    """A configuration whose run has a checkpoint of step 2, and its manifest."""
    case = Case("", training={"output_directory": str(folder), **training})
    config, store = case_config(case), CheckpointStore(folder)
    store.start_save(2)
    manifest = Manifest(
        step=2,
        consumed_samples=16,
        config=config.model_dump(mode="json"),
        layout=CheckpointLayout(zero_stage=0),
        eod_id=EOD,
        tokenizer_fingerprint="none",
        files={},
    )
    store.publish(manifest)
    return config, manifest


def test_every_key_is_allowed_or_refused_by_name(tmp_path: Path) -> None:
    assert all_keys() == REFUSED | UNDER_CONDITIONS | ELSEWHERE | ALLOWED
    config, manifest = with_checkpoint(tmp_path)
    values = config.model_dump(mode="json")
    check_continuable(values, manifest, tmp_path)
    for key in sorted(REFUSED):
        section, name = key.split(".")
        other = values | {section: values[section] | {name: "other" if name != "added" else [{"orders": [9]}]}}
        expect_error(lambda other=other: check_continuable(other, manifest, tmp_path), f"{key} is ", "in this run")  # type: ignore[misc]
    for key in sorted(ALLOWED):
        section, _, name = key.partition(".")
        other = values | {section: values[section] | {name: "other"} if name else {"other": 1}}
        if name != "train_tokens":
            check_continuable(other, manifest, tmp_path)


def test_what_cannot_change_is_refused_before_ranks_start(tmp_path: Path) -> None:
    config, _ = with_checkpoint(tmp_path)
    assert starting_point(config) == StartingPoint(tmp_path / "checkpoints/step_00000002", fresh=False)
    for change, words in (
        ({"training.seed": 5}, ["training.seed is 1234 there and 5 in this run, and cannot change", "set it to 1234"]),
        ({"over_encoding.optimizer": "sgd"}, ["the rows' state is of that optimizer", "training.initial_checkpoint"]),
        ({"over_encoding.init_std": 0.5}, ["over_encoding.init_std is 0.02 there"]),
        ({"model.init_std": 0.5}, ["model.init_std is 0.05 there"]),
        ({"data.seq_length": 6}, ["data.seq_length is 12 there and 6"]),
        ({"training.precision": "bf16"}, ["training.precision is fp32 there and bf16"]),
        ({"training.initial_checkpoint": "elsewhere"}, ["training.initial_checkpoint is null there"]),
        (
            {"training.train_iters": None, "training.train_tokens": 4096, "training.global_batch_size": 16},
            ["training.global_batch_size is 8 there and 16", "write training.train_iters"],
        ),
    ):
        expect_error(lambda change=change: starting_point(changed(config, change)), *words)  # type: ignore[misc]
    starting_point(changed(config, {"training.global_batch_size": 16}))
    started, _ = with_checkpoint(tmp_path / "started", initial_checkpoint="elsewhere")
    starting_point(started)
    starting_point(changed(started, {"training.initial_checkpoint": None}))

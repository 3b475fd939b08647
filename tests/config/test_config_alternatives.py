"""Of keys that exclude each other the more specific place wins: command line over file, file over its base."""

from pathlib import Path
from typing import Any

import pytest

from overtok_megatron.config.loading import change_config, load_config
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate
from overtok_megatron.planning.config_report import describe
from support.config_text import RUN, refusal

YARN = "{type: yarn, factor: 4.0, original_max_position_embeddings: 64, beta_fast: 16.0}"
BASES = {  # what the less specific place adds to RUN
    "tokens": "training: {train_iters: null, train_tokens: 5000}",
    "steps": "training: {train_iters: 10}",
    "pattern": "model: {sliding_window: 8, attention_pattern: [full, sliding]}",
    "interval": "model: {sliding_window: 8, full_attention_interval: 2}",
    "yarn": f"model: {{rope_scaling: {YARN}}}",
    "wsd": "optimizer: {schedule: wsd, decay_iters: 2}",
    "tokenizer": "tokenizer: {type: hugging_face, path: t.json, eod_token: end}",
    "experts": "model: {num_experts: 4, num_experts_per_token: 2, normalize_expert_weights: true}",
}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("tokens", {"training.train_iters": 20}, {"training.train_tokens": None}),
    ("steps", {"training.train_tokens": 5000}, {"training.train_iters": None}),
    ("pattern", {"model.full_attention_interval": 2}, {"model.attention_pattern": None}),
    ("interval", {"model.attention_pattern": ["full", "sliding"]}, {"model.full_attention_interval": None}),
    ("pattern", {"model.sliding_window": None}, {"model.attention_pattern": None}),
    ("interval", {"model.sliding_window": None}, {"model.full_attention_interval": None}),
    (
        "yarn",
        {"model.rope_scaling.type": "linear"},
        {"model.rope_scaling.beta_fast": None, "model.rope_scaling.original_max_position_embeddings": None},
    ),
    (
        "yarn",
        {"model.rope_scaling.type": "llama3"},
        {"model.rope_scaling.beta_fast": None, "model.rope_scaling.original_max_position_embeddings": 64},
    ),
    ("wsd", {"optimizer.schedule": "cosine"}, {"optimizer.decay_iters": None}),
    ("tokenizer", {"tokenizer.type": "bytes"}, {"tokenizer.path": None, "tokenizer.eod_token": None}),
    (
        "experts",
        {"model.num_experts": None},
        {"model.num_experts_per_token": None, "model.normalize_expert_weights": False},
    ),
]


def written(value: Any) -> str:
    return "null" if value is None else str(value).replace("'", "")


def value_of(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def check(config: RunConfig, *expectations: dict[str, Any]) -> None:
    validate(config, 1, lambda key: "place")
    for expected in expectations:
        for key, value in expected.items():
            assert value_of(config, key) == value, key


@pytest.mark.parametrize(("base", "given", "expected"), CASES)
def test_the_more_specific_place_wins(
    tmp_path: Path, base: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    file = tmp_path / "file.yaml"
    file.write_text(f"base: run.yaml\n{BASES[base]}\n", encoding="utf-8")
    overrides = [f"{key}={written(value)}" for key, value in given.items()]
    loaded = load_config(file, overrides)
    check(loaded.config, given, expected)
    gone = [key for key in expected if loaded.locate(key).startswith("command line, ")]
    assert gone
    section, name = next(iter(given)).split(".", 1)
    if "." not in name:  # a section within a section is reported as one value
        assert f"command line, {name}" in describe(loaded, 1)

    child = tmp_path / "child.yaml"
    inner, value = name, written(given[f"{section}.{name}"])
    if "." in name:
        inner, value = name.split(".")[0], f"{{{name.split('.')[1]}: {value}}}"
    child.write_text(f"base: file.yaml\n{section}:\n  {inner}: {value}\n", encoding="utf-8")
    loaded = load_config(child)
    check(loaded.config, given, expected)
    assert loaded.locate(gone[0]) == f"{child}:3, {name.split('.')[-1]}"

    resolved = change_config(load_config(file).config, overrides, "the run")  # every key is given there
    check(resolved.config, given, expected)


def test_in_one_place_they_contradict_each_other(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(RUN, encoding="utf-8")
    message = refusal(run, ["training.train_iters=5", "training.train_tokens=5000"])
    assert "command line: training.train_iters: 5; give either" in message
    run.write_text(RUN.replace("train_iters: 10", "train_iters: 10, train_tokens: 5000"), encoding="utf-8")
    assert "run.yaml:5: training.train_iters: 10; give either" in refusal(run, [])
    layers = ["model.sliding_window=4", "model.full_attention_interval=2", "model.attention_pattern=[full, sliding]"]
    assert "remove one" in refusal(run, [*layers, "training.train_tokens=null"])
    assert "needs model.num_experts" in refusal(run, ["model.num_experts=null", "model.num_experts_per_token=2"])


def test_no_value_replaces_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(RUN.replace("train_iters: 10", "train_tokens: 5000"), encoding="utf-8")
    assert load_config(run, ["training.train_iters=null"]).config.training.train_tokens == 5000
    assert load_config(run, ["training.train_iters=10"]).config.training.train_tokens is None


def test_an_alias_is_a_value_of_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(RUN + "deepspeed: {aio: &same {block_size: 1}, other: *same}\n", encoding="utf-8")
    config = load_config(run, ["deepspeed.aio.block_size=2"]).config
    assert config.deepspeed == {"aio": {"block_size": 2}, "other": {"block_size": 1}}

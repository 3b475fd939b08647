"""All that is wrong with a configuration is told at once, a line for each key, and nothing that only follows from it."""

import itertools
from pathlib import Path

import pytest

from overtok_megatron.config.explanations import MOST_TOLD
from overtok_megatron.config.loading import load_config
from overtok_megatron.config.validation import run_problems, validate
from overtok_megatron.errors import ConfigError
from support.config_faults import FAULTS, WORLD, Fault, make
from support.config_mutations import schema_keys
from support.config_text import RUN, refusal


def named(fault: Fault, other: Fault) -> list[str]:
    """The keys that a configuration with both faults is refused for; none where they mend each other."""
    lines: list[str] = []
    try:
        validate(make(**(fault.changes | other.changes)), WORLD, lambda key: "place")
    except ConfigError as error:
        lines = error.lines
    assert all(len(line) < 300 and line.isprintable() for line in lines)
    return [line.split(": ")[1] for line in lines]


def test_two_faults_at_once() -> None:
    """Both keys are named, unless a rule reads a key that is wrong by the other fault; no key is named that is right."""
    alone = 0
    for one, other in itertools.combinations(FAULTS, 2):
        if one.changes.keys() & other.changes.keys():
            continue
        found = named(one, other)
        touched = [{key.replace("__", ".") for key in fault.changes} | {fault.key} for fault in (one, other)]
        for key in found:
            assert {key, key.rpartition(".")[0]} & (touched[0] | touched[1]), (one, other, found)
        for fault, others in ((one, touched[1]), (other, touched[0])):
            if not reads(fault) & (others | set(found) - {fault.key}):
                alone += 1
                assert fault.key in found, (one, other, found)
    assert alone > 2000


def reads(fault: Fault) -> set[str]:
    """The keys by whose values the rule that a fault breaks may hold again."""
    problems = run_problems(make(**fault.changes), WORLD)
    broken = next(one for one in problems if one.key == fault.key)
    return {broken.key, *broken.reads}


def test_what_follows_from_another_mistake_is_not_told(run: Path) -> None:
    assert refusal(run, ["parallel.tensor_parallel_size=5"], 4).count("\n") == 0  # heads and widths need another one
    assert refusal(run, ["model.num_attention_heads=5", "parallel.context_parallel_size=2"], 2).count("\n") == 0
    assert refusal(run, ["training.train_iters=null", "optimizer.warmup_iters=100"]).count("\n") == 0
    both = refusal(run, ["training.train_iters=null", "optimizer.min_learning_rate=1"]).splitlines()
    assert [line.split(": ")[1] for line in both] == ["training.train_iters", "optimizer.min_learning_rate"]


def test_raw_keys_of_deepspeed_are_told_with_the_rest(run: Path) -> None:
    lines = refusal(run, ["deepspeed={fp16: {}, steps_per_print: 3, zero_optimization: {stage: 2}}", "data.seq_length=31",
                          "parallel.tensor_parallel_size=2"], 2).splitlines()  # fmt: skip
    assert [line.split(": ")[1] for line in lines] == [
        "data.seq_length", "deepspeed.fp16", "deepspeed.steps_per_print", "deepspeed.zero_optimization.stage"
    ]  # fmt: skip


def test_two_wrong_values_in_a_file(run: Path) -> None:
    """A list in a list fits no key of the schema."""
    keys = [key for key, _ in schema_keys() if "." in key]
    for one, other in zip(keys, [*keys[7:], *keys[:7]], strict=True):
        if not other.startswith(f"{one}.") and not one.startswith(f"{other}."):
            with pytest.raises(ConfigError) as caught:
                load_config(run, [f"{one}=[[]]", f"{other}=[[]]"])
            found = [line.split(": ")[1] for line in caught.value.lines if " is missing" not in line]
            assert len(found) == 2
            assert any(key.startswith(one) for key in found), found  # what follows says which form or entry
            assert any(key.startswith(other) for key in found), found


def test_unknown_wrong_and_missing_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = (
        RUN.replace("hidden_size", "hiden_size").replace("learning_rate: 1e-3", "eps: x").replace("t}", "t, kind: 3}")
    )
    path.write_text(text, encoding="utf-8")
    assert refusal(path, []).splitlines() == [
        f"{path}:1: unknown key model.hiden_size; did you mean model.hidden_size?",
        f"{path}:2: unknown key tokenizer.kind; keys of tokenizer: type, path, eod_token",
        f"{path}:4: optimizer.eps: 'x' should be a valid number (AdamW's epsilon)",
        f"{path}:4: optimizer.learning_rate is missing from section optimizer (peak learning rate of the dense weights); "
        "add it",
    ]
    path.write_text(f"hidden_size: 3\n{RUN.replace('hidden_size: 48, ', '')}", encoding="utf-8")
    assert refusal(path, []) == f"{path}:1: unknown key hidden_size; did you mean model.hidden_size?"


@pytest.mark.timeout(20)
def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(f"key{number}: {{a: 1}}" for number in range(3000)), encoding="utf-8")
    lines = refusal(path, []).splitlines()
    assert len(lines) == MOST_TOLD + 1
    assert "2970 more keys are wrong or missing; correct these first" in lines[-1]


def test_overrides_that_cannot_be_read(run: Path) -> None:
    assert refusal(run, ["nonsense", "model.num_layers=3", "=4"]).count("command line: ") == 2

"""data.validation: nothing, a prefix, or prefixes by name; what is wrong with it is one line."""

from pathlib import Path

import pytest

from overtok_megatron.config.derived import validation_sets
from overtok_megatron.config.loading import load_config, save_resolved
from support.config_text import RUN, refusal


@pytest.mark.parametrize(
    ("given", "sets"),
    [
        ("null", {}),
        ("a/set", {"": "a/set"}),
        ("{speeches: a/set, code-2: b}", {"speeches": "a/set", "code-2": "b"}),
        ("{z: a, a: z, 'on': c}", {"z": "a", "a": "z", "on": "c"}),
    ],
)
def test_sets_in_the_order_given(run: Path, tmp_path: Path, given: str, sets: dict[str, str]) -> None:
    config = load_config(run, [f"data.validation={given}"]).config
    assert list(validation_sets(config).items()) == list(sets.items())
    save_resolved(config, tmp_path / "resolved.yaml")
    again = load_config(tmp_path / "resolved.yaml").config
    assert again == config
    assert list(validation_sets(again)) == list(sets)


def test_names_add_up_over_files_and_overrides(run: Path, tmp_path: Path) -> None:
    run.write_text(RUN.replace("seq_length", "validation: {a: x}, seq_length"), encoding="utf-8")
    child = tmp_path / "child.yaml"
    child.write_text("base: run.yaml\ndata: {validation: {b: y}}\n", encoding="utf-8")
    assert validation_sets(load_config(child).config) == {"a": "x", "b": "y"}
    assert validation_sets(load_config(child, ["data.validation.a=z"]).config) == {"a": "z", "b": "y"}
    assert validation_sets(load_config(child, ["data.validation={c: z}"]).config) == {"c": "z"}
    assert validation_sets(load_config(child, ["data.validation=z"]).config) == {"": "z"}


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("{}", ["{}", "names no set", "null for none"]),
        ("{a/b: x}", ["has the name 'a/b'", "letters, digits, _ and -"]),
        ("{'': x}", ["has the name ''"]),
        ("{1: x}", ["has the name 1;"]),
        ("{true: x}", ["has the name True;"]),
        ("{a b: x}", ["has the name 'a b'"]),
        ("{a: x, b: ./x}", ["has ./x twice, as a and as b; remove one"]),
        ("{a: x, a: y}", ["data.validation.a is given twice"]),
        ("{a: 5}", ["data.validation.a: 5", "should be a valid string"]),
        ("{a: null}", ["data.validation.a: null", "should be a valid string"]),
        ("{a: ''}", ["data.validation.a: ''", "at least 1 character"]),
        ("{a: {b: x}}", ["data.validation.a: {'b': 'x'}", "should be a valid string"]),
        ("[{path: x, weight: 1}]", ["should be a valid string", "a mapping name: prefix"]),
    ],
)
def test_one_line_with_a_way_out(run: Path, given: str, parts: list[str]) -> None:
    run.write_text(RUN.replace("seq_length", f"validation: {given}, seq_length"), encoding="utf-8")
    message = refusal(run, [])
    for part in ("run.yaml:3: ", "data.validation", *parts):
        assert part in message

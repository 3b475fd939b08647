"""Files, inheritance, overrides and their errors: every line of a message has place, key, value and a way out."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtok_megatron.config.loading import load_config, save_resolved
from overtok_megatron.errors import ConfigError, OutputError
from overtok_megatron.planning.config_report import describe

MINIMAL = """
model:
  vocab_size: 100
  hidden_size: 32
  intermediate_size: 64
  num_layers: 2
  num_attention_heads: 4
tokenizer: {path: t.model}
data: {train: d/train, seq_length: 16}
optimizer:
  learning_rate: 1e-4
training: {output_directory: out, micro_batch_size: 2, global_batch_size: 8, train_iters: 10}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_numbers_of_yaml_1_2(file: Path) -> None:
    assert load_config(file).config.optimizer.learning_rate == 1e-4
    loaded = load_config(
        file, ["optimizer.learning_rate=3E-4", "training.train_iters=1_000", "logging.progress_bar=off"]
    )
    assert loaded.config.optimizer.learning_rate == 3e-4
    assert loaded.config.training.train_iters == 1000
    assert loaded.config.logging.progress_bar == "off"


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_any_float_survives_an_override(value: float) -> None:
    path = Path(__file__).parent.parent.parent / "configs" / "quickstart_baseline.yaml"
    assert load_config(path, [f"optimizer.eps={value!r}"]).config.optimizer.eps == value


def test_provenance(file: Path) -> None:
    loaded = load_config(file, ["model.num_layers=3"])
    assert loaded.locate("model.hidden_size") == f"{file}:4"
    assert loaded.locate("model.num_layers") == "command line"
    assert loaded.locate("model.rope_theta") == "default"
    text = describe(loaded, 2)
    row = next(line for line in text.splitlines() if line.startswith("model.num_layers"))
    assert row.split() == ["model.num_layers", "3", "command", "line"]


def test_inheritance(file: Path) -> None:
    child = file.with_name("child.yaml")
    child.write_text("base: run.yaml\nmodel: {num_layers: 7}\n", encoding="utf-8")
    loaded = load_config(child)
    assert (loaded.config.model.num_layers, loaded.config.model.hidden_size) == (7, 32)
    assert loaded.locate("model.num_layers") == f"{child}:2"
    assert loaded.locate("model.hidden_size") == f"{file}:4"
    file.write_text("base: child.yaml\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="inherits from itself"):
        load_config(child)


def test_a_stored_configuration_is_the_same(file: Path, tmp_path: Path) -> None:
    config = load_config(
        file, ["over_encoding.betas=[0.8, 0.9]", "deepspeed.zero_optimization.overlap_comm=true"]
    ).config
    save_resolved(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml").config == config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model:\n  hiddensize: 3\n", [":2:", "unknown key model.hiddensize", "did you mean model.hidden_size?"]),
        ("lr: 3\n", [":1:", "unknown key lr"]),
        (
            "over_encoding:\n  added: [{order: [4], table_rows: 9}]\n",
            [":2:", "over_encoding.added.0.order", "did you mean orders?"],
        ),
        ("over_encoding:\n  added: [{dots: 3}]\n", [":2:", "keys of an entry: orders, num_slices, table_rows, frozen"]),
        ("modle: {}\n", ["unknown key modle", "did you mean model?"]),
        ("hidden_size: 3\n", ["did you mean model.hidden_size?"]),
        ("model: {hidden_size: '32'}\n", [":1:", "model.hidden_size", "'32'", "valid integer"]),
        ("model: {hidden_size: true}\n", ["model.hidden_size", "true"]),
        ("model: {hidden_size: 1.5}\n", ["model.hidden_size", "1.5"]),
        ("model: {hidden_size: 0}\n", ["model.hidden_size", "greater than or equal to 1"]),
        ("parallel: {zero_stage: 4}\n", ["parallel.zero_stage", "4", "less than or equal to 3"]),
        ("over_encoding: {combine: product}\n", ["over_encoding.combine", "'product'", "'sum', 'mean' or 'scaled'"]),
        ("model: 3\n", ["model", "3"]),
        ("optimizer: {eps: .nan}\n", ["optimizer.eps", "nan"]),
        ("model: {hidden_size: 3, hidden_size: 4}\n", [":1:", "model.hidden_size is given twice"]),
        ("model: [\n", [":2:", "not valid YAML"]),
        ("", ["must hold sections"]),
        ("- a\n", ["must hold sections", "list"]),
        ("base: nothing.yaml\n", ["nothing.yaml", "no such configuration file"]),
        ("base: 3\n", ["base: 3", "path of another configuration"]),
        ("model: {}\n", ["model.vocab_size is missing", "add it"]),
    ],
)
def test_mistakes_in_files(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    first = caught.value.lines[0]  # sections that these files lack come after it
    for part in parts:
        assert part in first


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"model: caf\xe9")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 10"):
        load_config(path)


@pytest.mark.parametrize("override", ["a", "=3", "model..x=3", "model.hidden_size=[", "model=3"])
def test_mistakes_in_overrides(file: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert "command line" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (MINIMAL.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"#" * 300_000, "is larger than 262144 bytes"),
        (b"model: \0", "not valid YAML"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_a_byte_order_mark_is_no_part_of_a_key(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.strip().encode())
    assert load_config(file).config.model.hidden_size == 32


@pytest.mark.timeout(30)
def test_what_is_no_end_of_a_chain(file: Path) -> None:
    for step in range(1500):
        file.with_name(f"{step}.yaml").write_text(f"base: {step + 1}.yaml\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="merge some of them"):
        load_config(file.with_name("0.yaml"))
    for base in ("/dev/zero", "x" * 300, '"a\\0b"', "."):
        child = file.with_name("child.yaml")
        child.write_text(f"base: {base}\n", encoding="utf-8")
        with pytest.raises(ConfigError):
            load_config(child)


def test_a_configuration_written_by_hand_is_not_replaced(file: Path, tmp_path: Path) -> None:
    """Where a run's folder holds the user's own file, with its comments and its base."""
    target = tmp_path / "config.yaml"
    target.write_text("# mine\nbase: other.yaml\nmodel: {hidden_size: 64}\n", encoding="utf-8")
    before = target.read_bytes()
    with pytest.raises(OutputError, match="is not a resolved configuration; move it away"):
        save_resolved(load_config(file).config, target)
    assert target.read_bytes() == before
    target.unlink()
    for _ in range(2):  # its own it replaces
        save_resolved(load_config(file).config, target)

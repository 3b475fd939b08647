"""The corners of the YAML dialect and of the rules: what is read must be written back, what is wrong is one line."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from overtok_megatron.config import dialect
from overtok_megatron.config.collisions import TOO_CLOSE, collision_problem
from overtok_megatron.config.counts import bytes_per_rank
from overtok_megatron.config.deepspeed_config import derive
from overtok_megatron.config.loading import load_config, save_resolved
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate
from overtok_megatron.planning.config_report import describe
from support.config_text import RUN, TABLES, refusal

LIKE_NUMBERS = [
    "1e-4",
    "1.5",
    "010",
    "0x1f",
    "1:30",
    "2024-01-01",
    "true",
    "on",
    "~",
    "null",
    ".inf",
    "",
    " a",
    "a: b",
    "#",
    "ä\n",
]


@pytest.mark.parametrize("text", LIKE_NUMBERS)
def test_strings_that_look_like_something_else_are_stored(run: Path, tmp_path: Path, text: str) -> None:
    config = load_config(run).config.model_copy(update={"deepspeed": {"name": text}})
    save_resolved(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml").config == config


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text("ab1e-.:_~#\n ä"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
        max_leaves=8,
    )
)
def test_the_dialect_reads_what_it_writes(value: object) -> None:
    text = yaml.dump({"key": value}, Dumper=dialect.Dumper, allow_unicode=True)
    assert dialect.parse(text, "text")[0] == {"key": value}


def test_a_failed_save_leaves_the_old_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "resolved.yaml"
    save_resolved(load_config(run).config, target)
    before = target.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("overtok_megatron.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_resolved(load_config(run, ["training.seed=7"]).config, target)
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resolved.yaml", "run.yaml"]


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ("deepspeed: &a {b: *a}\n", [":6:", "contains itself"]),
        (f"deepspeed: {'[' * 3000}\n", ["nested too deeply"]),
        ("deepspeed: {x: [{a: 1, a: 2}]}\n", [":6:", "given twice"]),
        ("deepspeed: {x: .inf}\n", [":6:", "inf", "JSON"]),
        ("deepspeed: {x: !!timestamp 2024-01-01}\n", ["JSON"]),
        ("model.hidden_size: 3\n", [":6:", "write it as hidden_size below model:"]),
        ("logging: {interval:3}\n", [":6:", "write a space after the colon"]),
        ("logging:\n\tinterval: 3\n", [":7:", "indent with spaces, not with tabs"]),
        ("logging: {interval: 3\n", [":7:", "close the bracket or the quote"]),
        ("logging: {interval: 3: 4}\n", ["not valid YAML"]),
        ("--- \nlogging: {}\n", [":6:", "one file is one configuration"]),
        ("logging: {interval: !!int x}\n", ["a `!!` tag does not fit its value"]),
        ("logging: {interval: !!int ''}\n", ["a `!!` tag does not fit its value"]),
        ("deepspeed: {x: !!bool maybe}\n", ["a `!!` tag does not fit its value"]),
        ("deepspeed: {x: !!timestamp y}\n", ["a `!!` tag does not fit its value"]),
        ("deepspeed: {? [a]: b}\n", [":6:", "a list or a mapping stands where a key must"]),
        ("deepspeed: {x: {1: 2}}\n", [":6:", "the key 1", "strings as keys"]),
        ('deepspeed: {x: "\\ud800"}\n', [":6:", "the character \\ud800"]),
        ('deepspeed: {x: "\\0"}\n', [":6:", "the character \\x00"]),
        ('"a\\nb": 3\n', [":6:", "unknown key a b"]),
        (
            "deepspeed:\n  a0: &a0 [1, 1]\n" + "".join(f"  a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
            ["aliases stand for more than 20000 values"],
        ),
        ("logging.interval.0.x: 3\n", [":6:", "unknown key"]),
        ("model: {foo.0: 3}\n", ["model is given twice"]),
        ("checkpoint: {foo.0: 3}\n", [":6:", "unknown key checkpoint.foo.0"]),
        ("deepspeed: {fp16: {enabled: true}}\n", [":6:", "use training.precision"]),
        ("deepspeed: {zero_optimization: {stage: 3}}\n", [":6:", "set parallel.zero_stage instead"]),
    ],
)
def test_what_used_to_be_a_traceback_or_a_riddle(run: Path, extra: str, parts: list[str]) -> None:
    run.write_text(RUN + extra, encoding="utf-8")
    message = refusal(run, [])
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "world", "parts"),
    [
        (["deepspeed={a: 1, a: 2}"], 1, ["command line: deepspeed", "given twice"]),
        (["training.deterministic=yes"], 1, ["'yes'", "write true"]),
        (["training.train_iters=1,000"], 1, ["'1,000'", "write 1000"]),
        (["training.train_iters='10'"], 1, ["write 10 without quotes"]),
        (["optimizer.betas=0.9, 0.95"], 1, ["write [0.9, 0.95]"]),
        (["model.hidden_size=33"], 1, ["no number does while hidden_size is not a multiple of 2, as 32 is"]),
        (["model.hidden_size"], 1, ["as model.hidden_size=value"]),
        (["tokenizer.path=null"], 1, ["command line: tokenizer.path: none; is needed"]),
        (["model.num_experts=4"], 1, ["run.yaml:1: model.num_experts_per_token: none"]),
        (["over_encoding.added.0.frozen=true"], 1, ["command line: over_encoding.added", "valid list"]),
        (["deepspeed.fp16.enabled=true"], 1, ["command line: deepspeed.fp16"]),
        (["model.hidden_size=\udcff"], 1, ["unacceptable character #xdcff"]),
        (["x" * 5000 + "=1"], 1, ["unknown key xxx"]),
        (["training.train_iters=010"], 1, ["'010'", "valid integer"]),
        (["training.train_iters=1:30"], 1, ["'1:30'", "valid integer"]),
        (["training.train_iters=1e1"], 1, ["10.0", "write 10"]),
        (["training.output_directory=''"], 1, ["training.output_directory", "at least 1 character"]),
        (["base=x.yaml"], 1, ["a base is named in a file"]),
        (["model.learning_rate=1"], 1, ["did you mean optimizer.learning_rate?"]),
        (["optimizer.lr=1"], 1, ["keys of optimizer: learning_rate"]),
        (
            ["model.num_attention_heads=3", "parallel.tensor_parallel_size=2"],
            2,
            ["model.num_attention_heads: 3", "2 does"],
        ),
        (["model.intermediate_size=97", "parallel.tensor_parallel_size=2"], 2, ["96 does"]),
        ([*TABLES, "over_encoding.table_rows=2147483642"], 1, ["at most 2147483641"]),
        ([*TABLES, "over_encoding.table_rows=1618", "over_encoding.pad_id=1000"], 1, ["0 to 999 are"]),
    ],
)
def test_one_line_with_a_way_out(run: Path, overrides: list[str], world: int, parts: list[str]) -> None:
    message = refusal(run, overrides, world)
    for part in parts:
        assert part in message


def test_the_largest_table_is_allowed(run: Path) -> None:
    loaded = load_config(run, [*TABLES, "over_encoding.table_rows=2147483641", "over_encoding.collision_check=warn"])
    validate(loaded.config, 1, loaded.locate)


@given(st.integers(2, 3000), st.integers(1, 40), st.integers(1, 12))
def test_a_proposal_is_never_itself_refused(base: int, multiple: int, tables: int) -> None:
    problem = collision_problem(base * multiple, base, tables)
    assert problem is not None
    assert problem.table == 0
    if problem.proposed_rows is None:
        sizes = range(base, 2 * base)  # every remainder once: none of them is good
        assert all(collision_problem(size, base, tables) is not None for size in sizes)
    else:
        assert collision_problem(problem.proposed_rows, base, tables) is None
        fraction = problem.proposed_rows / base % 1.0
        assert TOO_CLOSE - 1e-9 <= fraction <= 1.0 - TOO_CLOSE + 1e-9  # on the edge, rounding decides


def test_every_key_is_reported_with_its_place(run: Path) -> None:
    loaded = load_config(run, ["deepspeed.aio={block_size: 1}", "training.seed=7"])
    lines = {line.split()[0]: line for line in describe(loaded, 1).splitlines() if "." in line.split("  ")[0]}
    for section, field in RunConfig.model_fields.items():
        if section != "deepspeed":
            assert field.annotation is not None
            for name, inner in field.annotation.model_fields.items():
                assert inner.description
                assert f"{section}.{name}" in lines
    assert lines["training.seed"].endswith("command line")
    assert lines["deepspeed.aio"].endswith("command line")
    assert lines["model.hidden_size"].endswith("run.yaml:1")
    assert lines["model.rope_theta"].endswith("default")


def test_deriving_shares_nothing_with_the_configuration(run: Path) -> None:
    config = load_config(run, ["deepspeed={aio: {block_size: 1}}"]).config
    derive(config, 1)["aio"]["block_size"] = 2
    assert config.deepspeed == {"aio": {"block_size": 1}}


def test_norms_and_projection_are_on_every_tensor_rank(run: Path) -> None:
    one = load_config(run, [*TABLES, "over_encoding.table_rows=1618", "training.precision=fp32"]).config
    two = load_config(
        run, [*TABLES, "over_encoding.table_rows=1618", "training.precision=fp32", "parallel.tensor_parallel_size=2"]
    ).config
    replicated = 5 * 48 + 48 * 48  # two norms a layer and the last; the n-gram projection
    assert 2 * bytes_per_rank(two, 2).weights == bytes_per_rank(one, 1).weights + 4 * replicated

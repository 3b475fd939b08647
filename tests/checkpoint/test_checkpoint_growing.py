"""`overtok grow`: the logits of a grown model are the old model's, bit for bit; old rows move unchanged, new ones are zero."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.checkpoint import growing
from overtok_megatron.checkpoint.rows_on_disk import RowsOnDisk
from overtok_megatron.checkpoint.store import find_checkpoint, read_manifest, verify_checkpoint
from overtok_megatron.checkpoint.tables import load_rows
from overtok_megatron.checkpoint.weights_only import read_dense_weights, write_weights
from overtok_megatron.cli import main
from overtok_megatron.config.loading import load_config
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.ngram.building import row_space
from overtok_megatron.ngram.row_store import RowStore
from overtok_megatron.ngram.sharded_tables import TableReader
from support.assembling import cpu_model, cpu_reader

CPU = torch.device("cpu")
EOD, VOCAB = 3, 59
OVER = {"enabled": True, "ngram_order": 3, "num_slices": 2, "table_rows": 97, "init_std": 0.5, "combine": "scaled"}
LOOSE = ["over_encoding.collision_check=warn"]


def configuration(over: dict[str, Any], model: dict[str, Any], precision: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_layers": 2,
                      "num_attention_heads": 4, "init_std": 0.2} | model,
            "over_encoding": {"collision_check": "warn"} | over,
            "tokenizer": {"path": "none"},
            "data": {"train": "none", "seq_length": 12},
            "optimizer": {"learning_rate": 3e-3},
            "training": {"output_directory": "old", "micro_batch_size": 2, "global_batch_size": 2, "train_iters": 2,
                         "precision": precision},
        }
    )  # fmt: skip


def write_source(run: Path, config: RunConfig) -> Path:
    """Write a checkpoint of a model with its initial values, none of which is zero."""
    model, rows = cpu_model(config), []
    if config.over_encoding.enabled:
        tables = cpu_reader(config, EOD)
        assert isinstance(tables.store, RowStore)  # not a store on disk
        columns = {name: column for name, column in tables.store.columns().items() if name != "touched"}
        halves = range(0, tables.store.num_rows + 150, 150)
        rows = [(a, {name: column[a:b] for name, column in columns.items()}) for a, b in pairwise(halves)]
    return write_weights(run, config, model.named_parameters(), rows, eod_id=EOD, tokenizer_fingerprint="own")


def read_model(run: Path) -> tuple[RunConfig, dict[str, Tensor], TableReader | None, Tensor]:
    """Configuration, weights, tables, and logits of some lines [3, 12, V]."""
    path = find_checkpoint(run)
    manifest = verify_checkpoint(path)
    config = RunConfig.model_validate(manifest.config)
    model = cpu_model(config)
    weights = dict(read_dense_weights(path, manifest))
    model.load_state_dict(weights, strict=not config.model.tie_word_embeddings)
    tables = fetched = None
    tokens = torch.randint(0, 8, (3, 12), generator=torch.Generator().manual_seed(1))
    if config.over_encoding.enabled:
        tables = cpu_reader(config, EOD)
        assert isinstance(tables.store, RowStore)
        load_rows(path, tables.store)
        fetched = tables.fetch_rows(tokens)
    with torch.no_grad():
        logits = model.logits(tokens, fetched)
        if config.over_encoding.enabled:  # the rows read in place give the same
            space = row_space(config.model, config.over_encoding)
            on_disk = RowsOnDisk(path, space.total_rows, space.width, RowKernels())
            reader = cpu_reader(config, EOD, on_disk)
            assert torch.equal(model.logits(tokens, reader.fetch_rows(tokens)), logits)
    return config, weights, tables, logits


SOURCES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "plain": ({"combine": "scaled"}, {}, "fp32"),
    "plain, tied, sum, bf16": ({"combine": "sum", "row_dtype": "float32"}, {"tie_word_embeddings": True}, "bf16"),
    "mean": (OVER | {"combine": "mean", "row_dtype": "float32"}, {}, "fp32"),
    "bf16": (OVER, {}, "bf16"),
    "int8": (OVER | {"row_dtype": "int8", "combine": "sum", "ngram_order": 2}, {}, "bf16"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_grown_model_computes_what_it_computed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(*SOURCES[kind])
    write_source(tmp_path / "run-0", config)
    monkeypatch.setattr(growing, "FILE_BYTES", 20_000)  # many files, and buckets
    requests = [
        ["orders=2-4,slices=1,rows=7", "orders=2,slices=3,rows=1009"],
        ["order=5,rows=211", "orders=2-3,rows=13"],  # grown once more
    ]
    _, old_weights, _, wanted = read_model(tmp_path / "run-0")
    for number, tables in enumerate(requests):
        source, output = tmp_path / f"run-{number}", tmp_path / f"run-{number + 1}"
        words = [word for text in tables for word in ("--tables", text)]
        freeze = ["--freeze"] if config.over_encoding.enabled and number == 0 else []
        assert main(["grow", str(source), "--output", str(output), *words, *freeze]) == 0
        before, _, old_tables, _ = read_model(source)
        after, weights, new_tables, logits = read_model(output)
        assert torch.equal(logits, wanted)
        assert wanted.std() > 0.1
        assert all(torch.equal(weights[name], weight) for name, weight in old_weights.items())
        assert load_config(output / "config.yaml").config == after
        assert after.training.output_directory == str(output)
        assert new_tables is not None
        _check_rows(before, after, old_tables, new_tables)
        assert all(weights[name].std() > 0.05 for name in weights.keys() - old_weights.keys())
        assert sorted(path.name for path in output.iterdir()) == ["checkpoints", "config.yaml"]
        added = after.over_encoding.added
        assert after.over_encoding.frozen == bool(config.over_encoding.enabled)
        assert [group.frozen for group in added] == [False] * len(added)
    assert len(list((find_checkpoint(output) / "tables").iterdir())) > 3


@pytest.mark.parametrize("kind", SOURCES)
def test_a_model_with_new_heads_computes_what_it_computed(kind: str, tmp_path: Path) -> None:
    """Two depths, then a third one beside more tables: old weights and rows are unchanged, new layers are drawn as usual."""
    config = configuration(*SOURCES[kind])
    write_source(tmp_path / "run-0", config)
    _, old_weights, old_tables, wanted = read_model(tmp_path / "run-0")
    requests = [["2"], ["3", "--tables", "orders=2-3,rows=13", *LOOSE]]
    for number, (depth, *more) in enumerate(requests):
        source, output = tmp_path / f"run-{number}", tmp_path / f"run-{number + 1}"
        assert main(["grow", str(source), "--output", str(output), "--multi-token-prediction", depth, *more]) == 0
        after, weights, tables, logits = read_model(output)
        assert torch.equal(logits, wanted)
        assert all(torch.equal(weights[name], weight) for name, weight in old_weights.items())
        assert after.multi_token_prediction.depth == int(depth)
        assert load_config(output / "config.yaml").config == after
        drawn = dict(cpu_model(after).named_parameters())
        heads = [name for name in weights.keys() - old_weights.keys() if name.startswith("multi_token.")]
        assert {name.split(".")[2] for name in heads} == ({"0", "1"}, {"2"})[number]
        assert all(torch.equal(weights[name], drawn[name]) for name in heads)
        if number == 0 and old_tables is not None:
            assert tables is not None and isinstance(tables.store, RowStore) and isinstance(old_tables.store, RowStore)
            for name, column in old_tables.store.columns().items():
                assert torch.equal(column, tables.store.columns()[name])
        old_weights = weights


def test_buckets_that_a_killed_call_left_are_not_read(tmp_path: Path) -> None:
    write_source(tmp_path / "old", configuration(OVER, {}, "fp32"))
    left = tmp_path / "new" / growing.SCRATCH
    left.mkdir(parents=True)
    (left / "0-row-ids").write_bytes(bytes(8))
    (left / "0-weight").write_bytes(b"cut")
    words = ["--tables", GOOD, *LOOSE]
    assert main(["grow", str(tmp_path / "old"), "--output", str(tmp_path / "new"), *words]) == 0
    assert torch.equal(read_model(tmp_path / "new")[3], read_model(tmp_path / "old")[3])
    assert not left.exists()


def _check_rows(before: RunConfig, after: RunConfig, old_tables: TableReader | None, tables: TableReader) -> None:
    """Every row of each table is found under its new row id."""
    new = row_space(after.model, after.over_encoding)
    assert isinstance(tables.store, RowStore)
    columns = tables.store.columns()
    kept = 0
    if old_tables is not None:
        old = row_space(before.model, before.over_encoding)
        assert isinstance(old_tables.store, RowStore)
        kept = old.num_tables
        for name, column in old_tables.store.columns().items():
            for table in range(kept):
                assert torch.equal(columns[name][new.row_ids_of_table(table)], column[old.row_ids_of_table(table)])
    for table in range(kept, new.num_tables):
        assert not columns["weight"][new.row_ids_of_table(table)].any()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_source(folder / "plain", configuration({}, {}, "fp32"))
    write_source(folder / "over", configuration(OVER, {}, "fp32"))
    return folder


GOOD = "orders=2-3,slices=2,rows=1618"
SUM = "over_encoding.combine=sum"


@pytest.mark.parametrize(
    ("run", "words", "parts"),
    [
        ("plain", ["--tables", GOOD], ["over_encoding.combine: mean", "combine=scaled"]),
        (
            "plain",
            ["--tables", GOOD, "over_encoding.combine=sum", "over_encoding.word_embedding=false"],
            ["over_encoding.word_embedding: false", "write true"],
        ),
        ("plain", ["--tables", GOOD, "--freeze"], ["--freeze", "leave it out"]),
        ("plain", ["--tables", "order=3,rows=1618", SUM], ["orders 3-3", "write orders=2-3"]),
        ("plain", ["--tables", "orders=2-6,rows=1618", SUM], ["5 tables", "row_width"]),
        (
            "plain",
            ["--tables", "orders=2,rows=5900", SUM, "over_encoding.collision_check=error"],
            ["error: --tables: over_"],
        ),
        ("over", ["--tables", "orders=2-3,rows=5900", "over_encoding.collision_check=error"], ["100.00", "added"]),
        ("over", ["--tables", "orders=2-3,rows=2147483647"], ["entry 0, table_rows 2147483647", "at most"]),
        ("over", ["--tables", "orders=1-3,rows=9"], ["orders=1-3", "from 2 on"]),
        ("over", ["--tables", "orders=3-2,rows=9"], ["orders=3-2", "from 2 on"]),
        ("over", ["--tables", "orders=2,rows=0"], ["rows must be"]),
        ("over", ["--tables", "orders=2,rows=9,slice=1"], ["'slice=1'", "write orders=2-3"]),
        ("over", ["--tables", "rows=9"], ["gives no orders"]),
        ("over", ["--tables", GOOD, "over_encoding.table_rows=99"], ["over_encoding.table_rows: 99", "97"]),
        ("over", ["--tables", GOOD, "model.num_layers=3"], ["model: num_layers 3", "leave it as it is"]),
        ("over", ["--tables", GOOD, "training.precision=bf16"], ["training.precision: bf16"]),
        ("over", ["--tables", GOOD, "over_encoding.added=[]"], ["over_encoding.added", "leave it out"]),
        ("over", ["--tables", GOOD, "over_encoding.adding=1"], ["unknown key over_encoding.adding", "added"]),
        ("over", ["--tables", GOOD, "training.output_directory=x"], ["--output says"]),
        ("over", [], ["give --tables, --multi-token-prediction, or both"]),
        ("over", ["--multi-token-prediction", "0"], ["--multi-token-prediction: 0", "from 1 to 64"]),
        ("over", ["--multi-token-prediction", "65"], ["--multi-token-prediction: 65", "from 1 to 64"]),
        ("over", ["--multi-token-prediction", "12"], ["multi_token_prediction.depth: 12", "11 is the most"]),
        ("over", ["--multi-token-prediction", "1", "--freeze"], ["--freeze", "write --tables as well"]),
        ("over", ["--tables", GOOD, "over_decoding.num_tokens=2"], ["over_decoding.num_tokens: 2", "the model has 1"]),
        ("nothing", ["--tables", GOOD], ["no checkpoint here"]),
    ],
)
def test_mistakes_are_one_line(
    run: str, words: list[str], parts: list[str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["grow", str(runs / run), "--output", str(tmp_path / "new"), *words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    for part in parts:
        assert part in message
    assert not (tmp_path / "new").exists()


def test_what_is_damaged_or_there_already_is_named(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tables", GOOD, *LOOSE]
    assert main(["grow", str(runs / "over"), "--output", str(runs / "plain"), *words]) == 2
    assert "holds checkpoints already" in capsys.readouterr().err
    write_source(tmp_path / "old", configuration(OVER, {}, "fp32"))
    file = next(find_checkpoint(tmp_path / "old").glob("tables/rows-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["grow", str(tmp_path / "old"), "--output", str(tmp_path / "new"), *words]) == 2
    assert str(file) in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert read_manifest(find_checkpoint(runs / "plain")).step == 0

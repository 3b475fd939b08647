"""Checkpoints are complete or invisible; tables and weights written by some ranks are read by any other number."""

from pathlib import Path

import pytest
import torch

from overtok_megatron.checkpoint import store as store_module
from overtok_megatron.checkpoint import tables as tables_module
from overtok_megatron.checkpoint.dense import load_dense, save_dense
from overtok_megatron.checkpoint.store import CheckpointStore, Manifest, file_digest, read_manifest, verify_file
from overtok_megatron.checkpoint.tables import load_tables, save_tables
from overtok_megatron.errors import CheckpointError
from overtok_megatron.ngram.embedding import OverEncoding, OverTables
from overtok_megatron.ngram.exchange import RowExchange
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.optimizer import build_row_optimizer
from overtok_megatron.ngram.sizing import RowSpace, row_bounds
from overtok_megatron.ngram.table import TableShard

CPU = torch.device("cpu")


def publish(store: CheckpointStore, step: int, content: bytes = b"weights") -> Path:
    folder = store.begin(step)
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_bytes(content)
    digest = file_digest(folder / "sub" / "file")
    return store.publish(Manifest(step, step * 4, {}, {}, 0, "none", {"sub/file": digest}))


def test_a_checkpoint_is_complete_or_invisible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    first = publish(store, 1)
    assert store.latest() == first

    def killed(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(store, 2)
    assert store.latest() == first
    assert store.complete() == [first]
    assert store.clean() == ["step_00000002.partial"]
    assert not list(store.root.glob("*.partial"))
    second, third = publish(store, 2), publish(store, 3)
    assert publish(store, 3, b"again") == third  # a resumed run comes by again
    store.keep_last(2)
    assert store.complete() == [second, third]
    store.begin(4)
    store.discard(4)
    assert store.latest() == third


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = publish(store, 7, bytes(range(100)))
    manifest = read_manifest(path)
    assert (manifest.step, manifest.consumed_samples) == (7, 28)
    file = path / "sub" / "file"
    for place in (0, 50, 99):
        content = bytearray(range(100))
        content[place] ^= 1
        file.write_bytes(bytes(content))
        read_manifest(path)
        with pytest.raises(CheckpointError, match="file: SHA-256 differs"):
            verify_file(path, "sub/file", manifest)
    file.write_bytes(bytes(99))
    with pytest.raises(CheckpointError, match="file: 99 bytes, 100 were written"):
        read_manifest(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="file: missing"):
        read_manifest(path)
    for text, reason in (("{}", "unreadable"), ("[", "unreadable"), ((path / "manifest.json").read_text(), "missing")):
        (path / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=reason) as caught:
            read_manifest(path)
        assert "\n" not in str(caught.value)
    (store.root / "latest").write_text("step_00000099")
    with pytest.raises(CheckpointError, match="step_00000099"):
        store.latest()


def make_tables(
    bounds: tuple[int, ...], rank: int, optimizer: str = "adam", width: int = 6, std: float = 0.0
) -> OverTables:
    """A rank's tables without its processes: nothing here talks to another rank."""
    space = RowSpace(2, 2, 40, width)
    shard = TableShard(bounds[rank], bounds[rank + 1], width, std=std, seed=1, device=CPU)
    rows = build_row_optimizer(
        optimizer, shard.weight, weight_decay=0, betas=(0.9, 0.9), eps=1e-8, state_dtype=torch.float32
    )
    encoder = OverEncoding(2 * width, 2, combine="sum")
    exchange = RowExchange((0, space.total_rows), None)
    return OverTables(encoder, NgramHash(space, 50, 0, "reset", 0), shard, rows, exchange, dtype=torch.float32)


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_any_number_of_ranks_reads_what_three_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers: int
) -> None:
    monkeypatch.setattr(tables_module, "_FILE_BYTES", 1000)  # several files a rank
    total = 82
    bounds = row_bounds(total, 3)
    written = [make_tables(bounds, rank, std=1.0) for rank in range(3)]
    names = []
    for tables in written:
        touched = torch.arange(0, tables.shard.num_rows, 3)
        tables.optimizer.update(touched, torch.randn(len(touched), 6), 0.1)
        tables.shard.touched[touched] = True
        names += save_tables(tmp_path, tables)
    assert len(names) > 6
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")) == sorted(names)
    bounds = row_bounds(total, readers)
    read = [make_tables(bounds, rank) for rank in range(readers)]
    for tables in read:
        load_tables(tmp_path, tables, with_optimizer=True)
        assert tables.optimizer.steps == 1
    for get in (
        lambda t: t.shard.weight,
        lambda t: t.shard.touched,
        lambda t: t.optimizer.state["exp_avg"],
        lambda t: t.optimizer.state["exp_avg_sq"],
    ):
        assert torch.equal(torch.cat([get(t) for t in read]), torch.cat([get(t) for t in written]))


def test_tables_that_do_not_fit(tmp_path: Path) -> None:
    names = save_tables(tmp_path, make_tables((0, 82), 0))
    with pytest.raises(CheckpointError, match=r"shape \[6\], this model needs \[4\]"):
        load_tables(tmp_path, make_tables((0, 82), 0, width=4), with_optimizer=False)
    with pytest.raises(CheckpointError, match=r"over_encoding\.optimizer"):
        load_tables(tmp_path, make_tables((0, 82), 0, optimizer="rowwise_adagrad"), with_optimizer=True)
    (tmp_path / names[0]).unlink()
    with pytest.raises(CheckpointError, match="holds 0 of the rows 0 to 82"):
        load_tables(tmp_path, make_tables((0, 82), 0), with_optimizer=False)


def test_split_weights_are_joined(tmp_path: Path) -> None:
    rows, columns, norm = torch.randn(5, 3), torch.randn(4, 7), torch.randn(3)
    for rank, (a, b) in enumerate(((slice(0, 3), slice(0, 4)), (slice(3, 5), slice(4, 7)))):
        state = {"rows": rows[a], "columns": columns[:, b], "norm": norm}
        save_dense(tmp_path, state, {"rows": 0, "columns": 1}, rank, 2)
    loaded = load_dense(tmp_path, 2)
    assert torch.equal(loaded["rows"], rows)
    assert torch.equal(loaded["columns"], columns)
    assert torch.equal(loaded["norm"], norm)

"""A checkpoint is complete or invisible whenever a process dies; whatever is wrong with one is said in a line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from overtok_megatron.checkpoint import store as store_module
from overtok_megatron.checkpoint.layout import CheckpointLayout
from overtok_megatron.checkpoint.store import (
    CheckpointStore,
    Manifest,
    file_digest,
    find_checkpoint,
    read_manifest,
    verify_checkpoint,
    verify_file,
    write_atomically,
)
from overtok_megatron.inference.loading import load_trained
from support.expect_error import expect_error

CONTENT = bytes(range(64))


class Killed(BaseException):
    """Stands for a signal: no handler for errors sees it."""


def fill(store: CheckpointStore, step: int, content: bytes = CONTENT) -> Manifest:
    """A partial folder with a file in a subfolder, and its manifest."""
    folder = store.start_save(step)
    (folder / "tables").mkdir()
    (folder / "tables" / "rows").write_bytes(content)
    digest = file_digest(folder / "tables" / "rows")
    return Manifest(
        step=step,
        consumed_samples=step * 4,
        config={"model": {}},
        layout=CheckpointLayout(zero_stage=1),
        eod_id=0,
        tokenizer_fingerprint="abc",
        files={"tables/rows": digest},
    )


def publish(store: CheckpointStore, step: int, content: bytes = CONTENT) -> Path:
    return store.publish(fill(store, step, content))


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """The call number `call` (from 0) of owner.name kills the process before it does anything."""
    real, calls = getattr(owner, name), iter(range(100))

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, killed)


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    assert store.complete() == []
    assert store.clean() == []
    path = publish(store, 12)
    manifest = read_manifest(path)
    assert path == tmp_path / "checkpoints" / "step_00000012"
    assert (manifest.step, manifest.consumed_samples, manifest.eod_id) == (12, 48, 0)
    assert manifest.files["tables/rows"] == file_digest(path / "tables" / "rows")
    assert (store.root / "latest").read_text() == path.name
    assert store.latest() == find_checkpoint(tmp_path) == find_checkpoint(path) == path


def test_partial_folders_are_invisible_and_cleaned(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    folder = store.start_save(3)
    (folder / "manifest.json").write_text("{}")
    assert store.latest() is None
    assert store.complete() == []
    expect_error(lambda: find_checkpoint(tmp_path), str(tmp_path), "no checkpoint here; name")
    expect_error(lambda: find_checkpoint(tmp_path / "x"), "no checkpoint here (the folder does not exist)")
    path = publish(store, 2)
    (store.root / "latest.partial").write_text("step_00000003")
    assert store.complete() == [path]
    assert store.latest() == path
    assert sorted(store.clean()) == ["latest.partial", "step_00000003.partial"]
    assert sorted(entry.name for entry in store.root.iterdir()) == ["latest", path.name]
    read_manifest(path)


def test_starting_a_save_empties_and_discarding_removes(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (store.start_save(1) / "left").write_bytes(b"over")
    assert list(store.start_save(1).iterdir()) == []
    store.discard(1)
    store.discard(1)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("call", [0, 1, 2, 3])  # the manifest, its digest, the folder, the pointer
def test_a_kill_while_publishing_keeps_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    store = CheckpointStore(tmp_path)
    first = publish(store, 1)
    manifest = fill(store, 2)
    with monkeypatch.context() as patch:
        kill_at(patch, store_module.os, "replace", call)
        with pytest.raises(Killed):
            store.publish(manifest)
    assert store.latest() == first
    for path in store.complete():
        verify_file(path, "tables/rows", read_manifest(path))
    assert len(store.complete()) == (2 if call == 3 else 1)
    store.clean()
    assert not list(store.root.glob("*.partial"))
    assert store.latest() == first
    assert publish(store, 2) == store.latest()


@pytest.mark.parametrize(
    ("function", "call", "content"),
    # at the third replacement neither folder has the name: the next start puts the old one back
    [
        ("replace", 0, b"old"),
        ("replace", 1, b"old"),
        ("replace", 2, b"old"),
        ("replace", 3, b"old"),
        ("replace", 4, b"new"),
        ("replace", 5, b"new"),
        ("rmtree", 0, b"new"),
        ("rmtree", 1, b"new"),
    ],
)
def test_a_step_published_again_replaces_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int, content: bytes
) -> None:
    store = CheckpointStore(tmp_path)
    publish(store, 5, b"old")
    manifest = fill(store, 5, b"new")
    with monkeypatch.context() as patch:
        kill_at(patch, store_module.os if function == "replace" else shutil, function, call)
        with pytest.raises(Killed):
            store.publish(manifest)
    store.clean()  # what the next start does first
    latest = store.latest()
    assert latest is not None
    assert (latest / "tables" / "rows").read_bytes() == content
    verify_file(latest, "tables/rows", read_manifest(latest))
    assert store.complete() == [latest]
    assert publish(store, 5, b"newer") == latest
    verify_file(latest, "tables/rows", read_manifest(latest))
    assert sorted(entry.name for entry in store.root.iterdir()) == ["latest", latest.name]


def test_keep_last(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    paths = [publish(store, step) for step in (1, 9, 10, 100)]
    (store.root / "step_notes.txt").write_text("not a checkpoint")
    store.prune(9)
    assert store.complete() == paths
    store.prune(2)
    assert store.complete() == paths[2:]
    store.prune(1)
    assert store.complete() == paths[3:]
    assert store.latest() == paths[3]
    assert (store.root / "step_notes.txt").exists()
    assert not list(store.root.glob("*.partial"))


def test_keep_every(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    paths = {step: publish(store, step) for step in (5, 10, 15, 20, 25, 30)}
    assert store.prune(2, 10) == [paths[5], paths[15]]
    assert store.complete() == [paths[step] for step in (10, 20, 25, 30)]


def test_keep_last_spares_the_latest_of_a_pointer_turned_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 8, 9):
        publish(store, step)
    (store.root / "latest").write_text("step_00000002")
    path = publish(store, 3)
    store.prune(1)
    assert store.latest() == path
    assert [kept.name for kept in store.complete()] == ["step_00000003", "step_00000009"]


def test_a_kill_while_removing_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    paths = [publish(store, step) for step in (1, 2)]

    def halfway(path: Path, **_: Any) -> None:
        if (path / "tables" / "rows").exists():
            (path / "tables" / "rows").unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", halfway)
        with pytest.raises(Killed):
            store.prune(1)
    assert store.complete() == paths[1:]
    store.clean()
    assert sorted(entry.name for entry in store.root.iterdir()) == ["latest", paths[1].name]


def test_a_small_file_is_replaced_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "latest"
    write_atomically(file, "one")
    with monkeypatch.context() as patch:
        kill_at(patch, store_module.os, "replace", 0)
        with pytest.raises(Killed):
            write_atomically(file, "two")
    assert file.read_text() == "one"
    write_atomically(file, "three")
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest"]
    assert file.read_text() == "three"


@pytest.mark.parametrize("text", ["step_00000099", "", "step\n00000099\n", "\udcff\udcfe", "../elsewhere"])
def test_a_dangling_pointer_is_named(tmp_path: Path, text: str) -> None:
    store = CheckpointStore(tmp_path)
    publish(store, 1)
    (store.root / "latest").write_bytes(text.encode("utf-8", "surrogateescape"))
    expect_error(store.latest, str(store.root / "latest"), "not there")
    expect_error(lambda: find_checkpoint(tmp_path), str(store.root / "latest"))
    (store.root / "latest").write_text("step_00000001\n")  # by hand, with an editor
    assert store.latest() == store.root / "step_00000001"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "unreadable"),
        (b"[", "unreadable"),
        (b"\xff\xfe", "unreadable"),
        (b"{}", "unreadable"),
        (b"[]", "unreadable"),
        (b"7", "unreadable"),
        (b"null", "unreadable"),
        (b'{"name": "left-pad", "version": "1.0.0", "files": ["index.js"]}', "unreadable"),
        (b'{"format": 3, "files": ["index.js"]}', "unreadable"),
        (b'{"format": 3, "files": {"rows": []}}', "unreadable"),
        (b'{"format": 3, "files": {"rows": 3}}', "unreadable"),
        (b'{"format": 3, "files": {}}', "unreadable"),
        (b'{"format": 3, "files": {}, "layout": 7}', "layout: 7 is not a mapping"),
        (b'{"format": 9, "pieces": {}}', "format 9, this version reads 3"),
        (b'{"format": "pt"}', "format pt, this version reads 3"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = publish(CheckpointStore(tmp_path), 1)
    (path / "manifest.json").unlink()
    if content is not None:
        (path / "manifest.json").write_bytes(content)
    expect_error(lambda: read_manifest(path), str(path / "manifest.json"), reason)


def test_another_format_is_named_whatever_else_changed(tmp_path: Path) -> None:
    path = publish(CheckpointStore(tmp_path), 1)
    raw = json.loads((path / "manifest.json").read_text())
    for extra in ({"format": 9}, {"format": 9, "parts": []}):
        (path / "manifest.json").write_text(json.dumps(raw | extra))
        expect_error(lambda: read_manifest(path), "manifest.json: format 9, this version reads 3")
    (path / "manifest.json").write_text(json.dumps(raw | {"parts": []}))
    expect_error(lambda: read_manifest(path), "manifest.json: unreadable", "parts")
    cut = json.dumps(raw)[:-20]
    (path / "manifest.json").write_text(cut)
    expect_error(lambda: read_manifest(path), "manifest.json: unreadable")


def test_missing_and_cut_files_are_named(tmp_path: Path) -> None:
    path = publish(CheckpointStore(tmp_path), 1)
    file = path / "tables" / "rows"
    for content in (CONTENT[:-1], b"", CONTENT + b"x"):
        file.write_bytes(content)
        expect_error(lambda: read_manifest(path), str(file), f"{len(content)} bytes, 64 were written")
        expect_error(lambda: load_trained(tmp_path, torch.device("cpu")), str(file))
    file.unlink()
    expect_error(lambda: read_manifest(path), f"{file}: missing")
    file.mkdir()
    expect_error(lambda: read_manifest(path), f"{file}: missing")


def test_a_flipped_bit_is_found_anywhere(tmp_path: Path) -> None:
    path = publish(CheckpointStore(tmp_path), 1)
    verify_checkpoint(path)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        content = file.read_bytes()
        for index in range(len(content)):
            damaged = bytearray(content)
            damaged[index] ^= 1 << index % 8
            file.write_bytes(bytes(damaged))
            expect_error(lambda: verify_checkpoint(path), str(path))
        file.write_bytes(content)
    verify_checkpoint(path)

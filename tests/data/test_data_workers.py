"""Preparing by several processes: the same bytes for any number of workers and after kills; shares of the documents."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.preparing.journal import Journal
from overtok_megatron.data.preparing.prepare import SPLIT, Plan, prepare_sets
from overtok_megatron.data.preparing.sources import ReadOptions
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.bytes import ByteTokenizer
from overtok_megatron.errors import DataError

READING = ReadOptions(separator="\n\n")
SHARES = (0.8, 0.15, 0.05)
FILES = sotu_files()[:30]
RUN = """
import sys, time
from pathlib import Path
from overtok_megatron.data.preparing import encoding
from overtok_megatron.data.tokenizers.bytes import ByteTokenizer
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.preparing.prepare import Plan, prepare_sets
from overtok_megatron.data.preparing.sources import ReadOptions
encoding.CHUNK_BYTES = 20_000
plan = Plan(ReadOptions(separator="\\n\\n"), (0.8, 0.15, 0.05), workers=2, journal_seconds=0)
prepare_sets(sotu_files()[:30], sys.argv[1], ByteTokenizer(), plan, lambda size: time.sleep(0.1))
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The three sets, made by one process without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    prepare_sets(FILES, folder / "set", ByteTokenizer(), Plan(READING, SHARES))
    return content(folder)


def test_shares_follow_the_text(whole: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    sets = [IndexedDataset(tmp_path / f"set-{name}") for name in SPLIT]
    texts = [[bytes(part).decode() for part in bytes_of(one)] for one in sets]
    everything = [part for path in FILES for part in path.read_text(encoding="utf-8").split("\n\n") if part]
    assert sorted(text for part in texts for text in part) == sorted(everything)
    assert not set(texts[0]) & set(texts[1]) | set(texts[0]) & set(texts[2]) | set(texts[1]) & set(texts[2])
    for part, share in zip(texts, SHARES, strict=True):
        assert len(part) / len(everything) == pytest.approx(share, abs=0.04)
    for one in sets:
        one.verify()


def bytes_of(dataset: IndexedDataset) -> list[list[int]]:
    stream, start, found = dataset.tokens(0, dataset.num_tokens).tolist(), 0, []
    for length in dataset.document_lengths.tolist():
        assert stream[start + length - 1] == 256
        found.append(stream[start : start + length - 1])
        start += length
    return found


def test_workers_do_not_show(whole: dict[str, bytes], tmp_path: Path) -> None:
    told: list[int] = []
    prepare_sets(FILES, tmp_path / "set", ByteTokenizer(), Plan(READING, SHARES, workers=3), told.append)
    assert content(tmp_path) == whole
    assert sum(told) == sum(path.stat().st_size for path in FILES)


def test_kills_do_not_show(whole: dict[str, bytes], tmp_path: Path) -> None:
    """kill -9 at several moments: nothing that was made is lost, nothing comes twice, and no worker stays behind."""
    reached = []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path / "set")])
        wait_for_position(tmp_path / "set.journal", reached[-1] if reached else (-1, -1))
        workers = children(process.pid)
        process.kill()
        process.wait()
        assert not list(tmp_path.glob("*.json"))
        reached.append(position(tmp_path / "set.journal"))
        assert len(workers) == 2
        wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))  # noqa: B023  # called at once
    assert reached[0] < reached[1]
    told: list[int] = []
    prepare_sets(FILES, tmp_path / "set", ByteTokenizer(), Plan(READING, SHARES), told.append)
    assert told[0] > 0
    assert sum(told) == sum(path.stat().st_size for path in FILES)
    assert content(tmp_path) == whole


def position(journal: Path) -> tuple[int, int]:
    """(file, offset) of the last whole record; (-1, -1) before the first."""
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    records = [json.loads(line) for line in lines]
    return tuple(records[-1]["position"][:2]) if records and "position" in records[-1] else (-1, -1)


def wait_for_position(journal: Path, before: tuple[int, int]) -> None:
    wait_until(lambda: position(journal) > before)


def wait_until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue
    return found


@pytest.mark.parametrize("killed_after", range(7))  # renames and removals of the last phase
def test_a_kill_while_sets_get_their_names(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    prepare_sets(FILES[:9], tmp_path / "set", ByteTokenizer(), Plan(READING, SHARES))  # an older set
    count = 0
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count > killed_after:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_sets(FILES, tmp_path / "set", ByteTokenizer(), Plan(READING, SHARES))
    monkeypatch.undo()
    prepare_sets(FILES, tmp_path / "set", ByteTokenizer(), Plan(READING, SHARES))
    assert content(tmp_path) == whole


def test_what_another_job_left_is_not_gone_on_from(whole: dict[str, bytes], tmp_path: Path) -> None:
    def interrupt(size: int) -> None:
        if size:
            raise KeyboardInterrupt

    source = tmp_path / "in"
    source.mkdir()
    for path in FILES:
        shutil.copy2(path, source)
    files = [source / path.name for path in FILES]
    plan = Plan(READING, SHARES, journal_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        prepare_sets(files, tmp_path / "out" / "set", ByteTokenizer(), plan, interrupt)
    assert position(tmp_path / "out" / "set.journal") > (-1, -1)
    files[0].write_text("changed meanwhile")
    prepare_sets(files, tmp_path / "out" / "set", ByteTokenizer(), plan)
    anew = content(tmp_path / "out")
    prepare_sets(files, tmp_path / "anew" / "set", ByteTokenizer(), plan)
    assert content(tmp_path / "anew") == anew != whole


def test_a_killed_call_for_other_sets_leaves_nothing_behind(tmp_path: Path) -> None:
    """The parts of its sets go when its journal does; those of another call, which has a journal, stay."""

    def interrupt(size: int) -> None:
        if size:
            raise KeyboardInterrupt

    plans = [Plan(READING, SHARES, journal_seconds=0), Plan(READING, journal_seconds=0)]
    for first, second in (plans, reversed(plans)):
        folder = tmp_path / str(first.shares)
        with pytest.raises(KeyboardInterrupt):
            prepare_sets(FILES, folder / "set", ByteTokenizer(), first, interrupt)
        assert list(folder.glob("*.partial"))
        prepare_sets(FILES, folder / "set", ByteTokenizer(), second)
        assert not list(folder.glob("*.partial")) + list(folder.glob("*.journal"))
    with pytest.raises(KeyboardInterrupt):
        prepare_sets(FILES, tmp_path / "set-train", ByteTokenizer(), plans[1], interrupt)
    other = content_of(tmp_path)
    for plan, killed in ((plans[1], interrupt), (Plan(), lambda size: None)):
        with pytest.raises(KeyboardInterrupt) if killed is interrupt else nullcontext():
            prepare_sets(FILES, tmp_path / "set", ByteTokenizer(), plan, killed)
    assert {name: data for name, data in content_of(tmp_path).items() if "set-train" in name} == other


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_two_jobs_on_one_prefix(tmp_path: Path) -> None:
    first = Journal(tmp_path / "set.journal")
    with pytest.raises(DataError, match="another process is writing"):
        prepare_sets(FILES, tmp_path / "set", ByteTokenizer(), Plan(READING))
    first.close()


def test_a_share_without_a_document(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 2 documents falls into its share"):
        prepare_sets(FILES[:2], tmp_path / "set", ByteTokenizer(), Plan(shares=(0.98, 0.01, 0.01)))
    assert list(tmp_path.iterdir()) == []


class _Dies(ByteTokenizer):
    """Takes its process with it."""

    def encode_batch(self, texts: list[str], threads: int = -1) -> list[list[int]]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def test_a_worker_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(DataError, match=r"ended with code -9.*fewer --workers"):
        prepare_sets(FILES[:2], tmp_path / "set", _Dies(), Plan(workers=2))
    assert list(tmp_path.iterdir()) == []

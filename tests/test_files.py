"""Files are written whole or not at all, follow the umask, and never replace what is not ours; texts of any encoding."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from overtok_megatron.checkpoint.writing import save_tensors
from overtok_megatron.errors import OutputError
from overtok_megatron.files import (
    EncodingError,
    decode_text,
    refuse_foreign,
    refuse_inputs,
    refuse_used_folder,
    shown,
    whole_file,
    whole_folder,
    write_atomically,
)

UMASKS = {0o002: 0o664, 0o022: 0o644, 0o027: 0o640, 0o077: 0o600}


@pytest.fixture(params=UMASKS)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_tensors_follow_the_umask(umask: int, tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(3)}, tmp_path / "a.safetensors", {})
    write_atomically(tmp_path / "b", "text")
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == UMASKS[umask], path
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    (tmp_path / "file.partial").write_text("a user's own")

    def interrupted() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"file": "old", "file.partial": "a user's own"}
    write_atomically(path, "new")
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"file": "new", "file.partial": "a user's own"}


def test_folders_come_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"

    def interrupted() -> None:
        with whole_folder(path) as aside:
            (aside / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with whole_folder(path) as killed:  # one whose process is gone
        (killed / "half").touch()
        os.rename(killed, tmp_path / "kept")
        killed.mkdir()
        (killed / "overtok.partial").touch()
    os.rename(tmp_path / "kept", tmp_path / "model.partial")
    path.rmdir()
    with whole_folder(path) as aside:
        (aside / "whole").touch()
    assert [one.name for one in path.iterdir()] == ["whole"]
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_somebody_else_beside_it_stays(tmp_path: Path) -> None:
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "thesis").touch()
    with pytest.raises(OutputError, match=r"model\.partial: is there already"), whole_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model.partial" / "thesis").exists()


def test_what_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    refuse_foreign(path, False, "ours")
    path.touch()
    refuse_foreign(path, True, "ours")
    refuse_foreign(path, lambda one: one == path, "ours")
    with pytest.raises(OutputError, match=r"file: is there already and is not ours; move it away, or name another --o"):
        refuse_foreign(path, False, "ours")
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(OutputError):
        refuse_foreign(path, True, "ours")
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError):
        refuse_foreign(path, True, "ours")
    refuse_used_folder(path)
    (path / "a").touch()
    (path / ".lock.ranks").touch()
    refuse_used_folder(path, allowed=["a"])
    with pytest.raises(OutputError, match="is not empty"):
        refuse_used_folder(path)
    with pytest.raises(OutputError, match="is not a folder"):
        refuse_used_folder(path / "a")


def test_an_input_is_known_by_every_name(tmp_path: Path) -> None:
    path, link, hard, other = (tmp_path / name for name in ("a", "link", "hard", "other"))
    path.touch()
    other.touch()
    link.symlink_to(path)
    os.link(path, hard)
    refuse_inputs([tmp_path / "absent", other], [path, link, hard])
    for output in (path, link, hard):
        for given in (path, link, hard, tmp_path / "." / "a"):
            with pytest.raises(OutputError, match="is an input"):
                refuse_inputs([output], [other, given])


@pytest.mark.parametrize("text", ["", "a", "naïve\n", "\ufeffa", "a\x00b", "\x00\x00\x00\x00", "x" * 3000 + "é"])
def test_texts_come_back(text: str) -> None:
    assert decode_text(b"\xef\xbb\xbf" + text.encode()) == text
    assert decode_text(text.encode()) == text.removeprefix("\ufeff")
    assert decode_text(text.encode(), 7) == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text".encode("utf-16"), "UTF-16 by its byte-order mark"),
        ("text".encode("utf-16-le"), "UTF-16LE by its zero bytes"),
        ("text".encode("utf-16-be"), "UTF-16BE by its zero bytes"),
        ("日本".encode("utf-16"), "UTF-16 by its byte-order mark"),
        ("text".encode("utf-32"), "UTF-32 by its byte-order mark"),
        (b"na\xefve", "not UTF-8 at byte 2"),
        (b"\xef\xbb\xbfna\xefve", "not UTF-8 at byte 5"),
    ],
)
def test_other_encodings_are_named(content: bytes, said: str) -> None:
    with pytest.raises(EncodingError, match=f"^{said}.*iconv"):
        decode_text(content)


def test_names_are_shown_in_one_line() -> None:
    assert shown(Path("a\nb\udcff\x1b[31m naïve")) == "a\\nb\\udcff\\x1b[31m naïve"

"""A token that the first host writes into a folder: seen where the folder is shared, also late, and nowhere else."""

import threading
import time
from pathlib import Path

import pytest

from overtok_megatron.launching import shared_folder
from overtok_megatron.launching.shared_folder import sees_token, token_in


def test_a_token_is_seen_in_its_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "SEEN_WITHIN", 0.2)
    other = tmp_path / "other"
    other.mkdir()
    with token_in(tmp_path) as token:
        assert sees_token(tmp_path, token)
        assert not sees_token(other, token)
        assert not sees_token(tmp_path / "missing", token)
    assert not sees_token(tmp_path, token)
    assert list(tmp_path.iterdir()) == [other]


def test_a_folder_that_shows_its_files_late(tmp_path: Path) -> None:
    """As a network file system does, which may show a new file empty at first."""
    late = shared_folder.RunFolder(tmp_path).start_token("word")

    def appear() -> None:
        time.sleep(0.3)
        late.touch()
        time.sleep(0.3)
        late.write_text("word", encoding="utf-8")

    thread = threading.Thread(target=appear)
    thread.start()
    try:
        assert sees_token(tmp_path, "word")
    finally:
        thread.join()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), token_in(tmp_path / "missing"):
        pass

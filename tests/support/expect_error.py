"""Errors as a user reads them: one line that names what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overtok_megatron.cli import main
from overtok_megatron.errors import CheckpointError


def expect_error(action: Callable[[], Any], *parts: str) -> None:
    """A CheckpointError of one line that names the parts."""
    with pytest.raises(CheckpointError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def command_error(capsys: pytest.CaptureFixture[str], *words: object, alone: bool = True) -> str:
    """The line with which a command fails; where it is not alone, libraries may have written others beside it."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert not alone or lines == errors, lines
    return errors[0]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command_refusal(folder: Path, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The line with which a command is refused; no file below `folder` has changed by it."""
    before = files_below(folder)
    error = command_error(capsys, *words)
    assert files_below(folder) == before
    return error

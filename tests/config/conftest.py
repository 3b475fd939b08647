"""The configuration that tests of several files change."""

from pathlib import Path

import pytest

from support.config_text import RUN


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A small complete configuration in a file of its own."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path

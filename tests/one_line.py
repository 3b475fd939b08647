"""Errors of checkpoints, as a user reads them."""

from collections.abc import Callable
from typing import Any

import pytest

from overtok_megatron.errors import CheckpointError


def fails(action: Callable[[], Any], *parts: str) -> None:
    """CheckpointError of one line that names the parts."""
    with pytest.raises(CheckpointError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text

"""Whether all hosts see the same folder: the first host writes a token into a file there, which the other hosts must read.

The file's name is new each time, because network file systems cache for a while what they have found under a name.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from overtok_megatron.run_folder import RunFolder

# Seconds until a host must see a new file: network file systems remember a folder's names for a while.
SEEN_WITHIN = 20.0
_POLL = 0.1


@contextmanager
def token_in(folder: Path) -> Iterator[str]:
    """On the first host: keep a token in an existing folder while the block runs; gives the token. Raises OSError."""
    token = secrets.token_hex(8)
    path = RunFolder(folder).start_token(token)
    path.write_text(token, encoding="utf-8")
    try:
        yield token
    finally:
        with suppress(OSError):
            path.unlink()


def sees_token(folder: Path, token: str) -> bool:
    """Whether this host reads the token of the first one in a folder, within `SEEN_WITHIN` seconds."""
    path, deadline = RunFolder(folder).start_token(token), time.monotonic() + SEEN_WITHIN
    while True:
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == token:  # else it is still being written
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)

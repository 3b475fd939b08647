"""Which ranks of a job that stands still made the others wait, and the file with what every rank was doing."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FRAME = re.compile(r'File "([^"]*)", line (\d+), in (\S+)')
_WAITING = ("torch/distributed/", "_arrived")  # in the frame of a rank that is in a collective
_THREADS = "thread "  # begins the stack of a thread
_HELPERS = ("thread tokens", "thread save")  # they wait for other ranks while their own rank does something else


def waits_for_others(stacks: str) -> bool:
    """Whether a rank's stacks end in a collective on a thread that computes."""
    sections = re.split(rf"^(?={_THREADS})", stacks, flags=re.MULTILINE)
    frames = [_FRAME.findall(section)[-1:] for section in sections if not section.startswith(_HELPERS)]
    return any(word in f"{path} {function}" for last in frames for path, _, function in last for word in _WAITING)


def culprits(beats: Mapping[int, Mapping[str, Any]], stacks: Mapping[int, str]) -> list[int]:
    """The ranks that probably made the others wait.

    They are those that did not answer with their stacks; or else those that are in no collective; or else those that are
    behind the others by a step; or else all.
    """
    ranks = sorted(beats)
    silent = [rank for rank in ranks if rank not in stacks]
    if silent:
        return silent
    busy = [rank for rank in ranks if not beats[rank]["collectives"] and not waits_for_others(stacks[rank])]
    if busy:
        return busy
    first = min((beats[rank]["step"] or 0 for rank in ranks), default=0)
    return [rank for rank in ranks if (beats[rank]["step"] or 0) == first]


def innermost(stacks: str) -> str:
    """The innermost frame of the main thread, which stands first: function, file and line."""
    main = stacks.split(f"\n{_THREADS}")[0]
    frames = _FRAME.findall(main)
    if not frames:
        return "no Python function"
    path, line, function = frames[-1]
    return f"{function} ({path}:{line})"


def write_report(folder: Path, kind: str, described: Mapping[int, str], texts: Mapping[int, str]) -> Path | None:
    """Write `KIND-TIME.txt` with a line per rank and then its text; returns the path, None where it cannot be written."""
    path = folder / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    parts = [f"=== {line}\n{texts.get(rank, '').rstrip()}\n" for rank, line in sorted(described.items())]
    try:
        path.write_text("\n".join(parts), encoding="utf-8")
    except OSError:
        return None
    return path

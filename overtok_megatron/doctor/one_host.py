"""The ranks of one host: started, waited for, and killed when whoever started them is gone.

`python -m overtok_megatron.doctor.one_host JSON` is what ssh runs on each host of a hostfile; its standard input ends when the
connection does, and then its ranks end.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from overtok_megatron.environment import ACCELERATOR, rank_environment
from overtok_megatron.launching.console import overtok_command

_LEAVING = 15.0  # seconds that the other ranks have to leave after the first one


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Ranks first .. first + count - 1 of `world` on a host. arguments: of `overtok`. environment: set beside the host's."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    first: int
    count: int
    world: int
    master_address: str
    master_port: int

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def start_ranks(given: Ranks, environment: Mapping[str, str]) -> list[subprocess.Popen[bytes]]:
    """Start the ranks in the host's environment."""
    ours = {**environment, **given.environment}
    variables = rank_environment(ours, given.count, deterministic=False, cuda=True)
    if ACCELERATOR not in ours:
        del variables[ACCELERATOR]  # a rank takes the devices that it finds
    variables |= {
        "MASTER_ADDR": given.master_address,
        "MASTER_PORT": str(given.master_port),
        "WORLD_SIZE": str(given.world),
        "LOCAL_WORLD_SIZE": str(given.count),
    }
    return [
        subprocess.Popen(
            overtok_command(*given.arguments),
            env=variables | {"RANK": str(given.first + place), "LOCAL_RANK": str(place)},
            stdin=subprocess.DEVNULL,
        )
        for place in range(given.count)
    ]


def wait_for_ranks(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of the first rank, when it has ended; the others are killed a little later."""
    try:
        code = ranks[0].wait()
        for rank in ranks[1:]:
            with suppress(subprocess.TimeoutExpired):
                rank.wait(_LEAVING)
        return code
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def main() -> int:
    ranks = start_ranks(Ranks(**json.loads(sys.argv[1])), os.environ)

    def leave_with_connection() -> None:
        sys.stdin.buffer.read()
        for rank in ranks:
            rank.kill()

    threading.Thread(target=leave_with_connection, daemon=True).start()
    return wait_for_ranks(ranks)


if __name__ == "__main__":
    sys.exit(main())

"""Where a process stands in its job; `launching/batch_systems.py` finds it out."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The rank of a process and where the ranks meet.

    ranks_of_host: how many ranks run on this host; 1 where nobody has said it. master_port: 0 = any free one, for a single
    process. master_given: whether the caller or a launcher of torch has set the address; else it follows from names of
    hosts, and the first rank checks that it is one of its own. cores: how many CPU cores a batch system has given to this
    rank alone; None where the ranks of a host share them. host_number: of this host in the job, empty where nobody has said it.
    attempt: how often a launcher has started the ranks again.
    """

    started_by: str
    rank: int
    local_rank: int
    world_size: int
    ranks_of_host: int
    master_address: str
    master_port: int
    master_given: bool
    cores: int | None = None
    host_number: str = ""
    attempt: str = "0"

    def num_threads(self, available: int) -> int:
        """How many threads this rank should use. available: CPU cores that this process may use."""
        return max(1, available // self.ranks_of_host if self.cores is None else min(available, self.cores))

    def variables(self) -> dict[str, str]:
        """The environment variables that torch and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.ranks_of_host),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }

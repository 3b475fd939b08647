"""What is told where hosts do not see the same, and how a start ends where ranks are missing."""

import socket
import threading
from dataclasses import replace

import pytest
from torch.distributed import TCPStore

from overtok_megatron.errors import ConfigError
from overtok_megatron.launching.batch_systems import find_placement
from overtok_megatron.launching.local import free_port
from overtok_megatron.placement import Placement
from overtok_megatron.training.meeting import AlreadySaidError, Meeting, NotMetError
from overtok_megatron.training.same_everywhere import Facts, differences

SAME = {"the configuration": "as on the first rank", "torch": "2.13.0", "numpy": "2.1.0", "device": "cuda"}


def facts(changes: dict[int, dict[str, str]], world: int = 8) -> list[Facts]:
    """Of ranks two to a host, with what differs on some of them."""
    return [
        Facts(rank=rank, host=f"node{rank // 2}", values=SAME | changes.get(rank, {}), device=f"GPU-{rank}")
        for rank in range(world)
    ]


def test_hosts_that_see_the_same_are_not_mentioned() -> None:
    assert differences(facts({})) == ([], [])


def test_a_host_that_differs_is_named_once_with_what_it_has() -> None:
    old = {"torch": "2.12.1"}
    mistakes, warnings = differences(facts({4: old, 5: old}))
    assert mistakes == [
        "torch: 2.12.1 on node2 (rank 4); on node0 (rank 0) 2.13.0; install the same on every host",
    ]
    assert not warnings
    mistakes, _ = differences(facts({2: old, 4: old, 6: old, 7: {"torch": "2.11.0"}}))
    assert mistakes[0].startswith("torch: 2.12.1 on node1 (rank 2) and 2 more hosts; on node0 (rank 0) 2.13.0")
    assert mistakes[1].startswith("torch: 2.11.0 on node3 (rank 7); on node0")
    assert all(len(line) <= 300 for line in mistakes)


def test_another_numpy_is_a_warning() -> None:
    mistakes, warnings = differences(facts({6: {"numpy": "1.26.4"}}))
    assert not mistakes
    assert warnings == ["numpy: 1.26.4 on node3 (rank 6); on node0 (rank 0) 2.1.0; install the same on every host"]


def test_what_a_rank_could_not_read_is_told_with_its_host() -> None:
    seen = facts({})
    seen[3] = Facts(rank=3, host="node1", mistakes=["run.yaml: no such configuration file"])
    seen[2] = Facts(rank=2, host="node1", mistakes=["run.yaml: no such configuration file"])
    assert differences(seen)[0] == ["node1 (rank 2): run.yaml: no such configuration file"]


def test_two_ranks_with_one_gpu_are_told() -> None:
    seen = facts({})
    seen[5] = Facts(rank=5, host="node2", values=SAME, device="GPU-4")
    (line,) = differences(seen)[0]
    assert line.startswith("ranks 4 and 5 of node2 see one GPU, GPU-4; let each task see one of its own")


def place(rank: int, port: int, world: int = 2) -> Placement:
    own = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    return find_placement(own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free one, named in the environment as the place of a process is."""
    found = free_port()
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found))
    return found


@pytest.fixture
def both(port: int) -> list[Meeting]:
    """The meetings of two ranks, joined, in one process."""
    meetings = [Meeting(place(rank, port), join_limit=30) for rank in range(2)]
    threads = [threading.Thread(target=meeting.join) for meeting in meetings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return meetings


def test_the_others_go_on_once_the_first_rank_has_passed_their_answers(both: list[Meeting]) -> None:
    first, second = both
    first.begin({"token": "x"})
    assert second.wait_for_beginning() == {"token": "x"}
    waiting = threading.Thread(target=second.answer, args=({"rank": 1},))
    waiting.start()
    assert first.answers() == [{"rank": 1}]
    assert waiting.is_alive()
    first.go_on()
    waiting.join(timeout=20)
    assert not waiting.is_alive()


def test_a_failure_of_the_first_rank_ends_the_others_with_its_code(both: list[Meeting]) -> None:
    first, second = both
    first.leave(2, linger=0)
    with pytest.raises(AlreadySaidError) as caught:
        second.wait_for_beginning()
    assert caught.value.code == 2
    assert caught.value.lines == []


def test_a_line_is_news_once(both: list[Meeting]) -> None:
    assert [meeting.is_news("the same") for meeting in both] == [True, False]
    assert both[1].is_news("another")


def test_a_later_start_reads_nothing_that_one_before_has_left(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's static rendezvous keeps one store for all starts, to which all ranks are clients."""
    kept = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    starts = [
        [Meeting(replace(place(rank, port), attempt=attempt), join_limit=30) for rank in range(2)]
        for attempt in ("0", "1")
    ]
    for meeting in (*starts[0], *starts[1]):
        meeting.join()
    starts[0][0].begin({"token": "old"})
    starts[0][0].leave(2, linger=0)
    assert not starts[1][1].store.check(["start"])
    starts[1][0].begin({"token": "new"})
    assert starts[1][1].wait_for_beginning() == {"token": "new"}
    with pytest.raises(AlreadySaidError):
        starts[0][1].wait_for_beginning()
    assert kept.num_keys() > 0


def test_missing_ranks_are_told_after_the_limit(port: int) -> None:
    with pytest.raises(NotMetError, match=f"not all of the 2 ranks came to 127.0.0.1:{port} within 1 s"):
        Meeting(place(0, port), join_limit=1).join()
    with pytest.raises(NotMetError, match=f"the first rank was not reached at 127.0.0.1:{port} from .* within 1 s"):
        Meeting(place(1, port), join_limit=1).join()


def test_a_port_in_use_is_told(port: int) -> None:
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", port))
        other.listen()
        with pytest.raises(ConfigError, match=f"MASTER_PORT: {port} is in use on .*; set another one"):
            Meeting(place(0, port), join_limit=5).join()


def test_an_address_that_is_not_of_the_first_ranks_host_is_told() -> None:
    """mpirun's host is taken for that of rank 0: where it is not, the others would wait for a port that nobody opens."""
    environment = {
        "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://192.0.2.1:34911",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"mpirun names 192\.0\.2\.1, but rank 0 runs on .*; set it to that host"):
        Meeting(find_placement(environment)).join()

"""What `overtok doctor` says about hosts, by tables of facts."""

from dataclasses import replace

import pytest

from overtok_megatron.doctor.facts import Device, HostFacts, parse_nvidia
from overtok_megatron.doctor.findings import (
    HELLO,
    Host,
    clock_findings,
    contrast,
    disk_findings,
    host_differences,
    host_limits,
    run_differences,
    silent_findings,
)
from overtok_megatron.doctor.interfaces import Interface
from overtok_megatron.doctor.meeting import ClockOffset, estimate_offset
from overtok_megatron.doctor.rank import backends_of, group_hosts, rank_names
from overtok_megatron.doctor.run_facts import RunFacts

GIB = 2**30
HOST = HostFacts(
    versions={"torch": "2.13.0", "numpy": "2.4.6"},
    devices=[Device("NVIDIA H100", 80 * GIB, 79 * GIB)] * 8,
    cuda_devices=8,
    cores=64,
    memory=512 * GIB,
    free_memory=500 * GIB,
    shared_memory=256 * GIB,
    free_shared_memory=256 * GIB,
    folder="/runs",
    free_disk=1000 * GIB,
    open_files=65_536,
    locked_memory=None,
    gloo=Interface("eth0", "10.0.0.1"),
    nccl=Interface("eth0", "10.0.0.1"),
    infiniband_ports=8,
    environment={"NCCL_DEBUG": "WARN"},
)
EIGHT = HOST.devices


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"a": "1"}, None),
        ({"a": "1", "b": "1"}, None),
        ({"a": "1", "b": "2"}, "host b has x 2, host a 1"),
        ({"a": "1", "b": "2", "c": "1"}, "host b has x 2, the others 1"),
        ({"a": "2", "b": "1", "c": "1"}, "host a has x 2, the others 1"),
        ({"a": "1", "b": "2", "c": "1", "d": "2", "e": "1"}, "hosts b, d have x 2, the others 1"),
        ({"a": "1", "b": "2", "c": "3", "d": "1"}, "host b has x 2; host c has x 3, the others 1"),
        (
            {str(number): "1" for number in range(20)} | {f"b{number}": "2" for number in range(9)},
            "hosts b0, b1, b2, b3, b4, b5, ... (9 in all) have x 2, the others 1",
        ),
    ],
)
def test_the_odd_host_is_named(values: dict[str, str], line: str | None) -> None:
    assert contrast("x", values) == line


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, None),
        (
            {"versions": {"torch": "2.11.0", "numpy": "2.4.6"}},
            "versions differ: host b has torch 2.11.0, the others 2.13.0",
        ),
        ({"versions": {"torch": "2.13.0"}}, "versions differ: host b has numpy none, the others 2.4.6"),
        (
            {"devices": EIGHT[1:]},
            "devices differ: host b has the devices 7 x NVIDIA H100, the others 8 x NVIDIA H100",
        ),
        ({"cuda_devices": 0}, "devices that torch sees differ: host b has a number of 0, the others 8"),
        ({"cores": 32}, "cores differ: host b has a number of 32, the others 64"),
        ({"memory": 384 * GIB}, "memory differs: host b has a size of 384.0 GiB, the others 512.0 GiB"),
        ({"memory": 511 * GIB}, None),  # firmware keeps a part
        ({"free_memory": GIB, "free_disk": GIB}, None),
        ({"open_files": 1024}, "open files differ: host b has a limit of 1,024, the others 65,536"),
        ({"locked_memory": 65_536}, "locked memory differs: host b has a limit of 65,536, the others unlimited"),
        ({"infiniband_ports": 7}, "active InfiniBand ports differ: host b has a number of 7, the others 8"),
        ({"environment": {}}, "environments differ: host b has NCCL_DEBUG unset, the others WARN"),
    ],
)
def test_hosts_are_compared(changed: dict[str, object], line: str | None) -> None:
    hosts = {"a": HOST, "b": replace(HOST, **changed), "c": HOST}
    assert list(host_differences(hosts)) == ([] if line is None else [line])


@pytest.mark.parametrize(
    ("changed", "settings", "line"),
    [
        ({}, {}, None),
        (
            {"gloo": Interface("lo", "127.0.0.1")},
            {},
            "host b: gloo takes lo (127.0.0.1), which no other host reaches; set GLOO_SOCKET_IFNAME to the interface "
            "between the hosts",
        ),
        ({"gloo": Interface("lo", "127.0.0.1")}, {"several": False}, None),
        ({"nccl": Interface("", "", "no interface")}, {"nccl": False}, None),
        (
            {"nccl": Interface("", "", "NCCL_SOCKET_IFNAME=ib: no interface that is up fits; up are lo")},
            {},
            "host b: NCCL_SOCKET_IFNAME=ib: no interface that is up fits; up are lo; correct NCCL_SOCKET_IFNAME, or bring "
            "the interface up",
        ),
        ({"open_files": 1024}, {}, None),
        (
            {"open_files": 1024},
            {"ranks": 1000},
            "host b: a process may open 1,024 files, a run of 1000 ranks needs about 4,512; raise the limit: ulimit -n 4512",
        ),
        (
            {"locked_memory": 2**23},
            {},
            "host b: a process may lock 8 MiB of memory, InfiniBand needs more; raise the limit: ulimit -l unlimited",
        ),
        ({"locked_memory": 2**23, "infiniband_ports": 0}, {}, None),
        (
            {"shared_memory": 2**26},
            {},
            "host b: /dev/shm has 64 MiB, NCCL needs more for the ranks of a host; start the container with --shm-size=1g "
            "or more",
        ),
    ],
)
def test_limits_of_a_host_are_named(changed: dict[str, object], settings: dict[str, object], line: str | None) -> None:
    given = {"ranks": 16, "several": True, "nccl": True} | settings
    found = list(host_limits({"a": HOST, "b": replace(HOST, **changed)}, **given))  # type: ignore[arg-type]
    assert found == ([] if line is None else [line])


def test_hosts_with_the_same_trouble_share_a_line() -> None:
    hosts = {name: replace(HOST, shared_memory=2**26 if name != "c" else GIB) for name in "abcd"}
    (line,) = host_limits(hosts, ranks=16, several=True, nccl=True)
    assert line.startswith("hosts a, b, d: /dev/shm has 64 MiB")


def test_devices_that_torch_does_not_see_are_named() -> None:
    """Because of such a host the links are measured over gloo alone."""
    hosts = {"a": HOST, "b": replace(HOST, cuda_devices=0)}
    (line,) = host_limits(hosts, ranks=16, several=True, nccl=False)
    assert line.startswith("host b: nvidia-smi sees 8 x NVIDIA H100, torch 2.13.0 sees no device")


def test_a_disk_that_holds_no_checkpoint_is_named() -> None:
    hosts = {"a": HOST, "b": replace(HOST, free_disk=3 * GIB)}
    assert list(disk_findings(hosts, 2 * GIB)) == []
    (line,) = disk_findings(hosts, 5 * GIB)
    assert line.startswith("host b: /runs has 3.0 GiB free, a checkpoint takes about 5.0 GiB")


@pytest.mark.parametrize(
    ("seconds", "error", "line"),
    [
        (0.4, 0.001, None),
        (1.2, 0.5, None),  # the estimate is that wrong
        (3.2, 0.001, "host b: its clock is 3.2 s ahead of the others; let NTP (chrony) set it"),
        (-90.0, 0.001, "host b: its clock is 90.0 s behind the others; let NTP (chrony) set it"),
    ],
)
def test_a_clock_that_is_off_is_named(seconds: float, error: float, line: str | None) -> None:
    clocks = {"a": ClockOffset(0.0, 0.0), "b": ClockOffset(seconds, error), "c": ClockOffset(0.01, 0.001)}
    assert list(clock_findings(clocks)) == ([] if line is None else [line])


def test_the_first_hosts_clock_may_be_the_wrong_one() -> None:
    clocks = {"a": ClockOffset(0.0, 0.0), "b": ClockOffset(5.0, 0.001), "c": ClockOffset(5.0, 0.001)}
    assert list(clock_findings(clocks)) == ["host a: its clock is 5.0 s behind the others; let NTP (chrony) set it"]


def test_the_offset_comes_from_the_quickest_ping() -> None:
    """The true offset is 7 s; the first answer was on its way for 0.9 s in one direction."""
    found = estimate_offset([(100.0, 107.9, 101.0), (102.0, 109.01, 102.02), (103.0, 110.3, 103.5)])
    assert found.seconds == pytest.approx(7.0)
    assert found.error == pytest.approx(0.01)


def test_what_hosts_read_of_a_run_is_compared() -> None:
    same = RunFacts(keys={"training.seed": "1", "data.train": "'d'"}, data={"d": "9 tokens"})
    hosts = {
        "a": same,
        "b": replace(same, keys=same.keys | {"training.seed": "2"}),
        "c": replace(same, data={"d": "8 tokens"}),
        "d": replace(same, data={}, failures={"data": "d.bin: no such file"}),
    }
    assert list(run_differences({"a": same, "b": same})) == []
    assert list(run_differences(hosts)) == [
        "host d: data: d.bin: no such file",
        "configurations differ: host b has training.seed 2, the others 1",
        "data differ: host c has d 8 tokens, the others 9 tokens",
    ]
    many = {
        "a": RunFacts(keys={str(key): "1" for key in range(30)}),
        "b": RunFacts(keys={str(key): "2" for key in range(30)}),
    }
    assert list(run_differences(many))[-1] == "configurations differ: 22 further keys or sets"


def test_silent_hosts_and_ranks_are_named() -> None:
    hosts = [Host("a", [0, 1]), Host("b", [2, 3]), Host("c", [4, 5])]
    late = ("links over gloo", 45.0)
    silent = {2: (HELLO, 60.0), 3: (HELLO, 60.0), 5: late, 6: (HELLO, 60.0)}
    assert list(silent_findings(silent, hosts)) == [
        "host b: no answer within 60 s; can you run `ssh b true`?",
        "host c, rank 5: no answer within 45 s; it stopped answering at: links over gloo",
        "rank 6: no answer within 60 s; was it started, and does its host reach the first one?",
    ]


def test_ranks_are_grouped_by_machine() -> None:
    said = {0: ("localhost", "x"), 2: ("localhost", "y"), 1: ("localhost", "x"), 3: ("b", "z")}
    hosts = group_hosts(said, [])
    assert hosts == [Host("localhost (rank 0)", [0, 1]), Host("localhost (rank 2)", [2]), Host("b", [3])]
    assert [end.rank for _, end in sorted(rank_names(hosts).items())] == [
        "localhost (rank 0) rank 0", "localhost (rank 0) rank 1", "localhost (rank 2)", "b",
    ]  # fmt: skip
    started = [Host("n1", [0, 1]), Host("n2", [2, 3])]
    assert group_hosts(said, started) == started


@pytest.mark.parametrize(
    ("devices", "backends"),
    [
        ({0: "A", 1: "B", 2: "A"}, ["nccl", "gloo"]),  # another host's device may have the same identity
        ({0: "A", 1: "A", 2: "C"}, ["gloo"]),
        ({0: "A", 1: "B", 2: None}, ["gloo"]),
        ({0: "A", 1: "B"}, ["gloo"]),
    ],
)
def test_nccl_is_measured_where_every_rank_has_a_device(devices: dict[int, str | None], backends: list[str]) -> None:
    assert backends_of(devices, [Host("a", [0, 1]), Host("b", [2])]) == backends


def test_nvidia_smi_is_read() -> None:
    text = "550.54.15, 81559, 81008, NVIDIA H100 80GB HBM3\n550.54.15, [N/A], [N/A], NVIDIA GH200\n"
    driver, devices = parse_nvidia(text)
    assert driver == "550.54.15"
    assert devices == [Device("NVIDIA H100 80GB HBM3", 81559 * 2**20, 81008 * 2**20), Device("NVIDIA GH200", 0, 0)]
    assert parse_nvidia("No devices were found\n") == ("none", [])


def test_facts_travel_as_json() -> None:
    assert HostFacts.from_json(HOST.as_json()) == HOST

"""Which links `overtok doctor` measures when, and which host, rank or link it names."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtok_megatron.doctor.interfaces import Interface, gloo_interface, nccl_interface
from overtok_megatron.doctor.links import End, Link, link_findings
from overtok_megatron.doctor.rounds import pair_rounds, tournament

Factors = dict[str, float]  # of pairs such as "ab", or of hosts such as "b"


def mesh(hosts: str, *, slow: Factors | None = None, late: Factors | None = None, broken: str = "") -> list[Link]:
    """Links of 2 GB/s and 30 us between every two hosts, but for those that are slow, late or broken."""

    def factor(given: Factors | None, pair: str) -> float:
        return next((value for key, value in (given or {}).items() if set(key) <= set(pair)), 1.0)

    links = []
    for first, second in combinations(hosts, 2):
        pair = first + second
        failure = "no answer within 30 s" if any(set(one) <= set(pair) for one in broken.split()) else ""
        rate, latency = 2e9 * factor(slow, pair), 3e-5 * factor(late, pair)
        links.append(
            Link(
                backend="gloo",
                first=End(first, first),
                second=End(second, second),
                latency=0.0 if failure else latency,
                rates=(0.0, 0.0) if failure else (rate, 1.1 * rate),
                failure=failure,
            )
        )
    return links


@pytest.mark.parametrize(
    ("links", "lines"),
    [
        (mesh("ab"), []),
        (mesh("abcd"), []),
        (mesh("abcd", slow={"b": 0.6}, late={"ac": 2.0}), []),
        (mesh("ab", slow={"ab": 0.01}), []),  # nothing to compare with
        (mesh("abc", slow={"ab": 0.1}), ["link a - b over gloo: 200.0 MB/s, less than half of the others' 2.0 GB/s"]),
        (
            mesh("abc", slow={"c": 0.1}),
            ["host c: its links over gloo have 200.0 MB/s, less than half of the others' 2.0 GB/s"],
        ),
        (
            mesh("abcde", slow={"b": 0.1, "de": 0.2}),
            [
                "host b: its links over gloo have 200.0 MB/s, less than half of the others' 2.0 GB/s",
                "link d - e over gloo: 400.0 MB/s, less than half of the others' 2.0 GB/s",
            ],
        ),
        (
            mesh("abcd", late={"bd": 4.0}),
            ["link b - d over gloo: a latency of 120 us, more than three times the others' 30 us"],
        ),
        (
            mesh("abcd", late={"d": 40.0}),
            ["host d: its links over gloo have a latency of 1200 us, more than three times the others' 30 us"],
        ),
        (mesh("ab", broken="ab"), ["link a - b over gloo: broken (no answer within 30 s)"]),
        (mesh("abcd", broken="ac"), ["link a - c over gloo: broken (no answer within 30 s)"]),
        (mesh("abcd", broken="d"), ["host d: none of its 3 links over gloo works (no answer within 30 s)"]),
        (
            mesh("abc", broken="ab bc ac"),
            [f"link {pair} over gloo: broken (no answer within 30 s)" for pair in ("a - b", "a - c", "b - c")],
        ),
    ],
)
def test_the_slow_and_the_broken_are_named(links: list[Link], lines: list[str]) -> None:
    assert link_findings(links) == lines


def test_one_slow_rank_of_a_host_is_named() -> None:
    """The ranks of equal place are linked: rank 3 of host b reaches nobody quickly."""
    links = [
        Link(
            backend="nccl",
            first=End(first, f"{first} rank {place}"),
            second=End(second, f"{second} rank {place}"),
            latency=1e-5,
            rates=(rate := 1e9 if place == 3 and "b" in first + second else 4e10, rate),
        )
        for first, second in combinations("abcd", 2)
        for place in range(4)
    ]
    assert link_findings(links) == [
        "b rank 3: its links over nccl have 1.0 GB/s, less than half of the others' 40.0 GB/s"
    ]


def test_a_link_that_is_slow_in_one_direction_is_named() -> None:
    link = Link(backend="gloo", first=End("a", "a"), second=End("b", "b"), latency=3e-5, rates=(2e9, 1e8))
    assert link_findings([link]) == [
        "link a - b over gloo: 2.0 GB/s one way, 100.0 MB/s the other; is a cable or a port damaged?"
    ]


def test_memory_of_one_host_has_no_damaged_cable() -> None:
    """What other processes do there slows one direction for a moment; a link of devices is one of wires."""
    first, second, rates = End("a", "a rank 0"), End("a", "a rank 1"), (2.8e9, 6.8e8)
    assert link_findings([Link(backend="gloo", first=first, second=second, latency=3e-5, rates=rates)]) == []
    (line,) = link_findings([Link(backend="nccl", first=first, second=second, latency=3e-5, rates=rates)])
    assert "2.8 GB/s one way" in line


@pytest.mark.parametrize(("sends", "word"), [(True, "sends"), (False, "receives")])
def test_a_host_that_is_slow_in_one_direction_is_named(sends: bool, word: str) -> None:
    """It is the first end of one of its links and the second one of the other."""
    links = [
        Link(
            backend="gloo",
            first=End(first, first),
            second=End(second, second),
            latency=3e-5,
            rates=(
                5e7 if (first if sends else second) == "b" else 2e9,
                5e7 if (second if sends else first) == "b" else 2e9,
            ),
        )
        for first, second in combinations("abc", 2)
    ]
    assert link_findings(links) == [
        f"host b: its links over gloo have 50.0 MB/s when it {word}, less than half of the others' 2.0 GB/s"
    ]


def test_links_are_compared_with_their_kind() -> None:
    """Shared memory inside a host is faster than any network, and NCCL faster than gloo."""
    inside = [
        Link(
            backend="gloo",
            first=End(host, f"{host} rank 0"),
            second=End(host, f"{host} rank 1"),
            latency=1e-6,
            rates=(9e9, 9e9),
        )
        for host in "abc"
    ]
    assert link_findings([*inside, *mesh("abc")]) == []


@given(st.integers(0, 33))
def test_in_a_tournament_every_two_meet_once(players: int) -> None:
    rounds = tournament(players)
    for pairs in rounds:
        names = [name for pair in pairs for name in pair]
        assert len(names) == len(set(names))
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(players), 2))
    assert len(rounds) == (0 if players < 2 else players - 1 + players % 2)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(1, 9))
def test_rounds_of_ranks(sizes: list[int], most: int) -> None:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    hosts = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    rounds = pair_rounds(hosts, most)
    place = {rank: (host, rank - ranks[0]) for host, ranks in enumerate(hosts) for rank in ranks}
    met = [pair for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met))
    for pairs in rounds:
        names = [rank for pair in pairs for rank in pair]
        assert len(names) == len(set(names))
    across = [(a, b) for a, b in met if place[a][0] != place[b][0]]
    assert all(place[a][1] == place[b][1] for a, b in across)
    partners = [len({b if a == 0 else a for a, b in across if 0 in (a, b)})]
    assert partners[0] >= min(len(hosts) - 1, most - len(hosts) % 2)  # a host rests in one round of an odd number
    if most >= 9:
        pairs_of_hosts = {tuple(sorted((place[a][0], place[b][0]))) for a, b in across}
        assert pairs_of_hosts == set(combinations(range(len(hosts)), 2))
        for ranks in hosts:
            assert set(combinations(ranks, 2)) <= set(met)


UP = {
    "lo": ["127.0.0.1"],
    "docker0": ["172.17.0.1"],
    "eth0": ["10.0.0.1", "fe80::1"],
    "eth1": ["10.1.0.1"],
    "ib0": ["10.2.0.1"],
}


@pytest.mark.parametrize(
    ("variable", "own", "taken"),
    [
        (None, ["10.1.0.1"], Interface("eth1", "10.1.0.1")),
        (None, ["127.0.1.1"], Interface("lo", "127.0.1.1")),  # as Debian writes a host's name into /etc/hosts
        (None, ["192.0.2.1", "fe80::1"], Interface("eth0", "fe80::1")),  # an address that the host no longer has
        (None, [], Interface("lo", "127.0.0.1")),
        ("eth0", ["127.0.1.1"], Interface("eth0", "10.0.0.1")),
        ("eth1,eth0", [], Interface("eth1", "10.1.0.1")),
        ("eth", [], None),  # whole names, unlike NCCL's
        ("eth0,eth7", [], None),
    ],
)
def test_the_interface_that_gloo_takes(variable: str | None, own: list[str], taken: Interface | None) -> None:
    found = gloo_interface({} if variable is None else {"GLOO_SOCKET_IFNAME": variable}, UP, own)
    if taken is None:
        assert found.problem == (
            f"GLOO_SOCKET_IFNAME={variable}: no interface {variable.split(',')[-1]} is up; "  # type: ignore[union-attr]
            "up are lo, docker0, eth0, eth1, ib0"
        )
    else:
        assert found == taken


@pytest.mark.parametrize(
    ("variable", "up", "taken"),
    [
        (None, list(UP), "ib0"),
        (None, ["lo", "docker0", "eth0"], "eth0"),
        (None, ["lo", "docker0"], "docker0"),
        (None, ["lo"], "lo"),
        (None, [], None),
        ("eth", list(UP), "eth0"),
        ("=eth1", list(UP), "eth1"),
        ("=eth", list(UP), None),
        ("^lo,docker,ib", list(UP), "eth0"),
        ("^=eth0,lo,docker0", list(UP), "eth1"),
        ("wlan", list(UP), None),
    ],
)
def test_the_interface_that_nccl_takes(variable: str | None, up: list[str], taken: str | None) -> None:
    found = nccl_interface(
        {} if variable is None else {"NCCL_SOCKET_IFNAME": variable}, {name: UP[name] for name in up}
    )
    assert (found.name or None) == taken
    assert bool(found.problem) == (taken is None)

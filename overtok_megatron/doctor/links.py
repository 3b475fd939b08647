"""Which host, rank or link is slow or broken, among links that should be alike. Pure functions."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

SLOW_RATE = 0.5  # of the median of the others
SLOW_LATENCY = 3.0
LOPSIDED = 4.0  # how much faster one direction may be


@dataclass(frozen=True)
class End:
    """One end of a link. rank: as the report calls it, the host's name where the host has one rank."""

    host: str
    rank: str


@dataclass(frozen=True, kw_only=True)
class Link:
    """latency: one way, seconds. rates: bytes per second from the first end to the second, and back.

    failure: why nothing was measured; latency and rates are then 0.
    """

    backend: str
    first: End
    second: End
    latency: float = 0.0
    rates: tuple[float, float] = (0.0, 0.0)
    failure: str = ""

    @property
    def rate(self) -> float:
        """Of the slower direction."""
        return min(self.rates)

    @property
    def inside(self) -> bool:
        return self.first.host == self.second.host

    def __str__(self) -> str:
        return f"{self.first.rank} - {self.second.rank}"


def in_memory(link: Link) -> bool:
    """Whether a link is memory of one host and not a cable, so that another process may slow one direction for a moment."""
    return link.inside and link.backend == "gloo"


def link_findings(links: Sequence[Link]) -> list[str]:
    """A line for each broken or slow host, rank or link; links are compared with those of their kind only."""
    found: list[str] = []
    for backend, inside in dict.fromkeys((link.backend, link.inside) for link in links):
        kind = [link for link in links if (link.backend, link.inside) == (backend, inside)]
        found += _broken(kind, backend)
        good = [link for link in kind if not link.failure]
        found += _slow(good, backend)
    return found


def _broken(links: Sequence[Link], backend: str) -> Iterator[str]:
    """Hosts, then ranks, of which every one of several links is broken, although others work; then the other broken links."""
    bad = [link for link in links if link.failure]
    for name, of in _nodes(links):
        own = [link for link in links if name in of(link)]
        works = any(not link.failure for link in links)
        if len(own) > 1 and set(own) <= set(bad) and works:
            yield f"{_called(name, links)}: none of its {len(own)} links over {backend} works ({own[0].failure})"
            bad = [link for link in bad if link not in own]
    for link in bad:
        yield f"link {link} over {backend}: broken ({link.failure})"


@dataclass(frozen=True)
class _Outliers:
    """Links that cost much more than others, which typically cost `usual`.

    nodes: (name, its links, usual) of hosts and ranks all of whose links do; links: (link, usual) of single ones. rest: links
    that are not of such a node.
    """

    nodes: list[tuple[str, list[Link], float]]
    links: list[tuple[Link, float]]
    rest: list[Link]


def _outliers(links: Sequence[Link], cost: Callable[[Link], float], factor: float) -> _Outliers:
    """Those that cost more than `factor` times the median of the others. A node needs two links, and links without it."""
    rest, nodes = list(links), []
    for name, of in _nodes(links):
        own = [link for link in rest if name in of(link)]
        others = [cost(link) for link in rest if name not in of(link)]
        if len(own) > 1 and others and min(map(cost, own)) > factor * statistics.median(others):
            nodes.append((name, own, statistics.median(others)))
            rest = [link for link in rest if link not in own]
    single = []
    for link in rest:
        others = [cost(other) for other in rest if other is not link]
        if others and cost(link) > factor * statistics.median(others):
            single.append((link, statistics.median(others)))
    return _Outliers(nodes, single, rest)


def _slow(links: Sequence[Link], backend: str) -> Iterator[str]:
    """Hosts, ranks and links that are slower, or take longer, than the others of their kind."""
    found = _outliers(links, lambda link: 1 / link.rate, 1 / SLOW_RATE)
    for name, own, usual in found.nodes:
        rate = rate_text(statistics.median(link.rate for link in own))
        yield (
            f"{_called(name, links)}: its links over {backend} have {rate}{_way(name, own)}, less than half of the others' "
            f"{rate_text(1 / usual)}"
        )
    for link, usual in found.links:
        yield f"link {link} over {backend}: {rate_text(link.rate)}, less than half of the others' {rate_text(1 / usual)}"
    for link in found.rest:
        if max(link.rates) > LOPSIDED * link.rate and not in_memory(link):
            there, back = map(rate_text, link.rates)
            yield f"link {link} over {backend}: {there} one way, {back} the other; is a cable or a port damaged?"
    found = _outliers(links, lambda link: link.latency, SLOW_LATENCY)
    for name, own, usual in found.nodes:
        latency = time_text(statistics.median(link.latency for link in own))
        yield (
            f"{_called(name, links)}: its links over {backend} have a latency of {latency}, more than three times the others' "
            f"{time_text(usual)}"
        )
    for link, usual in found.links:
        yield (
            f"link {link} over {backend}: a latency of {time_text(link.latency)}, more than three times the others' "
            f"{time_text(usual)}"
        )


def _way(name: str, links: Sequence[Link]) -> str:
    """In which direction the links of a host or rank are slow, where it is one alone."""
    sent = [link.rates[0 if name in (link.first.host, link.first.rank) else 1] for link in links]
    received = [link.rates[1 if name in (link.first.host, link.first.rank) else 0] for link in links]
    if min(received) > LOPSIDED * max(sent):
        return " when it sends"
    return " when it receives" if min(sent) > LOPSIDED * max(received) else ""


def _nodes(links: Sequence[Link]) -> Iterator[tuple[str, Callable[[Link], tuple[str, str]]]]:
    """Every host, then every rank, with how to read such names from a link."""

    def hosts(link: Link) -> tuple[str, str]:
        return link.first.host, link.second.host

    def ranks(link: Link) -> tuple[str, str]:
        return link.first.rank, link.second.rank

    for of in (hosts, ranks):
        for name in dict.fromkeys(name for link in links for name in of(link)):
            yield name, of


def _called(name: str, links: Sequence[Link]) -> str:
    return f"host {name}" if any(name in (end.host for end in (link.first, link.second)) for link in links) else name


def rate_text(rate: float) -> str:
    """Bytes per second, as `2.1 GB/s`."""
    return f"{rate / 1e9:.1f} GB/s" if rate >= 0.9995e9 else f"{rate / 1e6:.1f} MB/s"


def time_text(seconds: float) -> str:
    """A latency, as `42 us`."""
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-2 else f"{seconds * 1e3:.0f} ms"

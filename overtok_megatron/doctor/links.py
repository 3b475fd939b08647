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


def _slow(links: Sequence[Link], backend: str) -> Iterator[str]:
    """The same for links that are slower, or take longer, than the others."""
    measures: tuple[tuple[Callable[[Link], float], float, Callable[[float], str], str], ...] = (
        (lambda link: 1 / link.rate, 1 / SLOW_RATE, lambda value: rate_text(1 / value), "less than half of"),
        (lambda link: link.latency, SLOW_LATENCY, time_text, "more than three times"),
    )
    for cost, factor, text, words in measures:
        rest = list(links)
        for name, of in _nodes(links):
            own = [link for link in rest if name in of(link)]
            others = [cost(link) for link in rest if name not in of(link)]
            if len(own) < 2 or not others:
                continue
            usual = statistics.median(others)
            if min(map(cost, own)) > factor * usual:
                typical = text(statistics.median(map(cost, own)))
                yield f"{_called(name, links)}: its links over {backend} have {typical}, {words} the others' {text(usual)}"
                rest = [link for link in rest if link not in own]
        for link in rest:
            others = [cost(other) for other in rest if other is not link]
            if others and cost(link) > factor * statistics.median(others):
                usual = statistics.median(others)
                yield f"link {link} over {backend}: {text(cost(link))}, {words} the others' {text(usual)}"
    for link in links:
        if max(link.rates) > LOPSIDED * link.rate:
            there, back = map(rate_text, link.rates)
            yield f"link {link} over {backend}: {there} one way, {back} the other; is a cable or a port damaged?"


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

"""The report as text and as JSON."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from overtok_megatron.doctor.facts import HostFacts
from overtok_megatron.doctor.findings import Host, describe_devices, limit, size_text
from overtok_megatron.doctor.interfaces import Interface
from overtok_megatron.doctor.links import End, Link, rate_text, time_text
from overtok_megatron.doctor.meeting import ClockOffset
from overtok_megatron.doctor.run_facts import RunFacts

MOST_LINKS = 28  # of a kind, of which a line each is shown; the JSON has all


@dataclass(kw_only=True)
class Report:
    """What was found out. facts, clocks and runs are by host. all_reduces: by backend, what was measured or a failure.

    folder: what was found about the output folder, "" = nothing. seconds: how long each part took.
    """

    ranks: int
    hosts: list[Host] = field(default_factory=list)
    facts: dict[str, HostFacts] = field(default_factory=dict)
    clocks: dict[str, ClockOffset] = field(default_factory=dict)
    runs: dict[str, RunFacts] = field(default_factory=dict)
    folder: str = ""
    links: list[Link] = field(default_factory=list)
    all_reduces: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Report":
        """The report that `as_json` returned."""
        parts = {
            "hosts": [Host(**one) for one in values["hosts"]],
            "facts": {host: HostFacts.from_json(one) for host, one in values["facts"].items()},
            "clocks": {host: ClockOffset(**one) for host, one in values["clocks"].items()},
            "runs": {host: RunFacts(**one) for host, one in values["runs"].items()},
            "links": [
                Link(
                    **(
                        one
                        | {"first": End(**one["first"]), "second": End(**one["second"]), "rates": tuple(one["rates"])}
                    )
                )
                for one in values["links"]
            ],
        }
        return cls(**(values | parts))

    def text(self) -> str:
        total = sum(self.seconds.values())
        parts = [
            [f"{_count(len(self.hosts), 'host')}, {_count(self.ranks, 'rank')}; examined in {total:.0f} s"],
            list(_versions(self.facts)),
            _aligned(list(_host_rows(self.facts, self.clocks))),
            list(_interfaces(self.facts)),
            list(_runs(self)),
            *(_links(kind, words) for kind, words in _kinds(self.links)),
            list(_all_reduces(self.all_reduces)),
            self.notes,
            _findings(self.findings),
        ]
        return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _findings(findings: Sequence[str]) -> list[str]:
    return (
        ["all right"] if not findings else [f"{_count(len(findings), 'finding')}:", *(f"  {one}" for one in findings)]
    )


def _versions(hosts: Mapping[str, HostFacts]) -> Iterator[str]:
    """A line for each set of versions, with the hosts that have it."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for host, facts in hosts.items():
        groups.setdefault(tuple(facts.versions.items()), []).append(host)
    for versions, names in groups.items():
        whose = "" if len(groups) == 1 else f"{', '.join(names)}: "
        yield whose + ", ".join(f"{name} {version}" for name, version in versions)


def _host_rows(hosts: Mapping[str, HostFacts], clocks: Mapping[str, ClockOffset]) -> Iterator[tuple[str, ...]]:
    if not hosts:
        return
    yield (
        "host",
        "cores",
        "memory (free)",
        "/dev/shm (free)",
        "free disk",
        "open files",
        "locked memory",
        "clock",
        "devices",
    )
    for host, facts in hosts.items():
        free = sorted(device.free for device in facts.devices)
        devices = describe_devices(facts) + (f" ({size_text(free[0])} free or more)" if free else "")
        clock = clocks.get(host)
        yield (
            host,
            str(facts.cores),
            f"{size_text(facts.memory)} ({size_text(facts.free_memory)})",
            f"{size_text(facts.shared_memory)} ({size_text(facts.free_shared_memory)})",
            size_text(facts.free_disk),
            limit(facts.open_files),
            "unlimited" if facts.locked_memory is None else size_text(facts.locked_memory),
            "?" if clock is None else f"{clock.seconds * 1e3:+.2f} ms +- {clock.error * 1e3:.2f}",
            devices,
        )


def _interfaces(hosts: Mapping[str, HostFacts]) -> Iterator[str]:
    """What gloo and NCCL take, a line for each library where all hosts take the same interface."""
    for library in ("gloo", "nccl") if hosts else ():
        taken: dict[str, Interface] = {host: getattr(facts, library) for host, facts in hosts.items()}
        if library == "nccl" and all(facts.versions["nccl"] == "none" for facts in hosts.values()):
            continue
        shown = ", ".join(f"{host} {one.name or 'none'} {one.address}".rstrip() for host, one in taken.items())
        yield f"{library} takes the interface: {shown}"


def _runs(report: Report) -> Iterator[str]:
    if not report.runs:
        return
    first = next(iter(report.runs.values()))
    yield f"configuration: {len(first.keys)} keys read on {_count(len(report.runs), 'host')}"
    yield from (f"{name}: {text}" for name, text in first.data.items())
    if report.folder:
        yield report.folder


def _kinds(links: Sequence[Link]) -> Iterator[tuple[list[Link], str]]:
    for backend, inside in dict.fromkeys((link.backend, link.inside) for link in links):
        kind = [link for link in links if (link.backend, link.inside) == (backend, inside)]
        yield kind, f"links {'inside hosts' if inside else 'between hosts'}, over {backend}"


def _links(links: Sequence[Link], words: str) -> list[str]:
    good = [link for link in links if not link.failure]
    if len(links) > MOST_LINKS:
        lines = [f"{words}: {len(links)}, of which {len(good)} work"]
        for name, values, text in (
            ("latency", [link.latency for link in good], time_text),
            ("bandwidth", [link.rate for link in good], rate_text),
        ):
            if good:
                low, high, middle = min(values), max(values), statistics.median(values)
                lines.append(f"  {name} {text(low)} to {text(high)}, median {text(middle)}")
        return lines
    rows: list[tuple[str, ...]] = [(words, "latency", "there", "back")]
    for link in links:
        cells = ("broken", "", "") if link.failure else (time_text(link.latency), *map(rate_text, link.rates))
        rows.append((f"  {link}", *cells))
    return _aligned(rows)


def _all_reduces(measured: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    for backend, found in measured.items():
        if "failure" in found:
            yield f"all-reduce over {backend}: {found['failure']}"
        else:
            yield (
                f"all-reduce over {backend}: {time_text(found['latency'])} small, {found['bytes'] / 2**20:.2g} MiB in "
                f"{found['seconds'] * 1e3:.0f} ms, bus {rate_text(found['rate'])}"
            )


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, every column but the last as wide as its widest cell."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]

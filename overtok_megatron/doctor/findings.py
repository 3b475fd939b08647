"""What is wrong with hosts: differences between them, and limits that a run on them will meet; a line for each. Pure functions.

Not here: the links between hosts (links.py).
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from overtok_megatron.doctor.facts import HostFacts
from overtok_megatron.doctor.meeting import ClockOffset
from overtok_megatron.doctor.run_facts import RunFacts
from overtok_megatron.environment import ACCELERATOR

HELLO = "the start"  # name of the first step
MOST_NAMES = 6  # hosts that a line names
MOST_KEYS = 8  # keys of a configuration that differ, of which a line each is written
CLOCK_SECONDS = 1.0
MEMORY_SHARE = 0.02  # by which the memory of equal hosts differs: each firmware keeps another part
# A rank holds a gloo connection to every other rank in each of a few groups, beside its libraries, datasets and checkpoints.
FILES_PER_RANK, FILES_BESIDE = 4, 512
# Bytes. Containers get 64 MiB where nobody asks for more, and NCCL's ranks of a host meet there.
SMALLEST_SHARED_MEMORY = 2**28


@dataclass(frozen=True)
class Host:
    """name: unique among the hosts of a report. ranks: of this examination."""

    name: str
    ranks: list[int]


def named(hosts: Sequence[str]) -> str:
    """`host a`, `hosts a, b`; of many hosts the first ones and their number."""
    if len(hosts) == 1:
        return f"host {hosts[0]}"
    shown = ", ".join(hosts[:MOST_NAMES])
    return f"hosts {shown}" if len(hosts) <= MOST_NAMES else f"hosts {shown}, ... ({len(hosts)} in all)"


def contrast(thing: str, values: Mapping[str, str]) -> str | None:
    """Who has another value of `thing` than most: `host b has torch 2.11.0, the others 2.13.0`; None where all are equal.

    values: by host. Of values that are equally frequent, the first host's counts as that of the others.
    """
    groups: dict[str, list[str]] = {}
    for host, value in values.items():
        groups.setdefault(value, []).append(host)
    if len(groups) < 2:
        return None
    common = max(groups, key=lambda value: len(groups[value]))  # the first of equals
    rest = groups.pop(common)
    odd = [f"{named(hosts)} {'has' if len(hosts) == 1 else 'have'} {thing} {value}" for value, hosts in groups.items()]
    return f"{'; '.join(odd)}, {'the others' if len(rest) > 1 else named(rest)} {common}"


def size_text(size: int) -> str:
    """Bytes, as `1.5 GiB` or `64 MiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def host_differences(hosts: Mapping[str, HostFacts]) -> Iterator[str]:
    """A line for each thing that hosts should have in common and have not."""
    for name in dict.fromkeys(name for facts in hosts.values() for name in facts.versions):
        yield from _differing(
            "versions differ", name, {host: one.versions.get(name, "none") for host, one in hosts.items()}
        )
    usual = statistics.median(facts.memory for facts in hosts.values())
    like = {host: abs(facts.memory - usual) <= MEMORY_SHARE * usual for host, facts in hosts.items()}
    columns = {
        "devices differ": ("the devices", {host: describe_devices(facts) for host, facts in hosts.items()}),
        "devices that torch sees differ": (
            "a number of",
            {host: str(facts.cuda_devices) for host, facts in hosts.items()},
        ),
        "cores differ": ("a number of", {host: str(facts.cores) for host, facts in hosts.items()}),
        "memory differs": (
            "a size of",
            {host: size_text(int(usual) if like[host] else facts.memory) for host, facts in hosts.items()},
        ),
        "open files differ": ("a limit of", {host: limit(facts.open_files) for host, facts in hosts.items()}),
        "locked memory differs": ("a limit of", {host: limit(facts.locked_memory) for host, facts in hosts.items()}),
        "active InfiniBand ports differ": (
            "a number of",
            {host: str(facts.infiniband_ports) for host, facts in hosts.items()},
        ),
    }
    for what, (thing, values) in columns.items():
        yield from _differing(what, thing, values)
    for name in sorted({name for facts in hosts.values() for name in facts.environment}):
        values = {host: facts.environment.get(name, "unset") for host, facts in hosts.items()}
        yield from _differing("environments differ", name, values)


def _differing(what: str, thing: str, values: Mapping[str, str]) -> Iterator[str]:
    text = contrast(thing, values)
    if text is not None:
        yield f"{what}: {text}"


def describe_devices(facts: HostFacts) -> str:
    """`8 x NVIDIA H100 80GB HBM3`, or `none`."""
    names = [device.name for device in facts.devices]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"


def limit(value: int | None) -> str:
    return "unlimited" if value is None else f"{value:,}"


def host_limits(hosts: Mapping[str, HostFacts], *, ranks: int, several: bool, nccl: bool) -> Iterator[str]:
    """A line for each thing that a run will fail on, with the hosts where it is so, by what each host alone is.

    ranks: of the run. several: it runs on more than one machine. nccl: its devices talk over NCCL.
    """
    return together(
        (host, text)
        for host, facts in hosts.items()
        for text in [*_interface_limits(facts, several=several, nccl=nccl), *_other_limits(facts, ranks)]
    )


def together(found: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A line for each text of (host, text), naming all hosts that have it."""
    hosts: dict[str, list[str]] = {}
    for host, text in found:
        hosts.setdefault(text, []).append(host)
    for text, names in hosts.items():
        yield f"{named(names)}: {text}"


def _interface_limits(facts: HostFacts, *, several: bool, nccl: bool) -> Iterator[str]:
    taken = {"gloo": facts.gloo} | ({"nccl": facts.nccl} if nccl else {})
    for library, interface in taken.items():
        variable = f"{library.upper()}_SOCKET_IFNAME"
        if interface.problem:
            yield f"{interface.problem}; correct {variable}, or bring the interface up"
        elif several and interface.loopback:
            yield (
                f"{library} takes {interface.name} ({interface.address}), which no other host reaches; set {variable} to the "
                "interface between the hosts"
            )


def _other_limits(facts: HostFacts, ranks: int) -> Iterator[str]:
    files = FILES_PER_RANK * ranks + FILES_BESIDE
    if facts.open_files is not None and facts.open_files < files:
        yield (
            f"a process may open {facts.open_files:,} files, a run of {ranks} ranks needs about {files:,}; raise the limit: "
            f"ulimit -n {files}"
        )
    if facts.infiniband_ports and facts.locked_memory is not None:
        yield (
            f"a process may lock {size_text(facts.locked_memory)} of memory, InfiniBand needs more; raise the limit: "
            "ulimit -l unlimited"
        )
    if facts.shared_memory < SMALLEST_SHARED_MEMORY:
        yield (
            f"/dev/shm has {facts.shared_memory / 2**20:.0f} MiB, NCCL needs more for the ranks of a host; start the "
            "container with --shm-size=1g or more"
        )
    if facts.devices and not facts.cuda_devices and facts.environment.get(ACCELERATOR) != "cpu":
        yield (
            f"nvidia-smi sees {describe_devices(facts)}, torch {facts.versions['torch']} sees no device; install a torch that "
            "fits the driver"
        )


def disk_findings(hosts: Mapping[str, HostFacts], needed: int) -> Iterator[str]:
    """A line for each output folder that cannot hold a checkpoint of `needed` bytes, with the hosts where it is so."""
    return together(
        (
            host,
            f"{facts.folder} has {size_text(facts.free_disk)} free, a checkpoint takes about {size_text(needed)}; free some, "
            "or set training.output_directory",
        )
        for host, facts in hosts.items()
        if facts.free_disk < needed
    )


def clock_findings(clocks: Mapping[str, ClockOffset]) -> Iterator[str]:
    """A line for each clock that is away from most others by more than CLOCK_SECONDS, beyond the error of the estimate."""
    usual = statistics.median_low([clock.seconds for clock in clocks.values()])
    for host, clock in clocks.items():
        ahead = clock.seconds - usual
        if abs(ahead) - clock.error > CLOCK_SECONDS:
            word = "ahead of" if ahead > 0 else "behind"
            yield f"host {host}: its clock is {abs(ahead):.1f} s {word} the others; let NTP (chrony) set it"


def run_differences(hosts: Mapping[str, RunFacts]) -> Iterator[str]:
    """A line for each part of the run that a host cannot read, or reads differently."""
    yield from together((host, f"{what}: {text}") for host, run in hosts.items() for what, text in run.failures.items())
    for what, parts in (
        ("configurations differ", {host: run.keys for host, run in hosts.items() if run.keys}),
        ("data differ", {host: run.data for host, run in hosts.items() if run.data}),
    ):
        names = dict.fromkeys(name for part in parts.values() for name in part)
        lines = [
            line
            for name in names
            for line in _differing(what, name, {host: part.get(name, "nothing") for host, part in parts.items()})
        ]
        yield from lines[:MOST_KEYS]
        if len(lines) > MOST_KEYS:
            yield f"{what}: {len(lines) - MOST_KEYS} further keys or sets"


def silent_findings(silent: Mapping[int, tuple[str, float]], hosts: Sequence[Host]) -> Iterator[str]:
    """A line for each host or rank that missed a step. silent: step and its limit by rank.

    hosts: all that are known by name, silent ones included; ranks that are in none have not told theirs.
    """
    by_rank = {rank: host for host in hosts for rank in host.ranks}
    told = set()
    for rank, (step, seconds) in silent.items():
        host = by_rank.get(rank)
        if host is None:
            yield f"rank {rank}: no answer within {seconds:.0f} s; was it started, and does its host reach the first one?"
            continue
        whole = all(silent.get(one, ("", 0))[0] == step for one in host.ranks)
        who = f"host {host.name}" if whole else f"host {host.name}, rank {rank}"
        if who not in told:
            mend = f"can you run `ssh {host.name} true`?" if step == HELLO else f"it stopped answering at: {step}"
            yield f"{who}: no answer within {seconds:.0f} s; {mend}"
        told.add(who)

"""Which network interface gloo and NCCL take on this host: their own rules, applied to the interfaces that are up.

Sources: torch/csrc/distributed/c10d/ProcessGroupGloo.cpp (createDefaultDevice) and NCCL's documentation of
NCCL_SOCKET_IFNAME with src/misc/socket.cc (ncclFindInterfaces). Not here: NCCL_COMM_ID, and which InfiniBand port NCCL takes.
"""

import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

LOOPBACK = "lo"
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


@dataclass(frozen=True)
class Interface:
    """The name and the address that a library takes. problem: why it takes none; name and address are then empty."""

    name: str
    address: str
    problem: str = ""

    @property
    def loopback(self) -> bool:
        """Whether only processes of this host can reach the address."""
        return self.name == LOOPBACK or self.address.startswith("127.") or self.address == "::1"


def interfaces_up() -> dict[str, list[str]]:
    """The interfaces of this host that are up and have an address, with their addresses; IPv4 addresses come first."""
    states = psutil.net_if_stats()
    found = {}
    for name, given in psutil.net_if_addrs().items():
        kinds = [socket.AF_INET, socket.AF_INET6]
        known = [one.address.partition("%")[0] for kind in kinds for one in given if one.family == kind]
        if known and (name not in states or states[name].isup):
            found[name] = known
    return found


def host_addresses(host: str) -> list[str]:
    """The addresses that this host's own name resolves to, in the resolver's order; none where it does not resolve."""
    try:
        return list(dict.fromkeys(str(one[4][0]) for one in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)))
    except OSError:
        return []


def gloo_interface(environment: Mapping[str, str], up: Mapping[str, list[str]], own_addresses: list[str]) -> Interface:
    """What gloo takes: the interface that GLOO_SOCKET_IFNAME names, else the one with the address of the host's name.

    up: as `interfaces_up` returns it. own_addresses: as `host_addresses` does. Where the name has no address of this host,
    gloo takes the loopback interface.
    """
    wanted = environment.get(GLOO, "")
    if wanted:
        first = wanted.split(",")[0]
        missing = [name for name in wanted.split(",") if name not in up]
        if missing:
            return Interface("", "", f"{GLOO}={wanted}: no interface {missing[0]} is up; {_listed(up)}")
        return Interface(first, up[first][0])
    for address in own_addresses:
        name = next((name for name, addresses in up.items() if address in addresses), None)
        if name is not None:
            return Interface(name, address)
        if address.startswith("127."):  # all of 127.0.0.0/8 is the loopback interface's
            return Interface(LOOPBACK, address)
    return Interface(LOOPBACK, next(iter(up.get(LOOPBACK, [])), "127.0.0.1"))


def nccl_interface(environment: Mapping[str, str], up: Mapping[str, list[str]]) -> Interface:
    """What NCCL takes first for its sockets: of those that NCCL_SOCKET_IFNAME allows, else the first by NCCL's preference.

    NCCL prefers InfiniBand's interfaces, then any, then Docker's, and takes the loopback interface last.
    """
    wanted = environment.get(NCCL, "")
    if wanted:
        allowed = [name for name in up if _allowed(name, wanted)]
        if not allowed:
            return Interface("", "", f"{NCCL}={wanted}: no interface that is up fits; {_listed(up)}")
        return Interface(allowed[0], up[allowed[0]][0])
    for rule in ("ib", "^docker,lo,virbr", "docker", "lo", "virbr"):
        for name in up:
            if _allowed(name, rule):
                return Interface(name, up[name][0])
    return Interface("", "", "no network interface is up")


def _allowed(name: str, rule: str) -> bool:
    """NCCL's form of a list: prefixes; `^` before it excludes them; `=` after that asks for whole names."""
    exclude, rule = rule.startswith("^"), rule.removeprefix("^")
    exact, rule = rule.startswith("="), rule.removeprefix("=")
    words = [word for word in rule.split(",") if word]
    fits = name in words if exact else any(name.startswith(word) for word in words)
    return fits != exclude


def _listed(up: Mapping[str, list[str]]) -> str:
    return f"up are {', '.join(up)}" if up else "none is up"

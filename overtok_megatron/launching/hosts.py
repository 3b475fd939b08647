"""Addresses of hosts: whether a name has one, and whether it is one of this host's."""

import socket


def addresses_of(name: str) -> set[str]:
    """The addresses that this host finds for a name; empty where it finds none."""
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except (OSError, UnicodeError):
        return set()


def is_own_address(address: str) -> bool:
    """Whether an address is one of this host's: a socket can be bound to no other."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True

"""Tells which names of hosts a public web site can have, and which are this server's."""

import re
from collections.abc import Sequence

ADDRESSED = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)(?::[0-9]{0,5})?")
"""A host and its port, as Host and Origin have them."""
RESERVED_ENDINGS = ("localhost", "local", "internal")
"""Last labels of names that nobody can register."""
ANY = "*"


def host_name(address: str) -> str | None:
    """Return the host of HOST or HOST:PORT in lower case, without a final dot; None if it is no host."""
    found = ADDRESSED.fullmatch(address)
    return found[1].lower().removesuffix(".") if found else None


def is_loopback(host: str) -> bool:
    """Return whether only programs of this machine reach a server that listens on `host`."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.[0-9]+){3}", host) is not None


def can_be_a_web_site(name: str) -> bool:
    """Return whether somebody can own a host's name. Addresses and names without a dot have no owner."""
    *parents, last = name.split(".")
    return bool(parents) and not name.startswith("[") and not last.isdigit() and last not in RESERVED_ENDINGS


def is_pattern(text: str) -> bool:
    """Return whether a text is a pattern of allowed hosts: a name, *.NAME (all names below it), or *."""
    return text == ANY or bool(host_name(text.removeprefix("*.")))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether one of the patterns allows a host's name."""
    for pattern in patterns:
        ending = host_name(pattern.removeprefix("*."))
        if pattern == ANY or (name == ending and not pattern.startswith("*.")):
            return True
        if pattern.startswith("*.") and name.endswith(f".{ending}"):
            return True
    return False

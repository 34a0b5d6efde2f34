"""A port for processes that must be told one before they listen."""

import random
import socket
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """One of 127.0.0.1 that nobody has and that the kernel gives to nobody.

    The ports that it gives to connections, and to servers that ask for any, are in a range of their own. One from
    there may be taken before the process that is told of it has begun to listen.
    """
    low, high = map(int, RANGE.read_text().split())
    # Where the kernel's range is everything, there is nothing better.
    ports = [port for port in range(10_000, 65_536) if not low <= port <= high] or range(10_000, 65_536)
    while True:
        port = random.SystemRandom().choice(ports)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port

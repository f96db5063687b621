"""Ports for servers that tests start."""

import os
import random
import socket
from contextlib import suppress


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on, and that nobody else will be given.

    It lies below those that the kernel hands out, and in a range of this worker's own: a port that the kernel chooses
    is free only until it chooses again, for a connection or for another test.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    while True:
        port = random.SystemRandom().randrange(10_000 + 2_000 * worker, 12_000 + 2_000 * worker)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port

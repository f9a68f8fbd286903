"""The process: a socket, signals, and uvicorn between them."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from ..errors import HeadwaterError, Problem


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free. Who connects before `run` waits until then.

    Raises:
        HeadwaterError: the address is taken, or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
        server.listen()  # until somebody listens, another server could bind the same port
    except (OSError, UnicodeError) as error:  # Python encodes names before it looks them up
        server.close()
        what = f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}"
        if isinstance(error, (socket.gaierror, UnicodeError)) or error.errno == errno.EADDRNOTAVAIL:
            where, fix = "--host", "give an address of this machine, or 0.0.0.0 for all that it has"
        else:
            where, fix = "--port", "choose another port, or 0 for any that is free"
        raise HeadwaterError(Problem(what, where, fix)) from error
    return server


_KEEP_ALIVE = 75
"""Seconds that an idle connection stays open. Longer than clients keep theirs (5, httpx and so OpenAI's), or a request
could be sent on one that is just being closed, and be lost."""


def _not_cancelled(record: logging.LogRecord) -> bool:
    """False for what a second signal cuts off: its tracebacks, starlette's as text, would tell of no fault."""
    raised = record.exc_info[1] if record.exc_info else None
    cut_off = isinstance(raised, asyncio.CancelledError) or record.getMessage().rstrip().endswith("CancelledError")
    return not cut_off


def run(app: Any, listening: socket.socket, *, grace: float, on_ready: Callable[[], None]) -> None:
    """Serves until SIGTERM or SIGINT; then takes no new connections, finishes the answers that are being written, and
    returns. A second signal stops at once.

    Args:
        grace: seconds that finishing may take.
    """

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(grace)),
        lifespan="on",
    )
    server = Server(config)
    logging.getLogger("uvicorn.error").addFilter(_not_cancelled)

    def stop(*_: Any) -> None:
        """For signals that come before uvicorn listens to them; it raises its own again once it is through, when there
        is nothing left to stop."""
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

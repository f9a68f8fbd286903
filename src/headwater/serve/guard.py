"""What stands before the application: who may ask, from where, and how much at once."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from .protocol import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = ("/", "/health")
"""Paths that need no key: they hold no data."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Guard:
    """ASGI middleware. Tells `on_refused` the status, and refuses with an error in OpenAI's shape:

    - 401 without the API key, where there is one; keys are compared in constant time;
    - 403 from another web page (its `Origin` is another host), and on loopback under another host's name, so that no
      page that a browser has open can reach the server behind the user's back;
    - 413 for bodies above `max_body` bytes, 408 for those that take longer than `read_timeout` seconds to arrive.
    """

    def __init__(
        self,
        app: Any,
        *,
        api_key: str | None,
        max_body: int,
        loopback: bool,
        on_refused: Callable[[int], None],
        read_timeout: float = 30.0,
    ):
        self.app, self.max_body, self.read_timeout, self.on_refused = app, max_body, read_timeout, on_refused
        self.key = api_key.encode() if api_key else None
        self.loopback = loopback

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refusal(scope, headers)
        if refused is not None:
            await self._refuse(send, *refused)
            return
        try:
            body = await asyncio.wait_for(self._body(receive), self.read_timeout)
        except asyncio.TimeoutError:
            await self._refuse(send, 408, "the body took too long to arrive", "invalid_request_error", "timeout")
            return
        if body is None:
            await self._refuse(send, *self._too_large())
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()  # what comes now is that the client has gone
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _refusal(self, scope: MutableMapping[str, Any], headers: dict[str, str]) -> tuple[int, str, str, str] | None:
        host = headers.get("host", "")
        if self.loopback and _hostname(host) not in LOOPBACK:
            return 403, f"this server is not {host!r}", "invalid_request_error", "wrong_host"
        origin = headers.get("origin")
        # not the scheme: behind a proxy with TLS the page has another than what arrives here
        if origin is not None and origin.partition("://")[1:] != ("://", host):
            return 403, f"pages of {origin} may not use this server", "invalid_request_error", "wrong_origin"
        if self.key is not None and scope["path"] not in OPEN:
            # as bytes, which were read as Latin-1; a letter's last one may look like a space there
            scheme, _, given = headers.get("authorization", "").encode("latin-1").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key):
                what = "give the server's API key as `Authorization: Bearer KEY`"
                return 401, what, "authentication_error", "invalid_api_key"
        length = headers.get("content-length", "")
        return self._too_large() if length.isdigit() and int(length) > self.max_body else None

    async def _refuse(self, send: Send, status: int, message: str, kind: str, code: str) -> None:
        self.on_refused(status)
        content = json.dumps(error_body(message, kind, code=code)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _too_large(self) -> tuple[int, str, str, str]:
        return 413, f"the body is larger than {self.max_body:,} bytes", "invalid_request_error", "body_too_large"

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, or None if it is too large."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b""
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None

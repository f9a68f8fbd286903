"""What happens before a request is with the engine: its prompts become tokens, and its adapters are chosen."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import httpx
import pytest
from tiny_models import make_tiny_tokenizer

from headwater.serve.app import Limits

from .engines import Plain
from .servers import application

BODY = {"prompt": "the cat", "max_tokens": 2, "temperature": 0}


class Held(Plain):
    """Adapters that are not found before they may be, or before 10 seconds have passed."""

    def __init__(self):
        super().__init__()
        self.free, self.late = threading.Event(), False

    def choose(self, name, text):
        self.late |= not self.free.wait(10)
        return super().choose(name, text)


@contextlib.asynccontextmanager
async def asking(routes=None, **options):
    app, engine = application(routes, **options)
    try:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:

            async def ask(**fields):
                return await client.post("/v1/completions", json={**BODY, **fields})

            yield ask
    finally:
        engine.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_may_be_out_of_time_while_it_is_read(stream):
    async def main():
        routes = Held()
        async with asking(routes, limits=Limits(timeout=0.05)) as ask:
            answer = await ask(stream=stream)
            routes.free.set()
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"

    asyncio.run(main())


def test_requests_that_are_read_hold_places():
    async def main():
        routes = Held()
        async with asking(routes, max_batch=1, max_waiting=2) as ask:
            asked = [asyncio.ensure_future(ask(n=n)) for n in (1, 2, 1)]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            routes.free.set()
            answers = await asyncio.gather(*asked)
            assert [answer.status_code for answer in answers] == [200, 200, 429]
            assert (await ask(n=3)).status_code == 200

    asyncio.run(main())


def test_a_client_that_leaves_while_its_request_is_read_is_noticed():
    arriving = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/completions"}
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    sent = []

    async def receive():
        return arriving.pop() if arriving else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def main():
        routes = Held()
        app, engine = application(routes)
        try:
            await app({**scope, "headers": headers, "query_string": b"", "root_path": ""}, receive, send)
            assert not routes.late
        finally:
            routes.free.set()
            engine.close()

    asyncio.run(main())
    assert sent[0]["status"] == 499


def test_what_can_be_refused_at_once_is_not_read(monkeypatch):
    read = []
    monkeypatch.setattr("headwater.serve.app.encode_prompt", lambda *_: read.append(1) or [1])

    async def main():
        async with asking() as ask:
            for fields in ({"prompt": ["a"] * 20}, {"max_tokens": 5000}, {"model": "other"}):
                assert (await ask(**fields)).status_code in (400, 404)
            assert not read
            assert (await ask()).status_code == 200
            assert read

    asyncio.run(main())


@pytest.mark.parametrize("prompt", [[310], "the <x55>"])
def test_tokens_that_the_model_does_not_have_are_refused(prompt):
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens([f"<x{i}>" for i in range(60)])  # 319, and the model has 300

    async def main():
        async with asking(tokenizer=tokenizer) as ask:
            answer = await ask(prompt=prompt)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt"
        assert "0 to 299" in answer.json()["error"]["message"]

    asyncio.run(main())

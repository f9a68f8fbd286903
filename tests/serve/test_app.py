"""What the application does when things go wrong: limits, clients that leave, a full queue, intruders."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn

from headwater.errors import HeadwaterError
from headwater.serve import Piece, Route, Sampling
from headwater.serve.answers import Answers
from headwater.serve.app import Limits
from headwater.serve.engine import Ticket
from headwater.serve.server import bind, run

from .engines import Plain, alone, endless_llama
from .servers import thread, wait_for

LONG = {"prompt": "the cat", "max_tokens": 20_000, "temperature": 0}
LIMITS = Limits(max_tokens=20_000, timeout=1000)


class Slow(Plain):
    """A model that takes its time: a quarter of an hour for LONG."""

    def __init__(self):
        super().__init__(endless_llama())

    def apply(self, routes):
        time.sleep(0.05)
        return super().apply(routes)


def post(url, path="/v1/completions", **fields):
    return httpx.post(f"{url}{path}", json=fields, timeout=60)


def test_a_full_queue_is_429_with_a_time_to_come_back():
    options = {"limits": LIMITS, "max_batch": 1, "max_waiting": 1}
    with thread(Slow(), **options) as (url, engine), httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}) as one:
            lines = one.iter_lines()  # kept, because httpx closes the response with it
            next(lines)
            with client.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}):
                wait_for(lambda: engine.waiting == 1)
                refused = post(url, **LONG)
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "queue_full"
                with pytest.raises(openai.RateLimitError):
                    openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0).completions.create(
                        model="plain", prompt="x"
                    )
                # both of two answers or none: a request that does not fit leaves nothing behind
                assert post(url, prompt=["a", "b"], max_tokens=3).status_code == 429
                assert engine.waiting == 1
        wait_for(lambda: engine.running == engine.waiting == 0)
        assert 'headwater_refused_requests_total{status="429"} 3.0' in httpx.get(f"{url}/metrics", timeout=60).text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream):
    with thread(Slow(), limits=LIMITS) as (url, engine):
        client = http.client.HTTPConnection(url.removeprefix("http://"))
        body = json.dumps({**LONG, "stream": stream})
        client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        wait_for(lambda: engine.running == 1)
        client.close()
        wait_for(lambda: engine.running == 0)
        wait_for(lambda: 'finish="cancelled",model="plain"} 1.0' in httpx.get(f"{url}/metrics", timeout=60).text)


def test_requests_out_of_time_end():
    with thread(Slow(), limits=replace(LIMITS, timeout=0.3)) as (url, engine):
        late = post(url, **LONG)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        lines = [line for line in post(url, **LONG, stream=True).text.splitlines() if line]
        assert json.loads(lines[-1][6:])["error"]["code"] == "timeout"
        wait_for(lambda: engine.running == 0)  # the answer is out before its row is gone


def test_a_piece_that_comes_when_the_loop_has_been_closed_is_nobodys():
    """The engine's thread may be that late where a second signal ends the server."""
    tickets = []

    def submit(prompt, route, sampling, on_piece, *, timeout, gates, logprobs):
        tickets.append(Ticket(prompt, route, sampling, on_piece, timeout, gates, logprobs))
        return tickets[-1]

    engine = SimpleNamespace(submit=submit)

    async def ask():
        service = SimpleNamespace(engine=engine, limits=LIMITS)
        Answers(service, "plain", 0.0, gates=False, logprobs=False).ask([1], Route("plain"), Sampling())

    asyncio.run(ask())
    tickets[0].deliver(Piece("late"))
    assert tickets[0].cancelled  # so that its place is free


def test_a_signal_that_comes_before_the_server_listens_to_them_ends_it(monkeypatch):
    original, late = uvicorn.Server.run, []

    def early(self, sockets):
        signal.raise_signal(signal.SIGTERM)
        original(self, sockets)

    async def app(scope, receive, send):
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    def again():
        late.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(uvicorn.Server, "run", early)
    impatient = threading.Timer(60, again)
    impatient.start()
    try:
        with bind("127.0.0.1", 0) as listening:
            run(app, listening, grace=1, on_ready=lambda: None)
    finally:
        impatient.cancel()
    assert not late


def test_what_the_model_raises_is_a_500_and_no_end_and_told_to_the_log_alone(caplog):
    class Broken(Plain):
        broken = False  # when the engine starts

        def apply(self, routes):
            if self.broken:
                raise RuntimeError("no more memory for /home/me")
            return super().apply(routes)

    routes = Broken()
    with thread(routes) as (url, _):
        routes.broken = True
        failed = post(url, prompt="x", max_tokens=2)
        assert failed.status_code == 500
        assert failed.json()["error"]["message"] == "RuntimeError in the server; its log says more"
        assert "/home/me" in caplog.text
        routes.broken = False
        assert post(url, prompt="x", max_tokens=2).status_code == 200


def test_bodies_have_a_size():
    with thread(limits=Limits(max_body=1000)) as (url, _):
        assert post(url, prompt="x" * 100, max_tokens=2).status_code == 200
        assert post(url, prompt="x" * 1000).json()["error"]["code"] == "body_too_large"

        def pieces():  # no Content-Length
            for _ in range(100):
                yield b" " * 100

        headers = {"Content-Type": "application/json"}
        assert httpx.post(f"{url}/v1/completions", content=pieces(), headers=headers, timeout=60).status_code == 413


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"prompt": {}}', b"\xff", b'{"prompt": "x", "n": 1e400}'])
def test_bodies_that_are_no_request(body):
    with thread() as (url, _):
        answer = httpx.post(
            f"{url}/v1/completions", content=body, headers={"Content-Type": "application/json"}, timeout=60
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_other_pages_and_other_names_are_kept_out():
    with thread() as (url, _):
        assert httpx.get(f"{url}/health", headers={"Host": "evil.example"}, timeout=60).status_code == 403
        assert httpx.get(f"{url}/health", headers={"Host": "[::1"}, timeout=60).status_code == 403
        assert httpx.get(f"{url}/health", headers={"Host": "localhost:1"}, timeout=60).status_code == 200
        for origin, status in (
            ("http://evil.example", 403),
            ("null", 403),
            (url, 200),
            (url.replace("http", "https"), 200),
        ):
            body = {"prompt": "x", "max_tokens": 1}
            got = httpx.post(f"{url}/v1/completions", json=body, headers={"Origin": origin}, timeout=60)
            assert got.status_code == status
        plain = httpx.post(
            f"{url}/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}, timeout=60
        )
        assert plain.status_code == 400


@pytest.mark.parametrize("key", ["plain", "clé", "naïve à", "ключ"])
def test_a_key_is_compared_as_it_was_sent(key):
    """curl sends the bytes of the terminal, which are UTF-8; their last one may read as a space in Latin-1."""
    sent = f"Bearer {key}".encode()
    with thread(api_key=key) as (url, _):
        for header, status in ((sent, 200), (b"bearer " + sent[7:], 200), (sent[:-1], 401), (sent + b"x", 401)):
            assert httpx.get(f"{url}/v1/models", headers={b"Authorization": header}, timeout=60).status_code == status


def test_a_chat_ends_with_the_user():
    with thread() as (url, _):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert "the user's" in post(url, "/v1/chat/completions", messages=turns).json()["error"]["message"]
        more = [{"role": "developer", "content": "s"}, *turns, {"role": "user", "content": "c"}]
        assert post(url, "/v1/chat/completions", messages=more, max_tokens=2).status_code == 200
        assert post(url, "/v1/chat/completions", messages=[{"role": "tool", "content": "a"}]).status_code == 400


def test_fields_that_ask_for_nothing_are_taken():
    nothing = {"logprobs": None, "logit_bias": {}, "presence_penalty": 0, "user": "me", "stop": None, "echo": False}
    with thread() as (url, _):
        answer = post(url, prompt="x", max_tokens=3, temperature=0, response_format={"type": "text"}, **nothing)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == len(alone(Plain().model, [ord("x") - 33], 3))


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(HeadwaterError, match="cannot listen on") as caught:
            bind("127.0.0.1", taken.getsockname()[1])
        assert caught.value.problems[0].where == "--port"


def test_a_port_that_a_server_has_which_is_still_loading():
    with bind("127.0.0.1", 0) as first, pytest.raises(HeadwaterError, match="cannot listen on"):
        bind("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "a..b", "zz::1"])
def test_a_host_that_is_none_is_not_the_port_s_fault(host):
    with pytest.raises(HeadwaterError, match="cannot listen on") as caught:
        bind(host, 0)
    assert caught.value.problems[0].where == "--host"

"""What goes wrong with one request ends that request alone, and every request that was taken ends."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import torch
from compose.pool_support import make_pool
from tiny_models import make_tiny_llama

from headwater.compose import PooledModel
from headwater.serve import BusyError, PoolRoutes, Route, Sampling
from headwater.serve.batch import Batch
from headwater.serve.sampling import pick

from .engines import Plain, alone, burst, make_prompts, running, tokens_of
from .servers import thread

PLAIN = Route("plain")


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-30])
def test_temperatures_near_zero_are_as_zero(temperature):
    routes, (one, other) = Plain(), make_prompts(2)
    with running(routes) as engine:
        answers = burst(engine, (one, PLAIN, Sampling(9)), (other, PLAIN, Sampling(9, temperature, seed=1)))
    assert list(map(tokens_of, answers)) == [alone(routes.model, one, 9), alone(routes.model, other, 9)]
    negative = torch.tensor([-3.0, -1.0, -2.0])
    assert pick(negative, Sampling(temperature=temperature), Sampling().generator()) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_outputs_that_are_not_finite_end_their_own_answer(monkeypatch, temperature, value):
    class Strange(Plain):
        @contextlib.contextmanager
        def apply(self, routes):
            self.rows = [i for i, route in enumerate(routes) if route.name == "strange"]
            yield {}

    routes, (one, other) = Strange(), make_prompts(2)
    forward = Batch._forward

    def spoil(self, *args):
        output = forward(self, *args)
        output.logits[routes.rows] = value
        return output

    monkeypatch.setattr(Batch, "_forward", spoil)
    strange = Sampling(9, temperature, seed=1)
    with running(routes) as engine:
        good, bad = burst(engine, (one, PLAIN, Sampling(9)), (other, Route("strange"), strange))
    assert tokens_of(good) == alone(routes.model, one, 9)
    assert [piece.finish for piece in bad] == ["error"]
    assert "not finite" in bad[0].error


def test_some_tokens_may_be_ruled_out_by_the_model():
    logits = torch.tensor([-float("inf"), 0.0, -float("inf"), 0.1])
    generator = Sampling(seed=1).generator()
    assert {int(pick(logits, Sampling(temperature=2.0), generator)) for _ in range(50)} == {1, 3}


def test_drawing_that_fails_ends_its_own_answer(monkeypatch):
    def fail(logits, sampling, generator):
        if sampling.seed == 13:
            raise RuntimeError("no such luck")
        return pick(logits, sampling, generator)

    monkeypatch.setattr("headwater.serve.engine.pick", fail)
    routes, prompts = Plain(), make_prompts(3)
    hot = [(prompt, PLAIN, Sampling(6, 1.0, seed=seed)) for prompt, seed in zip(prompts, (1, 13, 2), strict=True)]
    with running(routes) as engine:
        first, bad, last = burst(engine, *hot)
        expected = burst(engine, hot[0], hot[2])
    assert [piece.finish for piece in bad] == ["error"]
    assert list(map(tokens_of, (first, last))) == list(map(tokens_of, expected))


@pytest.mark.parametrize("where", ["add", "on_step"])
def test_every_request_that_was_taken_ends_whatever_breaks(monkeypatch, where):
    class Breaking(Plain):
        def apply(self, routes):
            if any(route.name == "broken" for route in routes):  # so that the others are read one by one
                raise RuntimeError("this adapter cannot be read")
            return super().apply(routes)

    broken = threading.Event()
    broken.set()

    def fail(*_):
        if broken.is_set():
            raise RuntimeError("out of memory")

    add = Batch.add
    if where == "add":
        monkeypatch.setattr(Batch, "add", lambda self, new: fail() or add(self, new))
    routes, (one, two, three) = Breaking(), make_prompts(3)
    options = {"on_step": fail} if where == "on_step" else {}
    with running(routes, **options) as engine:
        answers = burst(
            engine, (one, Route("broken"), Sampling(4)), (two, PLAIN, Sampling(4)), (three, PLAIN, Sampling(4))
        )
        assert [[piece.finish for piece in answer] for answer in answers] == [["error"]] * 3
        broken.clear()
        assert tokens_of(burst(engine, (one, PLAIN, Sampling(4)))[0]) == alone(routes.model, one, 4)


def test_as_many_requests_fit_as_there_are_places_to_be_answered_and_to_wait():
    (prompt,) = make_prompts(1)
    with running(Plain(), max_batch=2, max_waiting=1) as engine:
        for _ in range(3):  # places are free again once their answers have ended
            burst(engine, *[(prompt, PLAIN, Sampling(2))] * 3)
        with pytest.raises(BusyError):
            burst(engine, *[(prompt, PLAIN, Sampling(2))] * 4)


def test_an_adapter_that_is_gone_is_503_and_its_path_stays_in_the_log(tmp_path, caplog):
    pool = make_pool(tmp_path)
    routes = PoolRoutes(pool, PooledModel(make_tiny_llama(), pool.load), None)
    with thread(routes) as (url, _):

        def ask(name, **fields):
            body = {"model": name, "prompt": "x", "max_tokens": 2, "temperature": 0, **fields}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60)

        assert ask("twin").status_code == 200
        for name in ("plain", "twin"):
            shutil.rmtree(pool.folder(name))
        gone = ask("plain")
        assert gone.status_code == 503
        error = gone.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "unavailable")
        assert "plain cannot be loaded" in error["message"]
        assert str(tmp_path) not in gone.text
        assert str(pool.folder("plain")) in caplog.text
        streamed = ask("plain", stream=True).text
        assert '"code": "unavailable"' in streamed
        assert str(tmp_path) not in streamed
        assert ask("twin").status_code == ask("rs").status_code == 200  # one is loaded already, the other is there
        assert 'finish="unavailable",model="plain"} 2.0' in httpx.get(f"{url}/metrics", timeout=60).text


def test_a_python_that_ends_waits_for_the_forward_that_runs():
    """The thread would abort the process where it came back from PyTorch; all the answers would take minutes."""
    command = [sys.executable, "-m", "serve.cut_off"]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, timeout=300)

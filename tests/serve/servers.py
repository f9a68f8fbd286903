"""Servers to talk to: the real command in a process of its own, or the application on a thread."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from tiny_models import make_tiny_tokenizer

from headwater.data.encode import DataSpec
from headwater.serve import Engine
from headwater.serve.app import Limits, Service, make_app
from headwater.serve.metrics import Metrics
from headwater.serve.server import bind

from .engines import Plain, sharp_llama


def save_base(folder: Path, model=None) -> Path:
    (model or sharp_llama()).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class Process:
    url: str
    popen: subprocess.Popen
    log: Path

    def terminate(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(120)


@contextlib.contextmanager
def process(folder: Path, source: Path, *options: str, **variables: str) -> Iterator[Process]:
    """`headwater serve SOURCE` as people run it, once it says that it serves."""
    log = folder / "serve.log"
    command = [str(Path(sys.executable).with_name("headwater")), "serve", str(source), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    with log.open("w") as out:
        popen = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        until = time.monotonic() + 300
        while not (found := re.search(r"at (http://\S+)\nmodels: ", log.read_text())):
            assert popen.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        yield Process(found[1], popen, log)
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait()


def application(
    routes=None, *, limits: Limits | None = None, api_key: str | None = None, tokenizer=None, **options
) -> tuple[Any, Engine]:
    """The application over `routes`, and its engine, to be closed."""
    tokenizer = tokenizer or make_tiny_tokenizer()
    engine = Engine(routes or Plain(), tokenizer, **options)
    metrics = Metrics()
    metrics.watch(lambda: engine.running, lambda: engine.waiting)
    service = Service(engine, tokenizer, DataSpec(), limits or Limits(), metrics)
    return make_app(service, api_key=api_key), engine


@contextlib.contextmanager
def thread(routes=None, *, wrap=lambda app: app, **options) -> Iterator[tuple[str, Engine]]:
    """The application over `routes` on a thread: its address and its engine."""
    app, engine = application(routes, **options)
    listening = bind("127.0.0.1", 0)
    config = uvicorn.Config(wrap(app), log_level="warning", lifespan="on", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    running = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    running.start()
    wait_for(lambda: server.started or not running.is_alive())
    assert server.started
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        running.join(120)
        listening.close()


def wait_for(condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)

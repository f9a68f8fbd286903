"""`headwater serve`."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from headwater.cli.adapters import load, locate
from headwater.cli.console import err_console, out_console, quiet_libraries
from headwater.errors import HeadwaterError, Problem

if TYPE_CHECKING:
    from headwater.compose import AdapterPool
    from headwater.data.encode import DataSpec
    from headwater.serve import Routes

KEY_VARIABLE = "HEADWATER_API_KEY"


def run(
    source: str,
    *,
    host: str,
    port: int,
    api_key_file: str | None,
    max_batch: int,
    max_queue: int,
    max_tokens: int,
    max_length: int | None,
    max_body: int,
    timeout: float,
    encoder: str,
    top: int | None,
    way: str | None,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        HeadwaterError: no pool and no adapter, packages missing, an unusable key file, a timeout that is no
            number of seconds, or an address that is taken.
    """
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise HeadwaterError(Problem(f"serving needs {', '.join(missing)}", fix="pip install 'headwater[serve]'"))
    if not math.isfinite(timeout):
        fix = "give a number of seconds, a large one for requests that may take any time"
        raise HeadwaterError(Problem(f"this is no length of time: {timeout}", "--timeout", fix))
    key = _key(api_key_file)

    from headwater.serve.guard import LOOPBACK
    from headwater.serve.server import bind
    from headwater.serve.server import run as serve

    loopback = host in LOOPBACK
    quiet_libraries()
    listening = bind(host, port)  # before the model is loaded, which takes longer than to learn that a port is taken
    with contextlib.ExitStack() as held:
        held.callback(listening.close)
        with err_console().status(Text(f"loading {source}")):
            routes, tokenizer, data_spec = _routes(source, max_batch, encoder, top, way, held)

        from headwater.serve import Engine
        from headwater.serve.app import Limits, Service, make_app
        from headwater.serve.metrics import Metrics

        metrics = Metrics()
        engine = Engine(
            routes,
            tokenizer,
            max_batch=max_batch,
            max_waiting=max_queue,
            max_length=max_length,
            on_step=metrics.batch.observe,
        )
        metrics.watch(lambda: engine.running, lambda: engine.waiting)
        limits = Limits(max_tokens=max_tokens, max_body=max_body, timeout=timeout)
        service = Service(engine, tokenizer, data_spec, limits, metrics)
        app = make_app(service, api_key=key, loopback=loopback)
        if not loopback and key is None:
            what = f"warning: anybody who reaches {host} can use this server; --api-key-file asks for a key"
            err_console().print(what, soft_wrap=True, highlight=False)

        def ready() -> None:
            at = f"[{host}]" if ":" in host else host
            address = f"http://{at}:{listening.getsockname()[1]}"
            out_console().print(f"serving {source} at {address}", soft_wrap=True, highlight=False, markup=False)
            out_console().print(f"models: {', '.join(routes.names)}", soft_wrap=True, highlight=False, markup=False)

        serve(app, listening, grace=timeout, on_ready=ready)


def _routes(
    source: str, max_batch: int, encoder: str, top: int | None, way: str | None, held: contextlib.ExitStack
) -> tuple[Routes, Any, DataSpec]:
    """What is served, its tokenizer, and how prompts become tokens; `held` keeps what has to last as long as it."""
    from headwater.data.encode import DataSpec
    from headwater.serve import RunRoutes

    pool = (Path(source) / "pool.json").is_file()
    problems = []
    if way is not None and not pool:
        problems.append(Problem("a way to combine adapters needs a pool of them", "--way", "give the pool"))
    if way is not None or not pool:
        what = "adapters are retrieved for `auto` alone, which a pool served without --way has"
        given = [name for name, value in (("--encoder", encoder), ("--top", top)) if value]
        problems += [Problem(what, name, "leave it out") for name in given]
    if problems:
        raise HeadwaterError(*problems)
    if pool:
        return _pool_routes(source, max_batch, encoder, top or 3, way, held)
    found = locate(source)
    model, tokenizer = load(found)
    tasks = [task.name for task in found.config.tasks] if found.config else []
    name = Path(source).resolve().name
    return RunRoutes(model, name, tasks), tokenizer, found.config.data if found.config else DataSpec()


def _pool_routes(
    source: str, max_batch: int, encoder: str, top: int, way: str | None, held: contextlib.ExitStack
) -> tuple[Routes, Any, DataSpec]:
    from headwater.base_model import load_to_run, own_device
    from headwater.compose import AdapterPool, PooledModel
    from headwater.data.encode import DataSpec
    from headwater.serve import PoolRoutes, RunRoutes

    pool = AdapterPool(source)
    model, tokenizer = load_to_run(pool.base_model, own_device())
    pool.fingerprint.require(model)
    pooled = PooledModel(model, pool.load, keep=max(32, top * max_batch))
    if way is not None:
        from headwater.compose.scoring import on_model

        held.enter_context(on_model(way, pool, pooled))
        return RunRoutes(model, Path(way).resolve().name), tokenizer, DataSpec()
    return PoolRoutes(pool, pooled, _retrieve(pool, encoder, top)), tokenizer, DataSpec()


def _retrieve(pool: AdapterPool, encoder: str, top: int) -> Callable[[str], Mapping[str, float]] | None:
    """What finds a pool's adapters for a text; None where no adapter has texts to be found by."""
    if not any(entry.samples for entry in pool.entries.values()):
        return None
    from headwater.compose.encoder import load_encoder
    from headwater.compose.retriever import Retriever, mixtures

    retriever = Retriever.of(pool, load_encoder(encoder, progress=err_console().print))
    return lambda text: mixtures(retriever.retrieve([text], top))[0]


def _key(file: str | None) -> str | None:
    if file is None:
        value = os.environ.get(KEY_VARIABLE, "")
        if value and not value.strip():
            raise HeadwaterError(Problem(f"there is no API key in {KEY_VARIABLE}", "", "set it to one, or unset it"))
        return value.strip() or None
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise HeadwaterError(Problem(f"the API key cannot be read: {error}", f"--api-key-file {file}")) from error
    if not key:
        raise HeadwaterError(Problem("there is no API key in this file", f"--api-key-file {file}"))
    return key

"""Serving: a batch of eight different adapters beside one adapter for all and one call after the other; and a crowd.

    python -m benchmarks.serve_load --json benchmarks/results/serve_load.json

Throughput goes through the engine that `headwater serve` runs, on the demo's model: eight requests with eight different
adapters of a pool in one batch ("mixed"), the same eight with one adapter ("one adapter"), and the eight one after the
other, each by itself ("sequential"). The adapters are random; what they say takes no part in how long it takes.

The crowd is a real server process on a tiny random model with the same number of adapters, and as many clients at once
as asked for, who ask a number of different things: every answer must be the one that the same request gets alone.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headwater.base_model import load_base_model, load_tokenizer
from headwater.compose import Adapter, AdapterPool, LowRank, PooledModel
from headwater.compose.adapter import write_adapter
from headwater.serve import Engine, PoolRoutes, Sampling

from . import measure, models

TARGETS = ("gate_proj", "up_proj", "down_proj")
MIXED, ONE, SEQUENTIAL = "mixed", "one adapter", "sequential"


def random_pool(folder: Path, base: str, model: Any, *, adapters: int, r: int, seed: int) -> AdapterPool:
    """A pool of random LoRA adapters on all MLP projections."""
    pool = AdapterPool.create(folder / "pool", base, model)
    generator = torch.Generator().manual_seed(seed)
    for index in range(adapters):
        layers = {
            name: LowRank(
                torch.randn(r, d_in, generator=generator) * d_in**-0.5, torch.randn(d_out, r, generator=generator), 0.02
            )
            for name, (d_in, d_out) in pool.fingerprint.layers.items()
            if name.endswith(TARGETS)
        }
        write_adapter(Adapter(f"a{index}", layers), folder / f"a{index}", pool.base_model)
        pool.add(folder / f"a{index}", f"a{index}")
    return pool


def throughput(options: Any, folder: Path) -> dict[str, Any]:
    """Seconds for eight requests, three ways."""
    model, tokenizer = load_base_model(options.model, dtype="float32")
    pool = random_pool(folder, options.model, model, adapters=options.adapters, r=options.r, seed=options.seed)
    routes = PoolRoutes(pool, PooledModel(model, pool.load), None)
    model.generation_config.eos_token_id = None  # every answer has all of its tokens
    tokenizer.eos_token = None
    engine = Engine(routes, tokenizer, max_batch=options.adapters)
    generator = torch.Generator().manual_seed(options.seed)
    size = (options.adapters, options.prompt_tokens)
    prompts = torch.randint(9, model.config.vocab_size, size, generator=generator).tolist()
    different = [routes.choose(name, "") for name in pool.names]
    samplings = [Sampling(max_tokens=options.new_tokens)] * options.adapters

    def sequential() -> None:
        for prompt, route, sampling in zip(prompts, different, samplings, strict=True):
            engine.generate([prompt], [route], [sampling])

    ways = {
        MIXED: lambda: engine.generate(prompts, different, samplings),
        ONE: lambda: engine.generate(prompts, different[:1] * options.adapters, samplings),
        SEQUENTIAL: sequential,
    }
    together = [[piece.token for piece in answer] for answer in engine.generate(prompts, different, samplings)]
    alone = [
        [piece.token for piece in engine.generate([p], [r], [s])[0]]
        for p, r, s in zip(prompts, different, samplings, strict=True)
    ]
    seconds = measure.interleave(ways, rounds=options.rounds, warmup=1, seed=options.seed)
    engine.close()
    ratio = measure.ratios(seconds, MIXED)
    rate = options.adapters * options.new_tokens / measure.spread(seconds[MIXED])["median"]
    measure.print_table(
        f"{options.adapters} requests, {options.prompt_tokens} tokens of prompt and {options.new_tokens} of answer, "
        f"{options.adapters} adapters of rank {options.r}\n"
        f"mixed: {rate:.1f} tokens per second; answers equal to those alone: {together == alone}",
        ["", "seconds, median", "time / mixed, median (min-max)"],
        [[n, f"{measure.spread(seconds[n])['median']:.2f}", measure.show_ratio(ratio[n])] for n in ways],
    )
    return {
        "model": Path(options.model).name,
        "seconds": {name: measure.spread(values) for name, values in seconds.items()},
        "time_over_mixed": ratio,
        "mixed_over_one_adapter": measure.ratios(seconds, ONE)[MIXED],
        "answers_equal_alone": together == alone,
    }


@contextmanager
def server(pool: Path, log: Path, *options: str) -> Iterator[str]:
    """`headwater serve` in a process of its own; yields its address."""
    command = [sys.executable, "-m", "headwater", "serve", str(pool), "--port", "0", *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        while not (found := re.search(r"at (http://\S+)\nmodels: ", log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)


async def ask(client: httpx.AsyncClient, url: str, request: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(f"{url}/v1/completions", json={**request, "temperature": 0})
    answer.raise_for_status()
    return answer.json()


def tiny_model(like: str, folder: Path, *, seed: int) -> Path:
    """A random Llama of two small layers with the tokenizer of `like`."""
    tokenizer = load_tokenizer(like)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def crowd(options: Any, folder: Path) -> dict[str, Any]:
    """Many requests at once against the same ones alone."""
    base = tiny_model(options.model, folder / "base", seed=options.seed)
    pool = random_pool(
        folder, str(base), load_base_model(str(base))[0], adapters=options.adapters, r=4, seed=options.seed
    )
    different = [
        {"model": pool.names[i % len(pool)], "prompt": f"request {i} of many", "max_tokens": 4 + i % 5}
        for i in range(options.different)
    ]
    requests = [different[i % len(different)] for i in range(options.requests)]

    async def all_at_once(url: str, among: Sequence[dict[str, Any]], at_once: int) -> list[dict[str, Any]]:
        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(limits=limits, timeout=600) as client:
            return await asyncio.gather(*(ask(client, url, request) for request in among))

    settings = ("--max-queue", str(options.requests), "--timeout", "600", "--max-batch", "32")
    with server(pool.path, folder / "log", *settings) as url:
        alone = asyncio.run(all_at_once(url, different, 1))
        began = time.perf_counter()
        together = asyncio.run(all_at_once(url, requests, options.requests))
        seconds = time.perf_counter() - began
    expected, texts = ([answer["choices"][0]["text"] for answer in answers] for answers in (alone, together))
    right = sum(text == expected[i % len(different)] for i, text in enumerate(texts))
    found = {
        "requests": len(requests),
        "answered": len(together),
        "equal_to_alone": right,
        "different_requests": len(different),
        "different_answers": len(set(expected)),
        "seconds": seconds,
    }
    measure.print_table(f"{len(requests)} requests at once", list(found), [[str(v) for v in found.values()]])
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.arguments(__doc__ or "", rounds=7)
    parser.add_argument("--model", default=str(models.demo_model()), help="a language model; the demo's by default")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--requests", type=int, default=1000, help="of the crowd, all at once")
    parser.add_argument("--different", type=int, default=125, help="of them, as many different ones")
    parser.add_argument("--only", choices=("throughput", "crowd"), default=None, help="one of the two parts")
    options = parser.parse_args(argv)
    measure.prepare(options)
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "tiny").mkdir()
        results: dict[str, Any] = {"environment": measure.environment(options)}
        if options.only != "crowd":
            results["throughput"] = throughput(options, folder)
        if options.only != "throughput":
            results["crowd"] = crowd(options, folder / "tiny")
    finally:
        shutil.rmtree(folder)
    measure.write(options.json, results)
    return results


if __name__ == "__main__":
    main()

"""A batch whose rows use different adapters: beside one adapter for all rows, and beside one call per row.

    python -m benchmarks.pool_speed --json benchmarks/results/pool_speed.json

Eight random LoRA adapters on all linear layers of the decoder. The floor is one adapter of the pool for all rows. Three
things are timed: reading a prompt of 64 tokens, one token of generation behind a key-value cache of 64, and whole
answers, 32 tokens read and 32 written. "row by row" does each row's work in a call of its own, its adapter ready on the
model.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache

from headwater.base_model import load_base_model
from headwater.compose import AdapterPool, PooledModel

from . import measure, models

ONE, MIXED = "one adapter for all rows", "different adapters in one pass"
THREE = "three adapters in every row, one pass"
ROW_BY_ROW, BASE = "different adapters, row by row", "base model, no adapter"
PEFT_ONE, PEFT_MIXED = "PEFT, one adapter for all rows", "PEFT, adapter_names (loops over adapters)"


def make_pool(folder: Path, base: Any, name: str, *, count: int, r: int) -> AdapterPool:
    """A pool of random adapters on every linear layer but the output's."""
    pool = AdapterPool.create(folder / "pool", name, base)
    config = LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    for number in range(count):
        get_peft_model(models.sharing(base), config).save_pretrained(str(folder / "adapter"))
        pool.add(folder / "adapter", f"a{number}", same_base=True)
    return pool


@dataclass(frozen=True)
class Call:
    """Some rows of the batch, the model that they go through, what to enter before, and more keywords."""

    model: Any
    rows: slice = field(default_factory=lambda: slice(None))
    ready: Callable[[], Any] = contextlib.nullcontext
    more: dict[str, Any] = field(default_factory=dict)


def prefill(calls: Sequence[Call], prompts: torch.Tensor) -> Callable[[], None]:
    """Reads the prompts; logits of the last position only."""

    def run() -> None:
        for call in calls:
            with torch.inference_mode(), call.ready():
                call.model(input_ids=prompts[call.rows], logits_to_keep=1, **call.more)

    return run


def step(calls: Sequence[Call], prompts: torch.Tensor) -> Callable[[], None]:
    """One token behind a cache that holds the prompts; the token is taken out of the cache again."""
    caches = [DynamicCache() for _ in calls]
    for call, cache in zip(calls, caches, strict=True):
        with torch.inference_mode(), call.ready():
            call.model(input_ids=prompts[call.rows], past_key_values=cache, use_cache=True, **call.more)

    def run() -> None:
        for call, cache in zip(calls, caches, strict=True):
            with torch.inference_mode(), call.ready():
                call.model(input_ids=prompts[call.rows, -1:], past_key_values=cache, use_cache=True, **call.more)
            cache.crop(-1)

    return run


def answer(calls: Sequence[Call], prompts: torch.Tensor, tokens: int) -> Callable[[], None]:
    """Whole answers of so many tokens, greedily."""
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def run() -> None:
        for call in calls:
            ids = prompts[call.rows]
            with call.ready():
                call.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **call.more)

    return run


def variants(base: Any, pool: AdapterPool) -> dict[str, list[Call]]:
    """Name -> the calls that do the batch's work; all on the same base weights."""
    names = pool.names

    def pooled(mixtures: list[dict[str, float]], rows: slice = slice(None)) -> Call:
        model = PooledModel(models.frozen(base), pool.load)
        return Call(model.model, rows, lambda: model.rows(mixtures))

    def peft(loaded: list[str], **more: Any) -> Call:
        model = PeftModel.from_pretrained(models.frozen(base), str(pool.folder(names[0])), adapter_name=names[0])
        for name in loaded[1:]:
            model.load_adapter(str(pool.folder(name)), name)
        return Call(model.eval(), more=more)

    three = [{names[(i + j) % len(names)]: 1 / 3 for j in range(3)} for i in range(len(names))]
    return {
        BASE: [Call(models.frozen(base))],
        ONE: [pooled([{names[0]: 1.0}])],
        MIXED: [pooled([{name: 1.0} for name in names])],
        THREE: [pooled(three)],
        ROW_BY_ROW: [pooled([{name: 1.0}], slice(i, i + 1)) for i, name in enumerate(names)],
        PEFT_ONE: [peft(names[:1])],
        PEFT_MIXED: [peft(names, adapter_names=names)],
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.arguments(__doc__ or "", rounds=9)
    parser.add_argument(
        "--model", type=Path, default=models.demo_model(), help="a model's folder; the demo's by default"
    )
    parser.add_argument("--adapters", type=int, default=8, help="adapters, and rows of the batch")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt, where only it is read")
    parser.add_argument("--new", type=int, default=32, help="tokens written, and read before, in whole answers")
    options = parser.parse_args(argv)
    measure.prepare(options)
    base = load_base_model(str(options.model), dtype="float32")[0]
    with tempfile.TemporaryDirectory() as folder:
        pool = make_pool(Path(folder), base, str(options.model), count=options.adapters, r=options.r)
        built = variants(base, pool)
        prompts = torch.randint(base.config.vocab_size, (options.adapters, options.prompt))
        work = {
            "prompt": {name: prefill(calls, prompts) for name, calls in built.items()},
            "token": {name: step(calls, prompts) for name, calls in built.items()},
            "answer": {name: answer(calls, prompts[:, : options.new], options.new) for name, calls in built.items()},
        }
        found = {}
        for what, runs in work.items():
            rounds = max(1, options.rounds // 3) if what == "answer" else options.rounds
            seconds = measure.interleave(runs, rounds=rounds, warmup=1, seed=options.seed)
            found[what] = {"floor_seconds": measure.spread(seconds[ONE]), "variants": measure.ratios(seconds, ONE)}
    floors = ", ".join(f"{what} {part['floor_seconds']['median']:.3f} s" for what, part in found.items())
    title = f"{options.adapters} rows, adapters of rank {options.r}\nfloor: {ONE}: {floors}"
    rows = [[name, *(measure.show_ratio(part["variants"][name]) for part in found.values())] for name in built]
    measure.print_table(title, ["time / floor, median (min-max)", *found], rows)
    results = {"environment": measure.environment(options), "work": found}
    measure.write(options.json, results)
    return results


if __name__ == "__main__":
    main()

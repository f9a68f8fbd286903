"""One token of generation: what an adapter adds to the base model's step, for batch 1 and 8.

    python -m benchmarks.decode_speed --json benchmarks/results/decode_speed.json

The floor is the base model's own step with a key-value cache of 128 positions. "merged" is M-LoRA after
`merge_and_unload`: the base model's modules with other weights, so its step is the base model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from headwater.base_model import load_base_model

from . import layers, measure, models
from .layers import FLOOR, LOOP

MERGED = "M-LoRA, merged"


def variants(base: Any, *, r: int, N: int, methods: Sequence[str]) -> dict[str, tuple[Any, bool]]:
    """Name -> model in eval mode, and whether it takes task ids."""
    fields = {"r": r, "N": N, "dropout": 0.1, "num_tasks": 3}
    found: dict[str, tuple[Any, bool]] = {
        FLOOR: (models.frozen(base), False),
        f"PEFT LoRA r={r}": (models.peft_lora(base, r, 0.1), False),
        f"PEFT LoRA r={N * r}": (models.peft_lora(base, N * r, 0.1), False),
        LOOP: (models.public_loop(base, r=r, N=N, dropout=0.1), False),
        MERGED: (models.ours(base, "mlora", **fields, share=False).merge_and_unload(), False),
    }
    for name in methods:
        model = models.ours(base, name, **fields)
        found[layers.title_of(name)] = (model, model.peft_config["default"].needs_task_ids)
    return {name: (model.eval(), tasks) for name, (model, tasks) in found.items()}


def step(model: Any, takes_tasks: bool, prompt: torch.Tensor) -> Callable[[], None]:
    """One token behind a cache that holds the prompt; the token is taken out of the cache again."""
    cache, tasks = DynamicCache(), {}
    if takes_tasks:
        tasks = {"headwater_task_ids": torch.arange(prompt.shape[0], device=prompt.device) % 3}
    with torch.inference_mode():
        model(prompt, past_key_values=cache, use_cache=True, **tasks)
    token = prompt[:, -1:]

    @torch.inference_mode()
    def run() -> None:
        model(token, past_key_values=cache, use_cache=True, **tasks)
        cache.crop(-1)

    return run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.arguments(__doc__ or "", rounds=25)
    parser.add_argument("--model", default=str(models.demo_model()), help="a language model; the demo's by default")
    parser.add_argument("--methods", nargs="*", default=layers.method_names(), help="methods to run, by name")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--num-heads", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    options = parser.parse_args(argv)
    measure.prepare(options)
    base = load_base_model(options.model, dtype=options.dtype)[0].to(options.device)
    built = variants(base, r=options.r, N=options.num_heads, methods=options.methods)
    batches = []
    for batch in (1, 8):
        prompt = torch.randint(base.config.vocab_size, (batch, 128), device=options.device)
        steps = {name: step(model, tasks, prompt) for name, (model, tasks) in built.items()}
        seconds = measure.interleave(steps, rounds=options.rounds, device=options.device, seed=options.seed)
        ratio = measure.ratios(seconds, FLOOR)
        batches.append({"batch": batch, "floor_seconds": measure.spread(seconds[FLOOR]), "variants": ratio})
    floors = " and ".join(f"{b['floor_seconds']['median'] * 1e3:.1f} ms" for b in batches)
    title = f"one token, r={options.r}, N={options.num_heads}, MLP projections\nfloor: the base model's step, {floors}"
    rows = [[name, *(measure.show_ratio(b["variants"][name]) for b in batches)] for name in built]
    measure.print_table(title, ["time / floor, median (min-max)", "batch 1", "batch 8"], rows)
    results = {"environment": measure.environment(options, options.device), "batches": batches}
    measure.write(options.json, results)
    return results


if __name__ == "__main__":
    main()

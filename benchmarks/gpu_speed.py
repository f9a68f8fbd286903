"""A GPU in bfloat16: one adapted linear layer of Llama-7B's shapes, and a model of such layers end to end.

    python -m benchmarks.gpu_speed --json benchmarks/results/gpu_speed-NAME.json

The floors are the frozen layer's forward and the gradient of its input, and the frozen model's forward and backward.
A layer is timed twice: how long the GPU is at it when it never waits for the program, as in a model of such layers, and
how long one step by itself takes, launches included.
The base is bfloat16, adapters are float32 and run under autocast, as `Trainer` with `bf16` does it. R-LoRA runs with
each implementation of its inner operation (`HEADWATER_OPS`). The model has random weights; what does not fit in the
GPU's memory is left out and said. `--device cpu --smoke` shows that it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from . import layers, measure, models
from .layers import FLOOR, LOOP, Shape

SHAPES = (Shape(4096, 11008, 8192), Shape(11008, 4096, 8192), Shape(4096, 11008, 8192, r=16), Shape(896, 4864, 8192))
SMOKE = (Shape(32, 48, 64, r=2, N=2),)
COMPILED = "R-LoRA, compiled"
OF_MODEL = {"hydralora", "mlora", "mtl_lora", "multilora"}  # in the whole model besides R-LoRA: several heads each


def with_ops(name: str, run: Callable[[], None]) -> Callable[[], None]:
    """`run` with `HEADWATER_OPS=name`, which is read at each call."""

    def forced() -> None:
        before = os.environ.get("HEADWATER_OPS")
        os.environ["HEADWATER_OPS"] = name
        try:
            run()
        finally:
            if before is None:
                del os.environ["HEADWATER_OPS"]
            else:
                os.environ["HEADWATER_OPS"] = before

    return forced


def ours(device: str) -> list[str]:
    return ["autograd", "triton"] if device == "cuda" else ["autograd"]


def layer_models(shape: Shape, options: Any) -> dict[str, nn.Module]:
    linear = layers.frozen_linear(shape, torch.bfloat16, options.device)
    found: dict[str, nn.Module] = {
        FLOOR: layers.Layer(linear),
        f"PEFT LoRA r={shape.r}": layers.peft_lora(linear, shape.r, shape.dropout),
        f"PEFT LoRA r={shape.N * shape.r}": layers.peft_lora(linear, shape.N * shape.r, shape.dropout),
        LOOP: layers.PublicLoop(linear, shape.r, shape.N, shape.dropout),
        **{f"R-LoRA, {name}": layers.ours(linear, shape) for name in ours(options.device)},
        **{layers.title_of(name): layers.ours(linear, shape, name) for name in options.methods if name != "rlora"},
    }
    if options.compiled and shape == SHAPES[0]:
        found[COMPILED] = torch.compile(layers.ours(linear, shape))  # type: ignore[assignment]
    return {name: model.to(options.device) for name, model in found.items()}


def layer(shape: Shape, options: Any) -> dict[str, Any]:
    built = layer_models(shape, options)
    x, dy = shape.inputs(torch.bfloat16, options.device)
    steps: dict[str, Callable[[], None]] = {}
    for name, model in built.items():
        run = layers.step(model, x, dy, autocast=True)
        chosen = name.removeprefix("R-LoRA, ")
        steps[name] = with_ops(chosen, run) if chosen in ours(options.device) else run
    found = compare(steps, options, timer=measure.busy_seconds)
    steps = {name: run for name, run in steps.items() if name in found["variants"]}
    alone = measure.interleave(steps, rounds=max(2, options.rounds // 2), device=options.device, seed=options.seed)
    for name, variant in found["variants"].items():
        variant["alone"] = measure.spread(alone[name])
    return {**vars(shape), **found}


def compare(
    steps: dict[str, Callable[[], None]],
    options: Any,
    *,
    rounds: int | None = None,
    warmup: int = 3,
    timer: Callable[[Callable[[], Any], str], float] = measure.seconds_of,
) -> dict[str, Any]:
    too_large = [name for name, run in steps.items() if not fits(run)]
    steps = {name: run for name, run in steps.items() if name not in too_large}
    how = {"device": options.device, "warmup": warmup, "seed": options.seed}
    seconds = measure.interleave(steps, rounds=rounds or options.rounds, timer=timer, **how)
    ratio = measure.ratios(seconds, FLOOR)
    found: dict[str, Any] = {}
    for name, run in steps.items():
        found[name] = {"time": ratio[name], "seconds": measure.spread(seconds[name])}
        if options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            found[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return {"variants": found, "out_of_memory": too_large}


def fits(run: Callable[[], None]) -> bool:
    try:
        run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def whole_model(options: Any) -> dict[str, Any]:
    """Layers of Llama-7B's sizes with random weights; one step is forward, loss, backward and AdamW."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    batch, length, vocabulary = 4, 2048, 32000
    if options.smoke:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        batch, length, vocabulary = 2, 16, 300
    sizes["num_hidden_layers"] = options.layers
    with torch.device(options.device):
        base = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, dtype="bfloat16", **sizes)).to(torch.bfloat16)
    ids = torch.randint(vocabulary, (batch, length), device=options.device)
    r, N, dropout = 8, 3, 0.1
    few = {"r": r, "N": N, "dropout": dropout}
    others = [name for name in options.methods if name in OF_MODEL]
    built = {
        FLOOR: models.frozen(base),
        f"PEFT LoRA r={r}": models.peft_lora(base, r, dropout),
        f"PEFT LoRA r={N * r}": models.peft_lora(base, N * r, dropout),
        LOOP: models.public_loop(base, **few),
        **{f"R-LoRA, {name}": models.ours(base, "rlora", **few, num_tasks=3) for name in ours(options.device)},
        **{layers.title_of(name): models.ours(base, name, **few, num_tasks=3) for name in others},
    }
    steps: dict[str, Callable[[], None]] = {}
    for name, model in built.items():
        model.train()
        model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
        run = training_step(model, ids, options.device)
        chosen = name.removeprefix("R-LoRA, ")
        steps[name] = with_ops(chosen, run) if chosen in ours(options.device) else run
    found = compare(steps, options, rounds=max(2, options.rounds // 4), warmup=1)
    for variant in found["variants"].values():
        variant["tokens_per_second"] = batch * length / variant["seconds"]["median"]
    return {**sizes, "batch": batch, "length": length, **few, **found}


def training_step(model: Any, ids: torch.Tensor, device: str) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
    config = getattr(model, "peft_config", {}).get("default")
    tasks = torch.arange(len(ids), device=device) % 3
    extra = {"headwater_task_ids": tasks} if getattr(config, "needs_task_ids", False) else {}

    def run() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False, **extra).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def show(title: str, found: dict[str, Any]) -> None:
    rows = []
    for name, v in found["variants"].items():
        peak = f"{v['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in v else ""
        speed = f"{v['tokens_per_second']:,.0f}" if "tokens_per_second" in v else ""
        alone = f"{v['alone']['median'] * 1e3:.2f}" if "alone" in v else ""
        rows.append([name, measure.show_ratio(v["time"]), f"{v['seconds']['median'] * 1e3:.2f}", alone, peak, speed])
    rows += [[name, "out of memory", "", "", "", ""] for name in found["out_of_memory"]]
    measure.print_table(title, ["", "time / floor, median (min-max)", "ms", "alone", "peak MiB", "tokens/s"], rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.arguments(__doc__ or "", rounds=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=32, help="of the whole model")
    parser.add_argument("--methods", nargs="*", default=layers.method_names(), help="methods to run, by name")
    parser.add_argument(
        "--compiled", action="store_true", help="R-LoRA under torch.compile as well, on the first shape"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny size, to see that it runs; the numbers mean nothing"
    )
    options = parser.parse_args(argv)
    measure.prepare(options)
    name = measure.device_name(options.device)
    found = []
    for shape in SMOKE if options.smoke else SHAPES:
        found.append(layer(shape, options))
        show(f"{name}, bfloat16, {shape.title}", found[-1])
    model = whole_model(options)
    show(f"{name}, bfloat16, a step of {model['num_hidden_layers']} layers of width {model['hidden_size']}", model)
    results = {"environment": measure.environment(options, options.device), "shapes": found, "model": model}
    measure.write(options.json, results)
    return results


if __name__ == "__main__":
    main()

"""Run folders made up by seed, of the shapes that real runs have and of some that they should not have."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import yaml

TASKS = {
    # name: (metric, n, before, after, majority)
    "movie sentiment": ("choice_accuracy", 400, 0.545, 0.853, 0.503),
    "tweet sentiment": ("choice_accuracy", 400, 0.53, 0.77, 0.41),
    "amazon sentiment": ("choice_accuracy", 400, 0.585, 0.792, 0.56),
    "reuters": ("choice_accuracy", 270, 0.204, 0.807, 0.219),
    "bbc news": ("choice_accuracy", 400, 0.3325, 0.92, 0.23),
    "family relation": ("exact_match", 400, 0.0, 0.265, None),
}
PROJECTIONS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _rounded(value: float, n: int) -> float:
    return round(value * n) / n


def write_run(
    folder: Path,
    *,
    method: str = "rlora",
    tasks: dict[str, tuple] = TASKS,
    heads: int = 3,
    layers: int = 30,
    projections: tuple[str, ...] = PROJECTIONS,
    steps: int = 400,
    router: bool = True,
    alike: float = 0.15,
    seed: int = 0,
) -> Path:
    """Writes the four files of a finished run into `folder`, which is made."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    names = list(tasks)
    results = {
        "schema": 1,
        "method": method,
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "seed": seed,
        "trainable_parameters": 3_732_480,
        "steps": steps,
        "train_seconds": 412.7,
        "tokens_per_second": 231.4,
        "tasks": {
            name: {"metric": metric, "n": n, "before": b if metric == "loss" else _rounded(b, n),
                   "after": a if metric == "loss" else _rounded(a, n)}
            for name, (metric, n, b, a, _) in tasks.items()
        },
    }  # fmt: skip
    scored = [r for r in results["tasks"].values() if r["metric"] != "loss"]
    results["mean"] = {
        when: float(np.mean([r[when] for r in scored])) if scored else None for when in ("before", "after")
    }
    rows = rng.dirichlet(np.full(len(names), 8.0))
    tokens = rng.dirichlet(np.full(len(names), 6.0))
    results["extra"] = {
        "tokens": 95_530,
        "padding_share": 0.041,
        "realised_shares": {
            name: {"rows": int(1600 * r), "row_share": r, "tokens": int(95_530 * t), "token_share": t}
            for name, r, t in zip(names, rows, tokens, strict=True)
        },
        "majority": {name: values[4] for name, values in tasks.items()},
        "versions": {"headwater": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
    }
    (folder / "results.json").write_text(json.dumps(results))

    lines = []
    for step in range(1, steps + 1):
        present = [n for n in names if rng.random() < 0.8] or names[:1]
        losses = {
            n: float((0.25 + 0.1 * i + (2.2 + 0.3 * i) * math.exp(-step / 60)) * rng.lognormal(0, 0.28))
            for i, n in enumerate(names)
            if n in present
        }
        mean = float(np.mean(list(losses.values())))
        lines.append({"kind": "train", "step": step, "epoch": step / 100, "loss": mean, "task_losses": losses,
                      "learning_rate": 1e-3, "tokens_per_second": 230.0, "grad_norm": 1.0})  # fmt: skip
        if heads > 1:
            lines[-1] |= {"head_similarity": alike, "head_update_similarity": alike + (0.9 - alike) * step / steps}
        if step % max(1, steps // 8) == 0:
            n = 100
            scores = {}
            for name, (metric, _, before, after, _) in tasks.items():
                value = after + (before - after) * math.exp(-4 * step / steps) + rng.normal(0, 0.02)
                value = abs(value) if metric == "loss" else _rounded(float(np.clip(value, 0, 1)), n)
                scores[name] = {"metric": metric, "value": value, "n": n}
            lines.append({"kind": "eval", "step": step, "tasks": scores})
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    similarity, routing = {}, {name: {} for name in names}
    for layer in range(layers):
        for p, projection in enumerate(projections):
            module = f"model.layers.{layer}.{projection}"
            if heads > 1:
                level = alike + 0.1 * p + 0.2 * math.sin(layer / 6)
                noise = rng.normal(0, 0.05, (heads, heads))
                matrix = np.clip(level + (noise + noise.T) / 2, -1, 1)
                np.fill_diagonal(matrix, 1.0)
                similarity[module] = matrix.tolist()
            if router and heads > 1:
                common = rng.normal(0, 0.2, heads)
                for i, name in enumerate(names):
                    logits = common + 0.5 * np.cos(np.arange(heads) * (i + 1) + layer / 9) * layer / max(layers, 1)
                    gate = np.exp(logits) / np.exp(logits).sum()
                    routing[name][module] = gate.tolist()
    analysis = {"head_similarity": similarity, "routing": routing if router and heads > 1 else {}}
    (folder / "analysis.json").write_text(json.dumps(analysis))

    config = {
        "model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "method": {"name": method, "r": 8, "num_heads": heads, "lora_alpha": 16,
                   "target_modules": [p.rpartition(".")[2] for p in projections]},
        "tasks": [{"name": n, "train": f"data/{i}/train.jsonl", "test": f"data/{i}/test.jsonl"}
                  for i, n in enumerate(names)],
        "mixture": {"strategy": "temperature", "temperature": 2.0, "batching": "mixed"},
        "training": {"max_steps": steps, "learning_rate": 1e-3, "per_device_train_batch_size": 4},
        "output_dir": "runs/first",
        "seed": seed,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return folder


LONG = "a_very_long_task_name_that_nobody_would_type_twice_but_a_script_might_well_make_out_of_a_path_variant_"

NASTY_TASKS = {
    "<script>alert(1)</script>": ("choice_accuracy", 200, 0.5, 0.7, 0.5),
    "Ünïcödé 情感分析 العربية 🙂": ("choice_accuracy", 200, 0.31, 0.66, 0.33),
    LONG + "one": ("exact_match", 17, 0.0, 1.0, None),
    LONG + "two": ("loss", 250, 3.4, 1.9, None),
    "$5 notes & \"quotes\" 'n' \\frac{1}{2}$ -->": ("final_number", 1319, 0.02, 0.015, None),
    "bell\u0007 and\nnewline": ("choice_accuracy", 200, 0.9, 0.6, 0.95),
}


def write_nasty_run(folder: Path) -> Path:
    """A run with hostile names, a loss task, values that are not finite, and a history that ends in mid-line."""
    write_run(folder, tasks=NASTY_TASKS, heads=10, layers=2, steps=50)
    results = json.loads((folder / "results.json").read_text())
    results["tasks"]["<script>alert(1)</script>"]["after"] = math.nan
    results["mean"]["after"] = math.nan
    results["base_model"] = "./models/<b>bold</b>&co"
    (folder / "results.json").write_text(json.dumps(results))
    analysis = json.loads((folder / "analysis.json").read_text())
    first = next(iter(analysis["head_similarity"]))
    analysis["head_similarity"][first][0][1] = math.nan
    analysis["head_similarity"]["model.odd"] = [[1.0, 0.5], [0.5]]
    del analysis["routing"][LONG + "one"][first]
    (folder / "analysis.json").write_text(json.dumps(analysis))
    lines = (folder / "history.jsonl").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if i > 20 and '"train"' in line)
    record = json.loads(lines[at])
    record["loss"] = math.nan
    record["task_losses"] = dict.fromkeys(record["task_losses"], math.inf)
    lines[at] = json.dumps(record)
    (folder / "history.jsonl").write_text("\n".join(lines) + '\n{"kind": "train", "st')
    return folder

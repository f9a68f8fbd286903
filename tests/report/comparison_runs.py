"""The folder of a comparison, made up by seed: run folders of `report_runs` and the `comparison.json` over them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from report_runs import write_run

from headwater.compare.summary import summarise

METHODS = {  # label: (method, rank, heads, shift of the scores, cosine between heads)
    "lora": ("lora", 18, 1, 0.0, 0.0),
    "hydralora": ("hydralora", 8, 3, 0.012, 0.9),
    "hydralora+dropout": ("rlora", 8, 3, -0.01, 0.6),
    "rlora": ("rlora", 8, 3, 0.02, 0.15),
    "lora+align": ("lora", 18, 1, -0.03, 0.0),
}


def write_comparison(
    folder: Path,
    *,
    methods: dict = METHODS,
    seeds: tuple[int, ...] = (0, 1, 2),
    train_on: dict[str, list[str]] | None = None,
    **fields,
) -> Path:
    """Writes run folders and `comparison.json` into `folder`; `fields` go to `report_runs.write_run`, `train_on` says
    of some methods which tasks alone they drew rows of."""
    rng = np.random.default_rng(5)
    runs: dict[str, list[dict]] = {}
    for place, (label, (method, _, heads, shift, alike)) in enumerate(methods.items()):
        for seed in seeds:
            inner = f"{label}/seed-{seed}"
            made = {"heads": heads, "router": heads > 1, "alike": alike, "steps": 60, "layers": 4, **fields}
            write_run(folder / inner, method=method, seed=seed + 100 * place, **made)
            results = json.loads((folder / inner / "results.json").read_text())
            for task in results["tasks"].values():
                task["after"] += shift + 0.02 * rng.standard_normal()
            scored = [task["after"] for task in results["tasks"].values() if task["metric"] != "loss"]
            results["mean"]["after"] = sum(scored) / len(scored) if scored else None
            results["seed"] = seed
            for task, share in results["extra"]["realised_shares"].items():
                if train_on and task not in train_on.get(label, results["tasks"]):
                    share.update(rows=0, row_share=0.0, tokens=0, token_share=0.0)
            results["trainable_parameters"] += round(1e5 * shift)
            results["extra"] = {"label": label, "folder": inner, **results["extra"]}
            (folder / inner / "results.json").write_text(json.dumps(results))
            runs.setdefault(label, []).append(results)
    about = [
        {"label": label, "method": {"name": method, "r": r, "num_heads": heads, "target_modules": ["up_proj"]},
         "solved": "r" if i else None, "parameters": runs[label][0]["trainable_parameters"], "deviation": 0.013 * i,
         "learning_rate": 3e-4, "align": {"kind": "kl", "weight": 0.1} if "align" in label else None}
        for i, (label, (method, r, heads, _, _)) in enumerate(methods.items())
    ]  # fmt: skip
    chosen = {label: {"seed": 1000, "scores": {"0.0001": 0.61, "0.0003": 0.7}, "chosen": 3e-4} for label in methods}
    budget = about[0]["parameters"]
    extra = {"seeds": list(seeds), "match": "rank", "budget": budget, "methods": about, "learning_rate": chosen}
    content = {
        "schema": 1,
        "runs": [r for group in runs.values() for r in group],
        "summary": summarise(runs),
        "extra": extra,
    }
    (folder / "comparison.json").write_text(json.dumps(content))
    return folder

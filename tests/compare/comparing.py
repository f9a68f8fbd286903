"""A comparison on a tiny model: its file, its plan, and what it comes to without what a clock says."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from headwater.compare.plan import Plan, make_plan
from headwater.compare.run import compare
from headwater.config import load_config

FILE = """\
model_name_or_path: {folder}/model
method: {{name: lora, r: 4, lora_alpha: 8, target_modules: [up_proj, down_proj]}}
tasks:
  - {{name: animals, train: animals-train.jsonl, test: animals-test.jsonl}}
  - {{name: colours, train: colours-train.jsonl, test: colours-test.jsonl}}
training:
  {{max_steps: 4, per_device_train_batch_size: 4, learning_rate: 2e-1, save_steps: 2, logging_steps: 1,
    report_to: none, use_cpu: true}}
compare:
  methods: [lora, {{label: heads, method: {{name: hydralora, num_heads: 2}}}}]
  seeds: [0, 1]
  tolerance: 0.25
output_dir: {folder}/out
"""
TASKS = {"animals": [" cat", " dog"], "colours": [" red", " blue"]}


def write_file(folder: Path, text: str = FILE) -> Path:
    """A model, two tasks of 24 training and 10 test rows, and `run.yaml`, in `folder`."""
    make_tiny_llama().save_pretrained(folder / "model")
    make_tiny_tokenizer().save_pretrained(folder / "model")
    for task, choices in TASKS.items():
        for split, count in (("train", 24), ("test", 10)):
            rows = [
                {"prompt": f"{split} {task} {i} is", "completion": choices[i * i % 3 % 2], "choices": choices}
                for i in range(count)
            ]
            (folder / f"{task}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "run.yaml"
    path.write_text(text.format(folder=folder))
    return path


def plan_of(path: Path, *overrides: str) -> Plan:
    return make_plan(load_config(path, overrides))


def compared(path: Path, *overrides: str) -> dict:
    return compare(plan_of(path, *overrides), console=Console(quiet=True))


def timeless(content: dict) -> dict:
    """A copy of `comparison.json` without times."""
    content = json.loads(json.dumps(content))
    for run in content["runs"]:
        del run["train_seconds"], run["tokens_per_second"]
    for entry in content["summary"]:
        del entry["extra"]["train_seconds"], entry["extra"]["seconds_per_step"]
    return content

"""A whole run's input: a base model, two tasks and the run's file."""

import json

import pytest
from tiny_models import make_tiny_llama, make_tiny_tokenizer

RUN = """
model_name_or_path: {base}
method: {{name: rlora, r: 4, lora_alpha: 4, target_modules: [gate_proj, up_proj, down_proj]}}
tasks:
  - {{name: colour, train: colour.jsonl, test: colour.jsonl}}
  - {{name: copy, train: copy.jsonl, validation: copy.jsonl, test: copy.jsonl, weight: 2.0}}
mixture: {{strategy: weights}}
evaluation: {{max_rows_during_training: 4}}
training:
  max_steps: 12
  learning_rate: 0.02
  per_device_train_batch_size: 4
  logging_steps: 2
  eval_steps: 4
  save_steps: 6
  use_cpu: true
output_dir: {out}
seed: 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, two tasks and a run's file."""
    folder = tmp_path_factory.mktemp("run")
    make_tiny_llama().save_pretrained(folder / "base")
    make_tiny_tokenizer().save_pretrained(folder / "base")
    colours = [
        {"prompt": f"{thing}{i} is", "completion": colour, "choices": [" red", " blue"]}
        for thing, colour in (("fire", " red"), ("sky", " blue"))
        for i in range(8)
    ]
    copies = [{"prompt": f"say {i}:", "completion": f" {i}"} for i in range(10)]
    for name, rows in (("colour", colours), ("copy", copies)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(RUN.format(base=folder / "base", out=folder / "out"))
    return folder

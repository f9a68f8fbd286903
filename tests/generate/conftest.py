"""A tiny model, two tasks, and a file for `headwater meta`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from headwater.cli import main

META = """\
model_name_or_path: {folder}/model
method: {{name: lora, r: 2, lora_alpha: 4, target_modules: [up_proj, down_proj]}}
tasks:
  - {{name: animals, train: animals-train.jsonl, test: animals-test.jsonl}}
  - {{name: colours, train: colours-train.jsonl, test: colours-test.jsonl}}
training: {{max_steps: 4, per_device_train_batch_size: 4, learning_rate: 1e-2, report_to: none, use_cpu: true}}
meta: {{checkpoints: 3, steps: 6, save_steps: 2, channels: [4, 4], latent: 8, task_vector: {{samples: 5}}}}
output_dir: {folder}/run
"""


@pytest.fixture(scope="session")
def meta_folder(tmp_path_factory) -> Path:
    """A folder with `model`, two tasks' rows and `meta.yaml`; its run folder is `run`, not there yet."""
    folder = tmp_path_factory.mktemp("meta")
    make_tiny_llama().save_pretrained(folder / "model")
    make_tiny_tokenizer().save_pretrained(folder / "model")
    for task, choices in {"animals": [" cat", " dog"], "colours": [" red", " blue"]}.items():
        for split, count in (("train", 24), ("test", 8)):
            rows = [
                {"prompt": f"{task} {split} {i}" + " so" * (i % 3), "completion": choices[i % 2], "choices": choices}
                for i in range(count)
            ]
            (folder / f"{task}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "meta.yaml").write_text(META.format(folder=folder))
    return folder


@pytest.fixture(scope="session")
def finished(meta_folder) -> Path:
    """A run of `headwater meta train` that is done, with a generator left out for each task."""
    with pytest.raises(SystemExit) as caught:
        main(["meta", "train", str(meta_folder / "meta.yaml"), "--set", "meta.leave_one_out=true"])
    assert not caught.value.code
    return meta_folder / "run"

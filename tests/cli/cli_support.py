"""A tiny model folder, two tasks and a run's file, and `headwater` run in this process or as a real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from headwater.cli import main

RUN = """\
model_name_or_path: {folder}/model
method: {{name: rlora, r: 4, num_heads: 2, lora_alpha: 2, target_modules: [up_proj, down_proj]}}
tasks:
  - {{name: animals, train: animals-train.jsonl, test: animals-test.jsonl}}
  - {{name: colours, train: colours-train.jsonl, test: colours-test.jsonl, metric: loss}}
training: {{max_steps: 4, per_device_train_batch_size: 4, save_steps: 2, report_to: none, use_cpu: true}}
output_dir: {folder}/run
"""


@dataclass
class Result:
    code: int
    out: str
    err: str


def headwater_process(*arguments: object, cwd: Path | None = None, stdin: str = "") -> Result:
    """The installed command, in a process of its own."""
    command = [str(Path(sys.executable).with_name("headwater")), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, env=environment, timeout=300)
    return Result(done.returncode, done.stdout, done.stderr)


def write_run(folder: Path) -> Path:
    """A model, two tasks and `run.yaml` in `folder`; the run folder will be `folder / "run"`."""
    make_tiny_llama().save_pretrained(folder / "model")
    make_tiny_tokenizer().save_pretrained(folder / "model")
    for task, choices in {"animals": [" cat", " dog"], "colours": [" red", " blue"]}.items():
        for split, count in (("train", 24), ("test", 8)):
            rows = [
                {"prompt": f"{split} {task} {i} is", "completion": choices[i % 2], "choices": choices}
                for i in range(count)
            ]
            (folder / f"{task}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "run.yaml"
    path.write_text(RUN.format(folder=folder))
    return path


def run_main(capsys, *arguments: object) -> Result:
    """The same `main` in this process, without the seconds that imports take."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Result(int(caught.value.code or 0), captured.out, captured.err)

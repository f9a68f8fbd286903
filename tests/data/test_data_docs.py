"""What docs/data.md shows is what the code takes."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from headwater.data.encode import DataSpec
from headwater.data.mixture import MixtureSpec
from headwater.data.tasks import TaskSpec

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", PAGE, re.M)]


def test_yaml():
    run, tasks = (yaml.safe_load(block) for block in BLOCKS if "train:" in block)
    for fields in [*run["tasks"], *tasks]:
        TaskSpec(**fields)
    MixtureSpec(**run["mixture"])
    DataSpec(**run["data"])


@pytest.mark.parametrize("spec", [TaskSpec, DataSpec, MixtureSpec])
def test_every_key_is_named(spec):
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert set(spec.model_fields) - {"validation_split", "test_split"} <= named


def test_python(tmp_path, monkeypatch, tiny_tokenizer):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 3)
    (tmp_path / "data" / "cola.csv").write_text("prompt,completion\n" + "a,b\n" * 9)
    monkeypatch.chdir(tmp_path)
    names = {"tokenizer": tiny_tokenizer, "torch": torch}
    (code,) = (block for block in BLOCKS if "import Path" in block)
    exec(code, names)
    batches = list(names["loader"])
    assert sum(len(batch["headwater_task_ids"]) for batch in batches) == 12

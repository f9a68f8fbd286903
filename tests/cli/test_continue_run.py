"""A run that goes on from another run's adapter with one more task."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from cli_support import headwater_process, run_main, write_run
from safetensors.torch import load_file

METHOD = "{name: mtl_lora, r: 4, num_heads: 2, lora_alpha: 8, target_modules: [up_proj, down_proj]"
NEW = "  - {name: beasts, train: animals-train.jsonl, test: animals-test.jsonl}\n"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with a finished run on two tasks."""
    folder = tmp_path_factory.mktemp("first")
    write_run(folder)
    options = ("--set", f"method={METHOD}}}", "--set", "training.learning_rate=0.05")
    assert headwater_process("train", "run.yaml", *options, cwd=folder).code == 0
    return folder


@pytest.fixture
def go_on(first, tmp_path, capsys, monkeypatch):
    """`headwater train` on the same tasks and a new one, from the first run's adapter."""
    monkeypatch.chdir(tmp_path)
    for file in first.glob("*.jsonl"):
        shutil.copy(file, tmp_path)

    def run(text, *more):
        text = text.replace(f"output_dir: {first}/run", f"output_dir: {tmp_path}/run")
        (tmp_path / "run.yaml").write_text(text)
        method = f"{METHOD}, continue_from: {first}/run/adapter}}"
        return run_main(capsys, "train", "run.yaml", "--set", f"method={method}", *more)

    return run


def test_its_tasks_start_where_the_first_run_ended(go_on, first, tmp_path):
    text = (first / "run.yaml").read_text()
    done = go_on(text.replace("training:", NEW + "training:"))
    assert done.code == 0, done.err
    before, after = (json.loads((folder / "run" / "results.json").read_text()) for folder in (first, tmp_path))
    for task, scores in before["tasks"].items():
        assert after["tasks"][task]["before"] == pytest.approx(scores["after"], abs=1e-6)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["num_tasks"], config["continue_from"]) == (3, None)
    saved, learned = (load_file(f / "run" / "adapter" / "adapter_model.safetensors") for f in (first, tmp_path))
    for name, tensor in saved.items():
        assert learned[name].shape[0] == (3 if name.endswith((".L", ".w")) else tensor.shape[0])


def test_tasks_without_training_rows_keep_what_is_their_own(go_on, first, tmp_path):
    text = (first / "run.yaml").read_text()
    for task in ("animals", "colours"):
        text = text.replace(f"name: {task}, train: {task}-train.jsonl,", f"name: {task},")
    done = go_on(text.replace("training:", NEW + "training:"), "--set", "training.learning_rate=0.05")
    assert done.code == 0, done.err
    saved, learned = (load_file(f / "run" / "adapter" / "adapter_model.safetensors") for f in (first, tmp_path))
    for name, tensor in saved.items():
        assert torch.equal(learned[name][: tensor.shape[0]], tensor) == name.endswith((".L", ".w")), name


@pytest.mark.parametrize("change", ["one is missing", "the new one is first"])
def test_tasks_of_other_ids_are_refused_before_anything_is_written(go_on, first, tmp_path, change):
    text = (first / "run.yaml").read_text()
    if change == "one is missing":
        text, found = "".join(line for line in text.splitlines(keepends=True) if "colours" not in line), "animals"
    else:
        text, found = text.replace("tasks:\n", f"tasks:\n{NEW}"), "beasts, animals"
    done = go_on(text)
    assert done.code == 2
    assert "Traceback" not in done.err
    said = f"adapter are animals, colours; those of this run begin with {found}\n"
    assert said in done.err
    assert "method.continue_from: the tasks of" in done.err
    assert not (tmp_path / "run").exists()


def test_a_continued_run_is_resumed(go_on, first, tmp_path):
    text = (first / "run.yaml").read_text().replace("training:", NEW + "training:")
    resume = ("--set", "training.resume_from_checkpoint=true", "--set", "training.max_steps=6")
    assert go_on(text).code == 0
    done = go_on(text, *resume)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 6

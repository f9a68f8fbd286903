"""What the README tells people to type is run, on a tiny model and tiny tasks in place of the named ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from tiny_models import make_tiny_llama, make_tiny_tokenizer
from typer.testing import CliRunner

import headwater
from headwater.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def indented_commands(program: str) -> list[str]:
    lines = [line.strip().partition("  #")[0].strip() for line in README.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith(program)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_llama().save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def test_commands_of_your_own_tasks(model_folder, tmp_path, monkeypatch):
    (yaml,) = blocks("yaml")
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.replace(MODEL, str(model_folder)), encoding="utf-8")
    for name in re.findall(r"\w+\.jsonl", yaml):
        rows = [
            {"prompt": f"{name} {n} is", "completion": " good" if n % 2 else " bad", "choices": [" good", " bad"]}
            for n in range(8)
        ]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    commands = indented_commands("headwater")
    assert [command.split()[1] for command in commands] == [
        "data",
        "train",
        "compare",
        "evaluate",
        "generate",
        "inspect",
        "methods",
    ]
    for command in commands:
        words = shlex.split(command.replace("max_steps=200", "max_steps=2").replace("0,1,2", "0,1"))[1:]
        if words[0] == "compare":  # the tiny model's parameters come in coarse steps
            words += ["--set", "training.max_steps=2", "--set", "compare.tolerance=0.1"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"
    assert {"adapter", "config.yaml", "results.json", "report.html"} <= {
        path.name for path in Path("runs/mine").iterdir()
    }


def test_python_lines(model_folder):
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(code.replace(MODEL, str(model_folder)), names)
    assert names["model"].get_nb_trainable_parameters()[0] > 0
    assert len([line for line in code.splitlines() if line]) == 5


def test_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in indented_commands("make"):
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command


def test_every_method_is_listed():
    listed = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert listed >= {method.name for method in headwater.methods() if method.family != "test"}

"""What the README tells people to type is run, on a tiny model and tiny tasks in place of the named ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from tiny_models import make_tiny_llama, make_tiny_tokenizer
from transformers import LlamaConfig
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
        if words[0] == "compare":
            words += ["--set", "training.max_steps=2"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"
    assert {"adapter", "config.yaml", "results.json", "report.html"} <= {
        path.name for path in Path("runs/mine").iterdir()
    }


def test_the_compared_methods_can_have_as_many_parameters_on_the_named_model(tmp_path, monkeypatch):
    (yaml,) = blocks("yaml")
    monkeypatch.chdir(tmp_path)
    # SmolLM2-135M but for its number of layers, which the ratios do not depend on
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    LlamaConfig(**sizes, vocab_size=49152, num_hidden_layers=2).save_pretrained(tmp_path / "model")
    Path("mine.yaml").write_text(yaml.replace(MODEL, str(tmp_path / "model")), encoding="utf-8")
    (command,) = (line for line in indented_commands("headwater") if line.split()[1] == "compare")
    done = CliRunner().invoke(app, [*shlex.split(command)[1:], "--dry-run"])
    assert done.exit_code == 0, done.output
    assert re.search(r"lora +lora +r 18, lora_alpha 36.*\n +rlora +rlora +r 8, num_heads 3", done.output), done.output


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

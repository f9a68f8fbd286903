"""The documents say what the program has: every command, option and key, and examples that are accepted."""

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer
import yaml
from peft import PeftConfig

import headwater
from headwater.cli import app
from headwater.config import ModelSpec, RunConfig, TasksFile, load_config
from headwater.marked_yaml import apply_overrides, parse_document

ROOT = Path(__file__).parents[2]
CONFIG = (ROOT / "docs" / "config.md").read_text()
CLI = (ROOT / "docs" / "cli.md").read_text()


def commands():
    root = typer.main.get_command(app)
    for name, command in root.commands.items():
        for inner, leaf in getattr(command, "commands", {"": command}).items():
            yield f"{name} {inner}".strip(), leaf


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_command_and_option_is_documented(name, command):
    heading = re.search(rf"^## headwater {re.escape(name)}\b.*$", CLI, re.MULTILINE)
    assert heading, name
    section = CLI[heading.end() :].split("\n## ")[0]
    for parameter in command.params:
        long = [option for option in parameter.opts if option.startswith("--") and option != "--help"]
        assert not long or any(f"`{option}" in section or f"`{option} " in section for option in long), long


def test_the_documented_commands_exist():
    known = {name for name, _ in commands()}
    assert {
        re.split(r" [A-Z]", heading)[0] for heading in re.findall(r"^## headwater (.+)$", CLI, re.MULTILINE)
    } == known


def test_every_key_is_documented():
    common = {field.name for field in fields(headwater.MethodConfig)} - {field.name for field in fields(PeftConfig)}
    for key in (*RunConfig.model_fields, *ModelSpec.model_fields, *common):
        assert f"`{key}`" in CONFIG, key


def test_every_public_name_is_documented():
    pages = "".join(
        page.read_text() for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    )
    assert [name for name in headwater.__all__ if not re.search(rf"[`.(]{name}\b|import {name}\b", pages)] == []


def test_the_links_between_pages_lead_somewhere():
    pages = {
        page: page.read_text() for folder in (".", "docs/**", "examples/**") for page in ROOT.glob(f"{folder}/*.md")
    }
    anchors = {
        page: {
            re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        }
        for page, text in pages.items()
    }
    lost = []
    for page, text in pages.items():
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
            there = Path(os.path.normpath(page.parent / path)) if path else page
            if not there.exists() or (anchor and anchor not in anchors[there]):
                lost.append(f"{page.name}: {path}#{anchor}")
    assert len(pages) > 30
    assert lost == []


def test_the_example_files_are_accepted(tmp_path):
    assert [task.name for task in load_config(ROOT / "examples" / "first.yaml").tasks] == ["sst2", "ag_news", "gsm8k"]
    (text,) = re.findall(r"```yaml\n(.*?)```", CONFIG, re.DOTALL)
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(tmp_path / "run.yaml").training["learning_rate"] == 1e-3


def test_the_documented_overrides_are_accepted():
    text = (ROOT / "examples" / "first.yaml").read_text()
    shown = re.findall(r"--set '?([^'`\s]+={[^}]*}|[^'`\s]+)", text + CONFIG)
    shown = [override for override in shown if "=" in override and override != "KEY=VALUE"]
    assert len(shown) >= 5
    for override in shown:
        document = parse_document(text.replace("  - name: gsm8k", "  - name: x"), "first.yaml")
        document.data["tasks"] = document.data["tasks"][:2]
        assert apply_overrides(document, [override]) == []
        RunConfig.model_validate(document.data)


def test_the_documented_python_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", CONFIG, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["config"].training["max_steps"] == 100


def test_the_documented_errors_are_the_real_ones(tmp_path):
    block = next(b for b in CONFIG.split("\n\n") if b.startswith("    error: first.yaml"))
    lines = ["tasks:", "  - name: a", "    train: a", *["#"] * 4, "training: {max_stepz: 1}", *["#"] * 3]
    place = "\n".join([*lines[:3], "  - {train: b}", *lines[3:]])
    (tmp_path / "first.yaml").write_text(place)
    from headwater.errors import HeadwaterError

    with pytest.raises(HeadwaterError) as caught:
        load_config(tmp_path / "first.yaml", ["method.num_heads=0"], model=TasksFile)
    whole = re.sub(r"first\.yaml:\d+", "first.yaml:N", str(caught.value).replace(f"{tmp_path}/", ""))
    documented = re.sub(r"first\.yaml:\d+", "first.yaml:N", re.sub(r"^    (error: )?", "", block, flags=re.MULTILINE))
    assert sorted(documented.splitlines()) == sorted(whole.splitlines())
    assert yaml.safe_load(place)

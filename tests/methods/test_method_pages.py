"""The methods' pages say what the code does: every field with its default, and a run file whose method is accepted."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from headwater import MethodConfig, make_config
from headwater.methods import method, methods

PAGES = Path(__file__).parents[2] / "docs" / "methods"
METHODS = [m.name for m in methods() if (PAGES / f"{m.name}.md").exists()]
NEEDED = {"cora": {"basis": "subspace.safetensors"}}


@pytest.mark.parametrize("name", METHODS)
def test_the_pages_table_has_every_field_of_the_method_and_its_default(name):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    table = {row[0]: ast.literal_eval(row[1]) for row in re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page, re.M)}
    default = make_config(name, **NEEDED.get(name, {}))
    shown = {field: getattr(default, field) for field in table if field not in NEEDED.get(name, {})}
    assert {field: table[field] for field in shown} == shown
    inherited = {f.name for f in dataclasses.fields(MethodConfig)}
    own = {f.name for f in dataclasses.fields(default)} - inherited
    assert own | {"r", "lora_alpha", "use_rslora", "lora_dropout", "init_seed"} == set(table)


@pytest.mark.parametrize("name", METHODS)
def test_the_pages_run_file_names_a_method_that_is_accepted(name):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    run = yaml.safe_load(snippet)
    assert list(run) == ["model_name_or_path", "method", "tasks", "training", "output_dir"]
    fields = run["method"]
    assert fields.pop("name") == name
    config = make_config(name, **fields)
    assert config.target_modules == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("name", METHODS)
def test_the_page_says_which_paper_and_whether_it_merges(name):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    known = method(name)
    assert known.paper in page
    assert known.title in page.splitlines()[0]
    merging = page.split("## Merging")[1].lstrip()
    assert merging.startswith("Exactly:" if known.mergeable else "Not exactly:")

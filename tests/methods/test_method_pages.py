"""The methods' pages say what the code does: every field with its default, and a run file whose method is accepted."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from headwater import MethodConfig, make_config
from headwater.cli import main
from headwater.methods import method, methods

PAGES = Path(__file__).parents[2] / "docs" / "methods"
METHODS = [m.name for m in methods() if (PAGES / f"{m.name}.md").exists()]
PAGE_NAMES = sorted(page.stem for page in PAGES.glob("*.md"))
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


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the pages' run files name: two tasks, a model, and a basis made from it."""
    folder = tmp_path_factory.mktemp("pages")
    make_tiny_llama(hidden_size=64, intermediate_size=96).save_pretrained(folder / "model")
    make_tiny_tokenizer().save_pretrained(folder / "model")
    for task in ("reviews", "questions"):
        (folder / "data" / task).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"prompt": f"{task} {n} is", "completion": [" no", " yes"][n % 2]} for n in range(8)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "data" / task / f"{split}.jsonl").write_text(text)
    targets = [part for name in ("gate_proj", "up_proj", "down_proj") for part in ("--target", name)]
    basis, model = str(folder / "subspace.safetensors"), str(folder / "model")
    run("subspace", "--model", model, "--r", "8", "--scope", "layer_projection", *targets, "-o", basis)
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_the_pages_run_file_trains(name, workplace, monkeypatch):
    """Two steps of the page's own file, on another model."""
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    (workplace / f"{name}.yaml").write_text(snippet)
    settings = {
        "model_name_or_path": "model", "training.max_steps": 2, "training.save_strategy": "no",
        "training.logging_steps": 1, "training.report_to": "none", "training.use_cpu": "true",
    }  # fmt: skip
    monkeypatch.chdir(workplace)
    run("train", f"{name}.yaml", *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")))
    results = json.loads((workplace / "runs" / name / "results.json").read_text())
    assert results["steps"] == 2
    assert results["method"] == (name if name in METHODS else yaml.safe_load(snippet)["method"]["name"])
    config = json.loads((workplace / "runs" / name / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["down_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize("name", METHODS)
def test_the_page_says_which_paper_and_whether_it_merges(name):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    known = method(name)
    assert known.paper in page
    assert known.title in page.splitlines()[0]
    merging = page.split("## Merging")[1].lstrip()
    assert merging.startswith("Exactly:" if known.mergeable else "Not exactly:")

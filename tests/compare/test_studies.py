"""The studies' files are read, and each of their methods fits a model at equal parameters."""

import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from headwater.cli import main
from headwater.compare.plan import make_plan
from headwater.config import load_config
from headwater.data.rows import RowTemplate

STUDIES = Path(__file__).parents[2] / "examples" / "studies"
FILES = sorted(STUDIES.glob("**/*.yaml"))
HUB = [path for path in FILES if path.parent == STUDIES]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tiny_llama(hidden_size=192, intermediate_size=256, num_hidden_layers=1).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_readme_names_them_all():
    named = set(re.findall(r"`([\w/]+\.yaml)` \|", (STUDIES / "README.md").read_text()))
    assert named == {path.relative_to(STUDIES).as_posix() for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(STUDIES).as_posix())
def test_a_study_can_be_planned(path, model, tmp_path, monkeypatch):
    if path.parent != STUDIES and path.stem == "methods":  # its CoRA wants the file that the comment makes
        monkeypatch.chdir(tmp_path)
        Path("demo-files").mkdir()
        made = re.search(r"headwater (subspace .*?--output \S+)", path.read_text(), re.DOTALL)
        words = made[1].replace("\\\n#", "").replace("demo-files/model", str(model)).split()
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code
    small = ["compare.parameters=110000"] if path == STUDIES / "methods.yaml" else []
    config = load_config(path, [f"model_name_or_path={model}", "compare.tolerance=0.2", *small])
    plan = make_plan(config)
    assert len(plan.spec.seeds) >= 3
    assert len(plan.methods) >= 3
    if path.stem == "claim":
        assert len(plan.spec.seeds) >= 5
        assert all(planned.learning_rates for planned in plan.methods)


def test_templates_fill_rows_of_the_data_sets_form():
    rows = {
        "sst2": {"sentence": "a joy", "label": "positive"},
        "cola": {"sentence": "It rained.", "label": "acceptable"},
        "mrpc": {"sentence1": "a", "sentence2": "b", "label": "not_equivalent"},
        "boolq": {"question": "is it", "answer": True, "passage": "it is"},
        "obqa": {"question_stem": "what?", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "B"},
        "gsm8k": {"question": "1+1?", "answer": "2\n#### 2"},
    }
    for path in HUB:
        for task in load_config(path).tasks:
            assert isinstance(task.template, RowTemplate)
            row = task.template.fill(rows[task.name])
            assert not task.choices or row["completion"] in row["choices"]


@pytest.mark.parametrize(("block", "metrics"), [(0, [None] * 5), (1, [None] * 7 + ["final_number"])])
def test_the_readmes_overrides_replace_the_tasks(block, metrics, model, tmp_path):
    blocks = re.findall(r"\n\n(    tasks=\$.*?)\n\n", (STUDIES / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    script = blocks[block].replace("headwater compare", r"printf '%s\0'")
    done = subprocess.run(
        ["bash", "-c", script], env={"DIR": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    words = done.stdout.split("\0")
    overrides = [word for flag, word in itertools.pairwise(words) if flag == "--set"]
    for task in re.findall(r"name: (\w+)", overrides[0]):
        (tmp_path / task).mkdir()
        row = {"prompt": "a", "completion": " b\n#### 1"}
        for split in ("train", "test"):
            (tmp_path / task / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    config = load_config(STUDIES / "claim.yaml", [*overrides, f"model_name_or_path={model}", "compare.tolerance=0.2"])
    assert [task.metric for task in config.tasks] == metrics
    assert all(Path(task.train).is_file() for task in config.tasks)

"""An adapter beside a `config.yaml`: that of its run, or another tool's."""

import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from headwater.cli.adapters import locate
from headwater.config import load_config
from headwater.errors import HeadwaterError
from headwater.training import train
from headwater.training.origin import run_file
from headwater.training.run import check_continued_tasks

METHOD = "method={name: mtl_lora, r: 4, num_heads: 2, lora_alpha: 8, target_modules: [up_proj]"
ANOTHER_TOOLS = "base_model: some/model\nadapter: lora\ndatasets:\n  - path: mine.jsonl\noutput_dir: out\n"


@pytest.fixture(scope="module")
def first(folder):
    config = load_config(folder / "run.yaml", [f"{METHOD}}}", f"output_dir={folder / 'first'}", "training.max_steps=1"])
    return train(config, console=Console(file=StringIO())).output_dir


@pytest.fixture
def beside(first, tmp_path):
    """A function that puts the adapter beside a `config.yaml` of this text, or beside none."""

    def put(text: str | None) -> Path:
        shutil.copytree(first / "adapter", tmp_path / "adapter")
        if text is not None:
            (tmp_path / "config.yaml").write_text(text)
        return tmp_path / "adapter"

    return put


def go_on(folder: Path, adapter: Path, *overrides: str):
    return load_config(folder / "run.yaml", [f"{METHOD}, continue_from: {adapter}}}", *overrides])


@pytest.mark.parametrize("text", [ANOTHER_TOOLS, None])
def test_the_adapter_alone_will_do(folder, beside, text):
    adapter = beside(text)
    for path in (adapter, adapter.parent):
        found = locate(str(path))
        assert (found.adapter, found.run_file, found.config) == (adapter, None, None)
    check_continued_tasks(go_on(folder, adapter))
    assert run_file(adapter.parent) is None


def test_a_run_s_config_is_its_own(folder, first, beside):
    adapter = beside((first / "config.yaml").read_text())
    for path in (adapter, adapter.parent):
        found = locate(str(path))
        assert (found.run_file, [task.name for task in found.config.tasks]) == (
            adapter.parent / "config.yaml",
            ["colour", "copy"],
        )
    check_continued_tasks(go_on(folder, adapter))
    (adapter.parent / "link").symlink_to(adapter)
    (adapter.parent / "else").mkdir()
    (adapter.parent / "else" / "link").symlink_to(adapter)  # it is the adapter's place that counts
    for link in ("link", "else/link"):
        with pytest.raises(HeadwaterError, match="are colour, copy; those of this run begin with copy"):
            check_continued_tasks(go_on(folder, adapter.parent / link, "tasks.1.name=more", "tasks.0.name=copy"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace("tasks:", "tsks:"), "does not name the tasks"),
        (lambda text: text.replace("name: colour", "nme: colour"), "does not name the tasks"),
        (lambda text: text[: text.index("tasks:")] + "tasks:\n", "does not name the tasks"),
        (lambda text: text + "tasks: [", "not valid YAML"),
        (lambda text: "", "the file is empty"),
    ],
)
def test_a_damaged_one_is_said(folder, first, beside, damage, said):
    adapter = beside(damage((first / "config.yaml").read_text()))
    with pytest.raises(HeadwaterError, match=said):
        check_continued_tasks(go_on(folder, adapter))
    for path in (adapter, adapter.parent):
        with pytest.raises(HeadwaterError, match=r"config\.yaml"):
            locate(str(path))

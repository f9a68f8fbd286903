"""File names are printed as they are: in rich's markup `[v2]` would be lost, and `[/old]` an error."""

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from headwater.cli import demo as demo_command
from headwater.cli import evaluate, export, lm_eval
from headwater.config import load_config
from headwater.demo import run as demo
from headwater.training import train

NAME = "[v2]/[/old]"


@pytest.fixture(scope="module")
def trained(folder):
    """A run on a file of such a name, and what it said."""
    data = folder / NAME
    data.mkdir(parents=True)
    (data / "copy.jsonl").write_text((folder / "copy.jsonl").read_text())
    text = StringIO()
    overrides = [f"output_dir={folder / 'brackets'}", "method={name: lora, r: 2, target_modules: [up_proj]}",
                 f"tasks.1.train='{NAME}/copy.jsonl'", "tasks.1.max_train_rows=8", "training.max_steps=1"]  # fmt: skip
    config = load_config(folder / "run.yaml", overrides)
    return train(config, console=Console(file=text, width=200)).output_dir, text.getvalue()


def test_a_run_names_the_file_that_rows_were_taken_of(trained):
    assert f"task copy: train: 8 of 10 rows of {NAME}/copy.jsonl, drawn at random" in trained[1].splitlines()


def test_commands_name_what_they_wrote(trained, tmp_path, capsys, monkeypatch):
    run, folder = str(trained[0]), tmp_path / NAME
    folder.mkdir(parents=True)
    evaluate.run(run, None, "test", f"{folder}/scores.json", [])
    assert f"wrote {folder}/scores.json\n" in capsys.readouterr().err
    export.run(run, f"{folder}/plain", merge=False, per_task=False, rows=None, score_rows=None)
    assert f"wrote {folder}/plain (" in capsys.readouterr().out
    monkeypatch.setattr("headwater.evaluation.lm_eval.lm_eval_scores", lambda *args, **options: [])
    options = {"include_path": None, "num_fewshot": None, "limit": None, "task": None, "chat": False, "overrides": []}
    lm_eval.run(run, ["mine"], output=f"{folder}/lm.json", **options)
    assert f"wrote {folder}/lm.json\n" in capsys.readouterr().err


def test_the_demo_names_its_folders(tmp_path, monkeypatch, capsys):
    def fetched(folder, *, progress):
        progress(f"fetching to {folder}")

    folder = tmp_path / NAME
    monkeypatch.setattr(demo, "fetch_demo", fetched)
    demo_command.fetch_only(str(folder))
    assert capsys.readouterr().out.splitlines() == [f"fetching to {folder}", f"{folder} has model and tasks"]


def test_the_demo_names_its_report(tmp_path, monkeypatch):
    results = {"tasks": {}, "steps": 1, "train_seconds": 1.0}
    result = SimpleNamespace(output_dir=tmp_path / NAME, results=results)
    monkeypatch.setattr("headwater.training.train", lambda *args, **options: result)
    monkeypatch.setattr(demo, "cache_dir", lambda: tmp_path)
    text = StringIO()

    def prepare(cache, *, progress, **options):
        progress(f"from {NAME}")
        return demo.DemoAssets(None, [], [])

    monkeypatch.setattr(demo, "prepare", prepare)
    demo.run_demo(tmp_path / NAME, console=Console(file=text, width=300))
    lines = text.getvalue().splitlines()
    assert lines[0] == f"from {NAME}"
    assert lines[-1] == f"report: {result.output_dir}/report.html"

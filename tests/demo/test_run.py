"""run_demo(): the packaged run, its overrides, and what stops it before anything is fetched."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from headwater.demo import run
from headwater.demo.assets import DemoAssets, Source, model_folder, task_entries
from headwater.demo.packages import fetch
from headwater.demo.run import demo_config, run_demo
from headwater.errors import HeadwaterError


@pytest.fixture
def console():
    return Console(width=120, record=True, force_terminal=False)


@pytest.fixture
def nothing_is_fetched(monkeypatch):
    monkeypatch.setattr(run, "prepare", lambda *_, **__: pytest.fail("fetched"))


@pytest.fixture
def tiny_model(tmp_path, tiny_llama, tiny_tokenizer):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def write_task(path, n=8):
    rows = [{"prompt": f"{i}?", "completion": [" a", " b"][i % 2], "choices": [" a", " b"]} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_packaged_run_is_sound(tmp_path):
    config = demo_config(tmp_path / "out", [], tmp_path / "cache")
    assert config.method["name"] == "rlora"
    assert config.method["target_modules"] == ["gate_proj", "up_proj", "down_proj"]
    assert config.model.dtype == "float32"
    assert config.model_name_or_path == str(model_folder(tmp_path / "cache"))
    assert config.output_dir == str(tmp_path / "out")
    assert [task.train for task in config.tasks] == [entry["train"] for entry in task_entries(tmp_path / "cache")]
    assert len(config.tasks) >= 5


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(HeadwaterError, match="file/cache: this cannot be written: Not a directory"):
        demo_config(tmp_path / "out", [], tmp_path / "file" / "cache")
    with pytest.raises(HeadwaterError, match="file/cache: this cannot be written: Not a directory"):
        fetch([], tmp_path / "file" / "cache", progress=print)


def test_overrides_are_meant_from_where_the_user_stands(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    tasks = "tasks=[{name: own, train: train.jsonl, test: test.jsonl}]"
    config = demo_config("out", ["method.r=4", "training.max_steps=7", tasks], tmp_path / "cache")
    assert config.method["r"] == 4
    assert config.training["max_steps"] == 7
    assert [task.name for task in config.tasks] == ["own"]
    assert config.base_dir == tmp_path / "mine"


def test_a_wrong_override_is_said_before_anything_is_fetched(tmp_path, nothing_is_fetched):
    with pytest.raises(HeadwaterError) as caught:
        run_demo(tmp_path / "out", ["training.max_step=5", "method.num_heads=0"])
    assert len(caught.value.problems) == 2
    assert "max_steps" in str(caught.value)


def test_a_folder_that_holds_a_run_is_said_before_anything_is_fetched(tmp_path, nothing_is_fetched):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(HeadwaterError, match="overwrite_output_dir"):
        run_demo(tmp_path / "out")


def test_what_an_override_replaces_is_not_fetched(tmp_path, monkeypatch):
    asked = []

    def prepare(cache, *, progress, with_model, with_tasks):
        asked.append((with_model, with_tasks))
        raise HeadwaterError("stop here")

    monkeypatch.setattr(run, "prepare", prepare)
    own_tasks = "tasks=[{name: own, train: a.jsonl, test: b.jsonl}]"
    for overrides in [], ["model_name_or_path=some/model"], [own_tasks], ["tasks.0.weight=2"]:
        with pytest.raises(HeadwaterError, match="stop here"):
            run_demo(tmp_path / "out", overrides)
    assert asked == [(True, True), (False, True), (True, False), (True, True)]


def test_own_model_and_tasks_run_through_without_packages(tmp_path, monkeypatch, tiny_model, console):
    """The real training on a tiny random model: nothing is downloaded, and the whole run folder is there."""
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path / "rows.jsonl")
    source = Source("pack 1.0", "MIT", "0" * 64, "some texts")
    monkeypatch.setattr("headwater.demo.assets.fetch", lambda packages, *_, **__: dict.fromkeys(packages))
    real = run.prepare

    def prepare(*args, **kwargs):
        found = real(*args, **kwargs)
        return DemoAssets(found.model_path, found.tasks, [*found.sources, source])

    monkeypatch.setattr(run, "prepare", prepare)
    overrides = [
        f"model_name_or_path={tiny_model}",
        "tasks=[{name: own, train: rows.jsonl, test: rows.jsonl}]",
        "training.max_steps=2",
        "training.eval_steps=2",
        "training.save_steps=2",
        "training.use_cpu=true",
    ]
    run_demo("out", overrides, console=console)
    printed = console.export_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["steps"] == 2
    assert f"{results['tasks']['own']['after']:.3f}" in printed
    assert "pack 1.0: some texts (MIT)" in printed
    assert "report: out/report.html" in printed
    for name in ("adapter/adapter_model.safetensors", "config.yaml", "report.html"):
        assert (tmp_path / "out" / name).is_file()


def test_fetching_alone_links_model_and_tasks(tmp_path, monkeypatch, tiny_model):
    def prepare(cache, *, progress):
        (cache / "tasks" / "own").mkdir(parents=True, exist_ok=True)
        write_task(cache / "tasks" / "own" / "train.jsonl")
        return DemoAssets(tiny_model, [], [], {}, {})

    monkeypatch.setattr(run, "prepare", prepare)
    for _ in range(2):  # a second time renews the links
        run.fetch_demo(tmp_path / "files", progress=print)
    assert (tmp_path / "files" / "model" / "config.json").is_file()
    assert (tmp_path / "files" / "tasks" / "own" / "train.jsonl").is_file()
    (tmp_path / "taken" / "tasks").mkdir(parents=True)
    with pytest.raises(HeadwaterError, match="in the place of the demo's link"):
        run.fetch_demo(tmp_path / "taken", progress=print)

"""The pools' benchmarks run, at a size where their numbers mean nothing, and write what they say they write."""

from __future__ import annotations

import json

import pytest
from compose.tiny_encoder import save_tiny_encoder
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from benchmarks import pool_quality, pool_speed
from headwater.compose.encoder import load_encoder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_llama().save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_pool_speed(model_folder, tmp_path, capsys):
    sizes = ["--adapters", "3", "--r", "2", "--prompt", "6", "--new", "3", "--rounds", "2"]
    pool_speed.main(["--model", model_folder, *sizes, "--json", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    assert model_folder not in json.dumps(found)
    assert found["work"].keys() == {"prompt", "token", "answer"}
    assert all(part["variants"][pool_speed.ONE]["median"] == 1 for part in found["work"].values())
    assert len(found["work"]["token"]["variants"]) == 7


def test_pool_quality(model_folder, tmp_path, monkeypatch, capsys):
    encoder = str(save_tiny_encoder(tmp_path))
    monkeypatch.setattr(pool_quality, "load_encoder", lambda: load_encoder(encoder))
    for task in ("news", "film", "law", "other"):
        (tmp_path / "tasks" / task).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [
                {"prompt": f"{task}{n} {split}\nTopic:", "completion": [" a", " b"][n % 2], "choices": [" a", " b"]}
                for n in range(9)
            ]
            (tmp_path / "tasks" / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ["--steps", "2", "--rows", "4", "--flow-examples", "4"]
    sizes += ["--layers", "0", "1", "--only", "news", "film", "law"]
    folders = ["--work", str(tmp_path / "work"), "--tasks", str(tmp_path / "tasks"), "--model", model_folder]
    file = tmp_path / "r.json"
    pool_quality.main([*folders, *sizes, "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["retrieval"]["prompts, encoder as it comes"]["n"] == 27
    assert found["ways"]["mixture"]["n"] == 12
    assert found["new tasks"].keys() == {"news", "film", "law"}
    for task, part in found["new tasks"].items():
        assert part["ways"].keys() == {
            *("base", "own", "start", "selection", "mixture", "fusion", "uniform", "arrow", "hub", "flow")
        }
        assert part["start"] != task
        assert task not in part["hub"]["weights"]
        for way in ("base", "own"):
            assert part["ways"][way]["tasks"][task] == found["ways"][way]["tasks"][task]
    for way, whole in found["new tasks together"].items():
        means = [part["ways"][way]["mean"] for part in found["new tasks"].values()]
        assert (whole["n"], whole["mean"]) == (12, pytest.approx(sum(means) / 3))
        base = found["new tasks together"]["base"]["mean"]
        assert whole["won"] - whole["lost"] == pytest.approx(12 * (whole["mean"] - base))
        assert 0 < whole["p"] <= 1
    assert str(tmp_path) not in file.read_text()
    del found["ways"]["fusion"]
    found["ways"]["mixture"]["n"] = -1
    file.write_text(json.dumps(found))
    pool_quality.main([*folders, *sizes, "--json", str(file)])  # goes on: does what is missing, and nothing again
    again = json.loads(file.read_text())["ways"]
    assert (again["mixture"]["n"], again["fusion"]["n"]) == (-1, 12)
    assert pool_quality.without_template("News: oil rose\nTopic:") == "oil rose"

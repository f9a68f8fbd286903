"""The benchmark runs, at a size where its times mean nothing, and every answer of its crowd is right."""

from __future__ import annotations

import json

from benchmarks import serve_load

from .servers import save_base


def test_serve_load(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base")
    few = [
        "--rounds",
        "1",
        "--requests",
        "24",
        "--new-tokens",
        "3",
        "--adapters",
        "3",
        "--prompt-tokens",
        "5",
        "--different",
        "12",
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    json_file = tmp_path / "r.json"
    serve_load.main(["--model", str(base), *few, "--json", str(json_file)])
    found = json.loads(json_file.read_text())
    assert found["throughput"]["answers_equal_alone"] is True
    assert set(found["throughput"]["seconds"]) == {"mixed", "one adapter", "sequential"}
    crowd = found["crowd"]
    assert crowd["requests"] == crowd["answered"] == crowd["equal_to_alone"] == 24
    assert crowd["different_answers"] > 6

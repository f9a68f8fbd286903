"""The study of reward picking runs, at a size where its numbers mean nothing."""

import json

from benchmarks import reward_picking


def test_it_runs_and_writes_its_results(tmp_path, capsys):
    overrides = ["training.max_steps=2", "preference.seeds=[0]", "preference.strategies=[linucb]"]
    words = [word for override in overrides for word in ("--set", override)]
    out = tmp_path / "results.json"
    reward_picking.main(["--output", str(tmp_path / "w"), "--pretraining", "2", "--json", str(out), *words])
    results = json.loads(out.read_text())
    assert results["rounds"] == 2
    assert str(tmp_path) not in out.read_text()
    assert "late picks of the good source" in capsys.readouterr().out

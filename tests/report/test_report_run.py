"""Reading a run folder."""

from __future__ import annotations

import json
import math

import pytest
from report_runs import TASKS, write_nasty_run, write_run

from headwater.errors import HeadwaterError
from headwater.report.run import FILES, read_run, score_interval


def test_interval_of_a_share_is_wilsons():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: the score interval without continuity correction.
    for right, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert score_interval("choice_accuracy", right / n, n) == pytest.approx((low, high), abs=5e-5)


def test_no_interval_where_the_mean_does_not_fix_it():
    assert score_interval("loss", 0.5, 100) is None
    assert score_interval("exact_match", 0.1234, 100) is None  # no count of right answers out of 100 gives this
    assert score_interval("exact_match", None, 100) is None
    assert score_interval("exact_match", 0.5, 0) is None


def test_scores_carry_recorded_intervals_before_computed_ones(tmp_path):
    folder = write_run(tmp_path / "run", steps=3, layers=1)
    results = json.loads((folder / "results.json").read_text())
    results["extra"]["intervals"] = {"reuters": {"before": [0.1, 0.2], "after": None}}
    (folder / "results.json").write_text(json.dumps(results))
    scores = {s.task: s for s in read_run(folder).scores}
    assert list(scores) == list(TASKS)
    assert scores["reuters"].before_interval == (0.1, 0.2)
    assert scores["reuters"].after_interval == pytest.approx((0.756, 0.850), abs=1e-3)
    assert scores["reuters"].majority == 0.219
    assert scores["family relation"].majority is None


def test_change_is_clear_only_when_the_intervals_keep_apart(tmp_path):
    tasks = {
        "apart": ("exact_match", 100, 0.5, 0.8, None),
        "overlapping": ("exact_match", 100, 0.5, 0.6, None),
        "worse": ("exact_match", 100, 0.8, 0.5, None),
        "unknown": ("loss", 100, 2.0, 1.0, None),
    }
    scores = read_run(write_run(tmp_path / "run", tasks=tasks, steps=2, layers=1)).scores
    assert [s.clear for s in scores] == [True, False, True, None]
    assert [s.change for s in scores] == pytest.approx([0.3, 0.1, -0.3, -1.0])


def test_values_that_are_not_finite_are_none(tmp_path):
    run = read_run(write_nasty_run(tmp_path / "run"))
    score = run.scores[0]
    assert score.task == "<script>alert(1)</script>"
    assert (score.after, score.after_interval, score.change, score.clear) == (None, None, None, None)
    assert score.before == 0.5


def test_a_history_that_ends_in_mid_line_loses_only_that_line(tmp_path):
    run = read_run(write_nasty_run(tmp_path / "run"))
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert len(run.train) == 50
    assert len(run.train) + len(run.evals) == len(lines) - 1
    assert run.notes["history.jsonl"].endswith(f" {len(lines)}.")
    assert sum(r.loss is None or not math.isfinite(r.loss) for r in run.train) == 1


def test_steps_written_twice_by_a_resumed_run_count_once(tmp_path):
    lines = [{"kind": "train", "step": s, "loss": v} for s, v in [(1, 3.0), (2, 2.0), (3, 9.0), (2, 2.5), (3, 2.2)]]
    lines.append({"kind": "something new", "step": 3})
    (tmp_path / "history.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [(r.step, r.loss) for r in read_run(tmp_path).train] == [(1, 3.0), (2, 2.5), (3, 2.2)]


def test_tasks_are_those_of_every_file_in_a_fixed_order(tmp_path):
    folder = write_run(tmp_path / "run", steps=20, layers=1)
    assert read_run(folder).tasks == list(TASKS)
    (folder / "results.json").unlink()
    assert sorted(read_run(folder).tasks) == sorted(TASKS)


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"tasks": 3}', '{"steps": "many"}', "\x00", "[" * 100_000])
@pytest.mark.parametrize("name", ["results.json", "analysis.json"])
def test_a_broken_file_becomes_a_note(tmp_path, name, text):
    folder = write_run(tmp_path / "run", steps=2, layers=1)
    if name == "analysis.json":
        text = text.replace("tasks", "routing").replace("steps", "head_similarity")
    (folder / name).write_text(text)
    run = read_run(folder)
    assert set(run.notes) == {name}
    assert name in run.notes[name]
    assert (run.results if name == "results.json" else run.analysis) is None


def test_bytes_that_are_no_text_become_a_note(tmp_path):
    folder = write_run(tmp_path / "run", steps=2, layers=1)
    for name in FILES:
        (folder / name).write_bytes(b"\xff\xfe\xfa")
    assert set(read_run(folder).notes) == set(FILES)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(HeadwaterError, match="there is no such folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(HeadwaterError, match="this folder is not a run"):
        read_run(tmp_path)


def test_a_task_that_the_history_alone_names_is_one_of_the_run(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0, "task_losses": {"a": 2.0}}\n')
    assert read_run(tmp_path).tasks == ["a"]

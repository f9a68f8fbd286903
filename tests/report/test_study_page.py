"""Finished comparisons written down: all runs, right numbers, no path, and a page that keeps its author's words."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from comparison_runs import METHODS, write_comparison
from report_runs import TASKS
from scipy import stats

from benchmarks import study, study_page
from benchmarks.measure import RESULTS
from headwater.report import write_comparison_report

SEEDS = (0, 1, 2, 3)
FEW = {label: METHODS[label] for label in ("lora", "hydralora", "rlora")}
TWO = {name: TASKS[name] for name in list(TASKS)[:2]}
FIRST, SECOND = TWO
STUDIES = sorted(RESULTS.glob("study-*.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    arm = {"lora alone": METHODS["lora"]}
    folder = tmp_path_factory.mktemp("study") / "out"
    write_comparison(folder, methods={**FEW, **arm}, seeds=SEEDS, tasks=TWO, train_on={"lora alone": [FIRST]})
    write_comparison_report(folder)
    return folder


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    for module in (study, study_page):
        monkeypatch.setattr(module, "PAGES", tmp_path / "pages")
    return tmp_path


def test_the_json_has_every_run(folder):
    found = study.found(folder, command="headwater compare x.yaml")
    raw = json.loads((folder / "comparison.json").read_text())["runs"]
    assert found["seeds"] == list(SEEDS)
    kept = [(m["label"], r["seed"], r["mean"], r["tasks"]) for m in found["methods"] for r in m["runs"]]
    assert [(label, seed) for label, seed, _, _ in kept] == [(r["extra"]["label"], r["seed"]) for r in raw]
    for (_, _, mean, tasks), run in zip(kept, raw, strict=True):
        assert mean == pytest.approx(run["mean"]["after"], rel=1e-4)
        assert tasks == pytest.approx({t: v["after"] for t, v in run["tasks"].items()}, rel=1e-4)
    assert [m["trained_on"] for m in found["methods"]] == [[FIRST, SECOND]] * 3 + [[FIRST]]
    assert found["methods"][2]["learning_rates_tried"] == {"0.0001": 0.61, "0.0003": 0.7}
    assert found["methods"][2]["runs"][0]["head_similarity"] == pytest.approx(
        0.3, abs=0.15
    )  # 0.15 and more by projection
    assert found["methods"][0]["runs"][0]["head_similarity"] is None
    assert found["seesaw"]["lora"][FIRST]["difference"] is not None


def test_p_values_are_of_the_paired_test_with_holms_correction():
    rng = np.random.default_rng(0)
    base = rng.random(5)
    scores = {"first": base, "clear": base + 0.1 + 0.01 * rng.random(5), "other": rng.random(5), "same": base}
    scores = {label: list(values) for label, values in scores.items()}
    found = study.paired_tests(scores)

    def p(label):
        d = np.array(scores[label]) - base
        t = d.mean() / (d.std(ddof=1) / math.sqrt(5))
        return 2 * stats.t.sf(abs(t), 4)

    assert found["first"] == found["same"] == (None, None)
    assert found["clear"][0] == pytest.approx(p("clear"))
    assert found["other"][0] == pytest.approx(p("other"))
    assert found["clear"][1] == pytest.approx(2 * p("clear"))  # the smallest of two counts twice
    assert found["other"][1] == pytest.approx(p("other"))


def test_holm_never_falls_and_one_seed_gives_none():
    found = study.paired_tests(
        {"a": [0.0, 0.0, 0.0], "b": [1.0, 1.2, 0.9], "c": [1.0, 1.1, 0.9], "d": [1.0, -1.0, 0.1]}
    )
    ordered = sorted((p, holm) for p, holm in found.values() if p is not None)
    assert [holm for _, holm in ordered] == sorted(holm for _, holm in ordered)
    assert ordered[0][1] == pytest.approx(3 * ordered[0][0])
    assert ordered[1][1] >= 2 * ordered[1][0] - 1e-12
    assert study.paired_tests({"a": [0.1], "b": [0.2]}) == {"a": (None, None), "b": (None, None)}


def test_the_page_is_of_the_json_and_keeps_what_was_written(folder, places):
    study.main(["tiny", str(folder), "--command", "headwater compare x.yaml", "--title", "A question"])
    page, path = places / "pages" / "tiny.md", places / "study-tiny.json"
    content, text = json.loads(path.read_text()), page.read_text()
    assert text.startswith("# A question\n")
    assert "    headwater compare x.yaml\n" in text
    assert study_page.written(content, page) == text
    *methods, arm = content["comparisons"][0]["methods"]
    assert arm["label"] == "lora alone"
    assert (arm["p"], f"| lora alone | {arm['parameters']:,}" in text) == (None, False)  # it claims nothing
    for method in methods:
        assert f"| {method['label']} | {method['parameters']:,} | 0.0003 | {method['mean']:.3f}" in text
    pictures = re.findall(r"\]\(([^)]+)\)", text)
    assert {"tiny-comparison.svg", "tiny-seesaw.svg"} <= set(pictures)
    assert all((page.parent / name).is_file() for name in pictures)

    page.write_text(text.replace("What it says, and what it does not.", "It says nothing."))
    content["comparisons"][0]["methods"][0]["mean"] = 0.123
    path.write_text(json.dumps(content))
    study.main(["tiny"])
    assert "It says nothing." in page.read_text()
    assert "| 0.123" in page.read_text()


def test_times_that_mean_nothing_are_left_out(folder, places):
    study.main(["tiny", str(folder)])
    assert "| s a step |" in (places / "pages" / "tiny.md").read_text()
    study.main(["tiny", str(folder), "--untimed"])
    page = (places / "pages" / "tiny.md").read_text()
    (part,) = json.loads((places / "study-tiny.json").read_text())["comparisons"]
    assert "a step" not in page
    assert {e["seconds_per_step"] for m in part["methods"] for e in (m, *m["runs"])} == {None}


def test_conflict_is_its_means_over_runs(tmp_path, places):
    folder = write_comparison(tmp_path / "c", methods={"rlora": METHODS["rlora"]}, seeds=(0, 1), tasks=TWO)
    write_comparison_report(folder)
    for seed, cosine in ((0, -0.2), (1, 0.1)):
        part = {"cosine": [[1.0, cosine], [cosine, None]], "mean": cosine, "negative": float(cosine < 0)}
        content = {"schema": 1, "rows_per_task": 16, "tasks": list(TWO), "parts": {"all": part, "B": part}}
        (folder / "rlora" / f"seed-{seed}" / "conflict.json").write_text(json.dumps(content))
    study.main(["tiny", str(folder)])
    assert "| rlora | 2 | −0.050 | 50% |  |  | −0.050 | 50% |" in (places / "pages" / "tiny.md").read_text()


def test_no_path_of_a_machine_is_kept(folder, places):
    content = json.loads((folder / "comparison.json").read_text())
    content["extra"]["methods"][0]["method"]["basis"] = "/somewhere/secret/basis.safetensors"
    moved = places / "moved"
    moved.mkdir()
    (moved / "comparison.json").write_text(json.dumps(content))
    found = json.dumps(study.found(moved))
    assert "secret" not in found
    assert "basis.safetensors" in found


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_pages_say_what_was_found(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    page = study_page.PAGES / f"{content['name']}.md"
    text = page.read_text(encoding="utf-8")
    assert study_page.written(content, page) == text, f"run python -m benchmarks.study {content['name']}"
    assert all((page.parent / name).is_file() for part in content["comparisons"] for name in part["figures"])
    assert study_page.PLACEHOLDERS.isdisjoint(text.splitlines()), "say what was asked and what the numbers say"

"""Gradient conflict and head diversity against score, in the report of a comparison."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from comparison_runs import METHODS, write_comparison
from report_runs import TASKS
from scipy import stats

from headwater.report.comparison import read_comparison
from headwater.report.comparison_heads import diversity_and_score, rank_correlation
from headwater.report.comparison_sections import build_comparison_page
from headwater.report.html import Table, render

TWO = {name: TASKS[name] for name in list(TASKS)[:2]}


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_spearmans_ties_included(seed):
    rng = np.random.default_rng(seed)
    pairs = [(float(a), float(b)) for a, b in rng.integers(0, 6, (9, 2))]
    assert rank_correlation(pairs) == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)


def test_rank_correlation_needs_three_runs_that_differ():
    assert rank_correlation([(0.1, 0.5), (0.2, 0.6)]) is None
    assert rank_correlation([(0.1, 0.5), (0.1, 0.6), (0.1, 0.7)]) is None
    assert rank_correlation([(0.1, 0.9), (0.2, 0.6), (0.3, 0.1)]) == pytest.approx(-1)


def test_points_are_of_methods_with_heads_that_were_trained_on_the_same_tasks(tmp_path):
    methods = {label: METHODS[label] for label in ("lora", "hydralora", "rlora")} | {"alone": METHODS["rlora"]}
    folder = write_comparison(tmp_path / "c", methods=methods, train_on={"alone": list(TWO)[:1]}, tasks=TWO)
    found = diversity_and_score(read_comparison(folder))
    runs = json.loads((folder / "comparison.json").read_text())["runs"]
    assert list(found) == ["hydralora", "rlora"]
    assert [score for _, score in found["rlora"]] == [
        r["mean"]["after"] for r in runs if r["extra"]["label"] == "rlora"
    ]
    analysis = json.loads((folder / "rlora" / "seed-0" / "analysis.json").read_text())["head_similarity"]
    pairs = [m[i][j] for m in analysis.values() for i in range(3) for j in range(3) if i != j]
    assert found["rlora"][0][0] == pytest.approx(np.mean(pairs))


def test_conflict_is_shown_where_it_was_measured(tmp_path):
    folder = write_comparison(tmp_path / "c", methods={"rlora": METHODS["rlora"]}, seeds=(0, 1), tasks=TWO)
    assert "conflict" not in {s.anchor for s in build_comparison_page(read_comparison(folder)).sections}
    for seed, cosine in ((0, -0.2), (1, 0.1)):
        part = {"cosine": [[1.0, cosine], [cosine, None]], "mean": cosine, "negative": float(cosine < 0)}
        content = {"schema": 1, "rows_per_task": 16, "tasks": list(TWO), "parts": {"all": part, "A": part}}
        (folder / "rlora" / f"seed-{seed}" / "conflict.json").write_text(json.dumps(content))
    page = build_comparison_page(read_comparison(folder))
    (section,) = [s for s in page.sections if s.anchor == "conflict"]
    (table,) = [b for b in section.blocks if isinstance(b, Table)]
    assert [cell.text for cell in table.rows[0]] == ["rlora", "−0.050", "50.0 %", "−0.050", "50.0 %"]
    html, files = render(page)
    assert "−0.050" in files["conflict_1.svg"].decode()  # in the matrix, too, the mean over runs
    assert "16 training rows a task" in html


def test_router_use_is_drawn_where_projections_differ_in_their_number_of_experts(tmp_path):
    """As with an `experts_pattern`."""
    folder = write_comparison(tmp_path / "c", methods={"rlora": METHODS["rlora"]}, seeds=(0,), tasks=TWO)
    file = folder / "rlora" / "seed-0" / "analysis.json"
    analysis = json.loads(file.read_text())
    up = {"model.layers.0.up_proj": [0.5, 0.3, 0.2], "model.layers.1.up_proj": [0.1, 0.3, 0.6]}
    analysis["routing"] = {task: {**up, "model.layers.0.down_proj": [0.1, 0.9]} for task in TWO}
    file.write_text(json.dumps(analysis))
    _, files = render(build_comparison_page(read_comparison(folder)))
    assert "router_use.svg" in files
    svg = files["router_use.svg"].decode()
    assert [number in svg for number in (">20<", ">60<", ">40<")] == [True] * 3


def test_router_use_knows_tasks_without_scores_and_methods_with_tasks_of_their_own(tmp_path):
    methods = dict.fromkeys(("one", "other"), METHODS["rlora"])
    folder = write_comparison(tmp_path / "c", methods=methods, seeds=(0,), tasks=TWO)
    first, second = TWO
    for label, shares in {
        "one": {first: [0.51, 0.49], "unscored": [0.23, 0.77]},
        "other": {second: [0.38, 0.62]},
    }.items():
        file = folder / label / "seed-0" / "analysis.json"
        routing = {task: {"model.layers.0.up_proj": row} for task, row in shares.items()}
        file.write_text(json.dumps({**json.loads(file.read_text()), "routing": routing}))
    _, files = render(build_comparison_page(read_comparison(folder)))
    svg = files["router_use.svg"].decode()
    assert "unscored" in svg
    places = {}
    for text in re.findall(r"<text [^>]*>[^<]*</text>", svg):
        found = re.search(r'y="([\d.]+)".*>(.*)</text>', text)
        places.setdefault(found[2], set()).add(found[1])
    assert places["51"] < places["–"]
    assert places["38"] < places["–"]
    assert places["23"] < places["–"]
    assert len({*places["51"], *places["38"], *places["23"]}) == 3

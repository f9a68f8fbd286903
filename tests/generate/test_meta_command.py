"""`headwater meta`: from a file to a generated adapter, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from headwater import base_model
from headwater.cli import main
from headwater.cli.meta import _config_of, _load, _vector_of
from headwater.config import load_config
from headwater.data.encode import DataSpec
from headwater.data.rows import Row
from headwater.data.tasks import Task
from headwater.errors import HeadwaterError
from headwater.evaluation import EvaluationSpec
from headwater.evaluation.scoring import sample
from headwater.generate import AdapterGenerator, best_of, read_adapter, score_adapter, study, task_vector, write_adapter
from headwater.generate.report import _size
from headwater.generate.spec import MetaConfig


def meta(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["meta", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_results_and_report(finished):
    results = json.loads((finished / "results.json").read_text())
    kinds = {"base", "source", "mean_checkpoint", "generated", "nearest_checkpoint", "wrong_condition", "left_out"}
    assert set(results["scores"]) == {"animals", "colours"}
    assert all(set(by) == kinds for by in results["scores"].values())
    html = (finished / "report.html").read_text()
    assert f"{results['scores']['animals']['generated']:.3f}" in html
    assert (finished / "figures" / "generated-against-trained.svg").is_file()
    storage = results["extra"]["storage_bytes"]
    assert storage["all_checkpoints"] == 6 * storage["adapter"]
    assert results["extra"]["metrics"] == dict.fromkeys(("animals", "colours"), "choice_accuracy")


NO_BETTER = "the condition does nothing here"
NEAREST = "The trained checkpoint nearest to what is generated scores no worse"
UNSEEN = "what it writes does not beat the base model"


@pytest.mark.parametrize(
    ("metrics", "called", "means", "notes"),
    [
        (["loss", "loss"], "mean loss", (6.0, 5.0, 4.97, 5.967, 5.5), (NEAREST,)),
        (["loss", "loss"], "mean loss", (6.0, 5.0, 5.01, 4.9, 6.5), (NO_BETTER, UNSEEN)),
        (["choice_accuracy", "loss"], "mean", (0.2, 0.5, 0.4, 0.3, 0.25), ()),
        (["choice_accuracy", "loss"], "mean", (0.2, 0.5, 0.6, 0.5, 0.1), (NO_BETTER, NEAREST, UNSEEN)),
        (["exact_match", "choice_accuracy"], "mean", (0.2, 0.5, 0.4, 0.3, 0.25), ()),
    ],
)
def test_a_loss_that_is_lower_is_better_and_no_part_of_the_mean_score(
    finished, tmp_path, capsys, monkeypatch, metrics, called, means, notes
):
    """`means` are of the base model, what is generated, the nearest checkpoint, another task's vector, a task left out.

    A loss beside a score is such that it would turn the notes round if it counted as a score.
    """
    results = json.loads((finished / "results.json").read_text())
    results["extra"]["metrics"] = dict(zip(("animals", "colours"), metrics, strict=True))
    kinds = ("base", "generated", "nearest_checkpoint", "wrong_condition", "left_out")
    beside = "loss" in metrics and metrics[0] != "loss"
    for kind, mean in zip(kinds, means, strict=True):
        first, second = (mean, 10 - 10 * mean) if beside else (mean - 0.01, mean + 0.01)
        results["scores"]["animals"][kind], results["scores"]["colours"][kind] = first, second
    run = SimpleNamespace(train=lambda: results, folder=tmp_path)
    monkeypatch.setattr("headwater.cli.meta._run", lambda *_: run)
    code, out, err = meta(capsys, "train", "any.yaml")
    assert code == 0, err
    page = (tmp_path / "report.html").read_text()
    assert tuple(note for note in (NO_BETTER, NEAREST, UNSEEN) if note in page) == notes
    assert (f">{called}<" in page, f"{means[1]:.3f}" in page) == (True, True)
    rows = {cells[0]: cells[1:] for line in out.splitlines() if len(cells := re.split(r"\s{2,}", line.strip())) > 3}
    assert rows[called][0] == f"{means[0]:.3f}"
    assert [rows[task][0] for task in ("animals", "colours")] == metrics
    figures = {path.stem: path for path in (tmp_path / "figures").glob("*.svg")}
    assert ("losses-generated-against-trained" in figures) == ("loss" in metrics)
    assert ("generated-against-trained" in figures) == (set(metrics) != {"loss"})


def test_headwater_report_writes_the_same_page_anew(finished):
    before = (finished / "report.html").read_bytes()
    with pytest.raises(SystemExit) as caught:
        main(["report", str(finished)])
    assert not caught.value.code
    assert (finished / "report.html").read_bytes() == before


def test_headwater_report_says_what_keeps_it_from_writing(tmp_path, capsys, monkeypatch):
    (tmp_path / "generator").mkdir()
    (tmp_path / "results.json").write_text("{}")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headwater.generate.report.write_meta_report", full)
    with pytest.raises(SystemExit) as caught:
        main(["report", str(tmp_path)])
    assert caught.value.code == 2
    assert "cannot be made: OSError: [Errno 28] No space left" in " ".join(capsys.readouterr().err.split())


def test_the_nearest_checkpoint_is_a_trained_one_and_none_is_nearer(finished):
    """Distance in weights that are divided by the spread of their tensor over the task's checkpoints."""
    collected = {
        path.parent: load_file(path) for path in (finished / "collect").glob("*/step-*/adapter_model.safetensors")
    }
    for task in ("animals", "colours"):
        made = load_file(finished / "adapters" / "generated" / task / "adapter_model.safetensors")
        nearest = load_file(finished / "adapters" / "nearest_checkpoint" / task / "adapter_model.safetensors")
        same = [p for p, one in collected.items() if all(torch.equal(one[n], nearest[n]) for n in nearest)]
        assert len(same) == 1
        mean = [one for p, one in collected.items() if p.parent.name == task]
        spread = {n: torch.stack([one[n] for one in mean]).mean(0).std() for n in made}

        def distance(one, made=made, spread=spread):
            return sum(((one[n] - made[n]) / spread[n]).square().sum() for n in made if spread[n] > 0)

        assert distance(nearest) <= min(map(distance, collected.values())) * 1.001


def test_the_last_checkpoints_of_one_start_were_kept(finished):
    for task in ("animals", "colours"):
        assert sorted(p.name for p in (finished / "collect" / task).glob("step-*")) == [
            "step-000002",
            "step-000003",
            "step-000004",
        ]
    first = {
        t: load_file(finished / "collect" / t / "step-000004" / "adapter_model.safetensors")
        for t in ("animals", "colours")
    }
    name = next(n for n in first["animals"] if n.endswith("lora_A.weight"))
    difference = (first["animals"][name] - first["colours"][name]).abs().max()
    assert 0 < difference < 0.05  # a few steps from the same draw, not two draws


def test_a_generated_adapter_is_an_ordinary_lora(finished, tmp_path, capsys):
    code, _, err = meta(capsys, "generate", finished, "--task", "colours", "--output", tmp_path / "out")
    assert code == 0, err
    model = PeftModel.from_pretrained(make_tiny_llama(), str(tmp_path / "out"))
    assert model.peft_config["default"].r == 2
    scored = load_file(finished / "adapters" / "generated" / "colours" / "adapter_model.safetensors")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(written[name], scored[name]) for name in scored)
    code, _, err = meta(capsys, "generate", finished, "--task", "colours", "--output", tmp_path / "out")
    assert (code, "is there already" in err) == (2, True)
    code, _, err = meta(capsys, "generate", finished, "--task", "shapes", "--output", tmp_path / "no")
    assert (code, "knows no task 'shapes'" in err) == (2, True)


def test_a_new_task_from_examples(finished, meta_folder, tmp_path, capsys):
    examples = meta_folder / "animals-train.jsonl"
    code, _, err = meta(capsys, "generate", finished, "--examples", examples, "--output", tmp_path / "new")
    assert code == 0, err
    assert (tmp_path / "new" / "adapter_config.json").is_file()


def test_the_best_of_several_on_validation_rows(finished, meta_folder, tmp_path, capsys):
    """The adapter written is the one whose loss, row by row on stock PEFT, is lowest."""
    rows = [{"prompt": f"animals so {i}", "completion": [" cat", " dog", " hen"][i % 3]} for i in range(7)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generator, tokenizer = AdapterGenerator.load(finished / "generator"), make_tiny_tokenizer()

    def loss(weights):
        write_adapter(tmp_path / "one", generator.layout, weights)
        model = PeftModel.from_pretrained(make_tiny_llama(), str(tmp_path / "one")).eval()
        total, count = 0.0, 0
        for row in rows:
            prompt, answer = (tokenizer(row[key]).input_ids for key in ("prompt", "completion"))
            answer = [*answer, tokenizer.eos_token_id]
            with torch.no_grad():
                log_p = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            total -= sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
            count += len(answer)
        return total / count

    for task, settings in (("animals", {}), (None, {"examples": meta_folder / "animals-train.jsonl"})):
        options = ["--task", task] if task else ["--examples", settings["examples"]]
        plain = ["--output", tmp_path / f"{task}-likeliest", *options]
        assert meta(capsys, "generate", finished, *plain)[0] == 0
        losses = {}
        for seed in (None, 3, 4, 5, 6):
            target = tmp_path / f"{task}-{seed}"
            drawn = [] if seed is None else ["--seed", seed]
            assert meta(capsys, "generate", finished, *options, *drawn, "--output", target)[0] == 0
            losses[seed] = loss(read_adapter(target)[1])
        best = min(losses, key=losses.get)
        asked = [
            "--best-of",
            5,
            "--seed",
            3,
            "--validation",
            tmp_path / "rows.jsonl",
            "--output",
            tmp_path / f"{task}-best",
        ]
        code, _, err = meta(capsys, "generate", finished, *options, *asked)
        assert code == 0, err
        assert torch.equal(read_adapter(tmp_path / f"{task}-best")[1], read_adapter(tmp_path / f"{task}-{best}")[1])
        assert f"the best of 5, {'z = 0' if best is None else f'seed {best}; z = 0 has {losses[None]:.3f}'}" in err
        assert f"loss {losses[best]:.3f} on 7 validation rows" in err
        assert len(set(losses.values())) == 5


def test_the_run_s_validation_rows_choose_by_the_task_s_metric(finished, meta_folder, tmp_path, capsys):
    rows = f"tasks.1.validation={meta_folder / 'colours-test.jsonl'}"
    asked = ["generate", finished, "--task", "colours", "--best-of", 3, "--output"]
    code, _, err = meta(capsys, *asked, tmp_path / "best", "--set", rows)
    assert (code, "choice_accuracy" in err, "on 8 validation rows" in err) == (0, True, True), err
    for more, message in (
        (["--set", "seed=0"], "--best-of: there are no rows to choose by: colours has no validation rows"),
        (["--validation", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--task", "shapes"], "knows no task 'shapes'"),
    ):
        code, _, err = meta(capsys, *asked, tmp_path / "no", *more)
        assert (code, message in " ".join(err.split()), "Traceback" in err) == (2, True, False), err
    code, _, err = meta(
        capsys, "generate", finished, "--task", "colours", "--output", tmp_path / "no", "--validation", "x"
    )
    assert (code, "--validation: the option does not apply here" in err) == (2, True)
    assert not (tmp_path / "no").exists()


def test_scoring_an_adapter_leaves_the_base_model_as_it_was(finished):
    generator, model, ids = AdapterGenerator.load(finished / "generator"), make_tiny_llama(), torch.arange(9)[None]
    task = Task("t", 0, "loss", test=[Row(prompt="animals", completion=" cat")])
    before, modules = model(ids).logits, [type(module) for module in model.modules()]
    weights = generator.for_task("animals")
    for _ in range(2):
        found = score_adapter(
            model, make_tiny_tokenizer(), generator.layout, weights, task, EvaluationSpec(), DataSpec()
        )
        assert (found.metric, found.n) == ("loss", 1)
        assert torch.equal(model(ids).logits, before)
        assert [type(module) for module in model.modules()] == modules


def test_the_earliest_of_the_best_is_kept():
    def of(scores, **options):
        made = []

        def draw(*, seed):
            made.append(seed)
            return torch.tensor([float(len(made))])

        best = best_of(draw, len(scores), lambda weights: scores[int(weights) - 1], **options)
        assert best.score == scores[int(best.weights) - 1]
        return best.seed, made

    assert of([0.5, 0.5, 0.25]) == (None, [None, 0, 1])
    assert of([0.5, 0.75, 0.75], seed=7) == (7, [None, 7, 8])
    assert of([float("nan"), 0.1, float("inf"), 0.2]) == (2, [None, 0, 1, 2])
    with pytest.raises(HeadwaterError, match="none of 2 adapters has a finite score"):
        of([float("nan"), float("-inf")])
    with pytest.raises(HeadwaterError, match="count is 0"):
        of([])


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(finished, meta_folder, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "headwater", "meta", "train", str(meta_folder / "meta.yaml")]
    command += ["--set", f"output_dir={output}", "--set", "meta.leave_one_out=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while not (output / "collect" / "animals" / "collected.json").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = (output / "collect" / "animals" / "step-000004" / "adapter_model.safetensors").stat().st_mtime_ns
    assert not (output / "results.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (output / "collect" / "animals" / "step-000004" / "adapter_model.safetensors").stat().st_mtime_ns == kept
    mine, whole = (json.loads((folder / "results.json").read_text()) for folder in (output, finished))
    assert mine == whole


def test_the_example_is_accepted():
    config = load_config(Path(__file__).parents[2] / "examples" / "meta.yaml", model=MetaConfig)
    assert len(config.tasks) == 4
    assert config.meta.leave_one_out


def test_vectors_are_of_one_device_whether_or_not_something_was_left_to_collect(meta_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "own_device", lambda use_cpu: torch.device("meta"))
    monkeypatch.setattr(study, "collect", lambda *_, **__: None)
    seen = []

    def vector(model, *_, **__):
        seen.append({p.device.type for p in model.parameters()})
        return torch.zeros(1)

    monkeypatch.setattr(study, "task_vector", vector)
    config = load_config(meta_folder / "meta.yaml", [f"output_dir={tmp_path}"], model=MetaConfig)
    study.MetaRun(config, Console(quiet=True)).collect()
    monkeypatch.setattr(sys.modules["headwater.generate.task_vector"], "task_vector", vector)
    config = _config_of(tmp_path / "generator", ())
    generator = SimpleNamespace(vector_settings={})
    _vector_of(generator, config, *_load(config), str(meta_folder / "animals-test.jsonl"))
    assert seen == [{"meta"}] * 3


def test_mistakes_are_said_together_and_before_anything_runs(meta_folder, tmp_path, capsys):
    code, _, err = meta(
        capsys, "train", meta_folder / "meta.yaml", "--set", "method.name=rlora", "--set", "meta.checkpoints=9",
        "--set", f"output_dir={tmp_path / 'none'}",
    )  # fmt: skip
    assert code == 2
    assert "plain LoRA" in err
    assert "9 checkpoints every 1 steps need 9 steps, not 4" in err
    assert "Traceback" not in err
    assert not (tmp_path / "none").exists()
    code, _, err = meta(capsys, "train", meta_folder / "meta.yaml", "--set", "meta.betta=1")
    assert (code, "did you mean `beta`" in err) == (2, True)


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_that_the_model_does_not_take_are_refused_before_anything_is_collected(
    meta_folder, tmp_path, capsys, split
):
    row = {"prompt": "x" * 510, "completion": " red", "choices": [" red", " blue"]}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    long, output = f"tasks.1.{split}={tmp_path / 'long.jsonl'}", tmp_path / "run"
    code, _, err = meta(capsys, "train", meta_folder / "meta.yaml", "--set", long, "--set", f"output_dir={output}")
    assert (code, "more than the model's 512" in " ".join(err.split()), "long.jsonl:1" in err) == (2, True, True), err
    assert not list(output.rglob("step-*"))


def test_options_of_generate_that_cannot_be(finished, tmp_path, capsys):
    out = ("--output", tmp_path / "new")
    for options, said in (
        (("--task", "animals", "--seed", "-1"), "--seed: should be from 0 to 2**32 - 1, not -1"),
        (("--task", "animals", "--seed", 2**32), f"--seed: should be from 0 to 2**32 - 1, not {2**32}"),
        # of three, two are drawn, with this seed and the next
        (("--task", "animals", "--best-of", 3, "--seed", 2**32 - 1), f"2**32 - 1, not {2**32}"),
        (("--examples", ""), "--examples: names no file"),
        (("--task", "animals", "--best-of", 3, "--validation", ""), "--validation: names no file"),
    ):
        code, _, err = meta(capsys, "generate", finished, *out, *options)
        assert code == 2
        assert said in err
    assert not (tmp_path / "new").exists()


def test_batches_that_cannot_be_normalised_are_refused_before_anything_is_collected(meta_folder, tmp_path, capsys):
    channels = f"meta.channels=[{', '.join(['4'] * 12)}]"  # halve an adapter's few thousand numbers to one
    for more, refused in (("meta.leave_one_out=true", True), ("meta.leave_one_out=false", False)):
        output = tmp_path / more
        code, _, err = meta(
            capsys, "train", meta_folder / "meta.yaml", "--set", channels, "--set", more, "--set", "meta.steps=1",
            "--set", f"output_dir={output}",
        )  # fmt: skip
        assert (code, output.exists()) == ((2, False) if refused else (0, True)), err
        assert ("meta.rows_per_task to 2" in err) == refused
        assert "Traceback" not in err


@pytest.mark.parametrize("command", ["collect", "train"])
def test_a_folder_that_another_process_is_at_is_left_alone(meta_folder, tmp_path, capsys, command):
    with FileLock(tmp_path / ".lock"):
        code, _, err = meta(capsys, command, meta_folder / "meta.yaml", "--set", f"output_dir={tmp_path}")
    assert code == 2
    assert "another process trains in" in err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_small_sizes_have_a_unit_that_shows_them():
    assert [_size(n) for n in (512, 50 * 2**10, 2**20, 0)] == ["0.5 KiB", "50.0 KiB", "1.0 MiB", "0.0 KiB"]


def test_adapters_collected_under_other_settings_are_refused(finished, meta_folder, capsys):
    code, _, err = meta(capsys, "collect", meta_folder / "meta.yaml", "--set", "training.learning_rate=0.5")
    assert code == 2
    assert "training differ" in err
    assert "learning_rate: 0.5" not in (finished / "config.yaml").read_text()


def test_adapters_collected_of_other_rows_are_refused(finished, meta_folder, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    other = (meta_folder / "colours-train.jsonl").read_text().replace("colours train 1", "colours train 2")
    (tmp_path / "colours.jsonl").write_text(other)
    kept = output / "collect" / "colours" / "collected.json"
    settings = json.loads(kept.read_text())
    settings["tasks"][1]["train"] = str(tmp_path / "colours.jsonl")  # as if the rows of one file had changed
    kept.write_text(json.dumps(settings))
    kept = output / "collect" / "animals" / "collected.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "tasks": settings["tasks"]}))
    sets = ["--set", f"tasks.1.train={tmp_path / 'colours.jsonl'}", "--set", f"output_dir={output}"]
    code, _, err = meta(capsys, "collect", meta_folder / "meta.yaml", *sets)
    assert code == 2
    assert "the adapters of colours were collected under other settings: rows differ" in err


def test_what_a_stopped_collection_left_is_not_taken_for_the_new_ones(meta_folder, tmp_path, capsys):
    stale = tmp_path / "run" / "collect" / "animals" / "step-000009"
    stale.mkdir(parents=True)
    sets = ["--set", f"output_dir={tmp_path / 'run'}"]
    assert meta(capsys, "collect", meta_folder / "meta.yaml", *sets)[0] == 0
    assert sorted(p.name for p in stale.parent.glob("step-*")) == [f"step-00000{n}" for n in (2, 3, 4)]


def test_a_task_vector_is_of_the_layer_and_of_as_many_prompts_as_asked_for():
    model, tokenizer = make_tiny_llama(), make_tiny_tokenizer()
    rows = [Row(prompt=f"row {i} {'x' * (i % 7)}", completion=" x") for i in range(40)]
    for settings, count in (({}, 30), ({"samples": 4, "layer": 1}, 4), ({"samples": 99, "layer": 0}, 40)):
        states = []
        for row in sample(rows, count):
            with torch.no_grad():
                out = model(tokenizer(row.prompt, return_tensors="pt").input_ids, output_hidden_states=True)
            states.append(out.hidden_states[settings.get("layer", -1)][0, -1])
        found = task_vector(model, tokenizer, rows, DataSpec(), normalize=False, **settings)
        torch.testing.assert_close(found, torch.stack(states).mean(0), rtol=0, atol=1e-5)


def test_the_task_vector_does_not_depend_on_batches_or_leave_hooks():
    model, tokenizer = make_tiny_llama(), make_tiny_tokenizer()
    rows = [Row(prompt="word " * (1 + i % 5), completion=" x") for i in range(11)]
    model(torch.tensor([[1]]), output_hidden_states=True)  # transformers then puts hooks of its own
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    vector = task_vector(model, tokenizer, rows, DataSpec(), samples=11, normalize=False)
    alone = [task_vector(model, tokenizer, [row], DataSpec(), normalize=False) for row in rows]
    plain = []
    for row in rows:
        ids = tokenizer(row.prompt, return_tensors="pt").input_ids
        plain.append(model(ids, output_hidden_states=True).hidden_states[-1][0, -1])
    torch.testing.assert_close(vector, torch.stack(alone).mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(vector, torch.stack(plain).mean(0), rtol=0, atol=1e-5)
    assert vector.shape == (32,)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    for side in ("left", "right"):
        tokenizer.padding_side = side
        assert torch.equal(task_vector(model, tokenizer, rows, DataSpec(), samples=11, normalize=False), vector)


@pytest.mark.parametrize(("position", "room"), [("last_prompt_token", 0), ("generated_mean", 4)])
def test_prompts_of_a_task_vector_that_the_model_does_not_take_are_named(position, room):
    rows = [Row(prompt="x" * (32 - room + more), completion=" x", source="new.jsonl", line=more) for more in (0, 1, 2)]
    model, settings = make_tiny_llama(max_position_embeddings=32), {"position": position, "max_new_tokens": 4}
    assert task_vector(model, make_tiny_tokenizer(), rows[:1], DataSpec(), **settings).isfinite().all()
    with pytest.raises(HeadwaterError, match="are more than the model's 32") as caught:
        task_vector(model, make_tiny_tokenizer(), rows, DataSpec(), **settings)
    assert [problem.where for problem in caught.value.problems] == ["new.jsonl:1", "new.jsonl:2"]


@pytest.mark.parametrize("layer", [-1, 1])
def test_the_mean_over_generated_tokens_is_that_of_every_step(layer):
    model, tokenizer = make_tiny_llama(), make_tiny_tokenizer()
    rows = [Row(prompt="word " * (1 + i), completion=" x") for i in range(3)]
    states = []
    for row in rows:
        ids = tokenizer(row.prompt).input_ids
        for _ in range(4):  # without a cache: the last position of the prompt, then of each token that is added
            with torch.no_grad():
                out = model(torch.tensor([ids]), output_hidden_states=True)
            states.append(out.hidden_states[layer][0, -1])
            ids.append(out.logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
    want = torch.stack(states).mean(0)
    settings = {"position": "generated_mean", "max_new_tokens": 4, "layer": layer}
    found = task_vector(model, tokenizer, rows, DataSpec(), normalize=False, **settings)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    unit = task_vector(model, tokenizer, rows, DataSpec(), **settings)
    torch.testing.assert_close(unit, want / want.norm(), rtol=0, atol=1e-5)
    last = task_vector(model, tokenizer, rows, DataSpec(), layer=layer, normalize=False)
    assert (last - want).abs().max() > 1e-3

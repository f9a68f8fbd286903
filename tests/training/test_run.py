"""`train` from a config to a run folder."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from io import StringIO
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from rich.console import Console
from tiny_models import make_tiny_gpt2, make_tiny_llama, make_tiny_tokenizer
from transformers import AutoModelForCausalLM

from headwater.config import load_config
from headwater.data.tasks import load_tasks
from headwater.errors import HeadwaterError
from headwater.training import run as training_run
from headwater.training import train
from headwater.training.folder import lock_folder
from headwater.training.gate_monitor import METRICS
from headwater.training.head_monitor import HEAD_METRICS
from headwater.training.history import History


def run(folder: Path, out: Path, *overrides: str):
    text = StringIO()
    config = load_config(folder / "run.yaml", [f"output_dir={out}", *overrides])
    return train(config, console=Console(file=text, width=200)), text.getvalue()


@pytest.fixture(scope="module")
def finished(folder):
    return run(folder, folder / "finished")


def weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "adapter_model.safetensors")


def test_results_have_the_schema(finished):
    result, _ = finished
    found = json.loads((result.output_dir / "results.json").read_text())
    assert found == result.results
    assert {key: type(value) for key, value in found.items()} == {
        "schema": int,
        "method": str,
        "base_model": str,
        "seed": int,
        "trainable_parameters": int,
        "steps": int,
        "train_seconds": float,
        "tokens_per_second": float,
        "tasks": dict,
        "mean": dict,
        "extra": dict,
    }
    assert (found["method"], found["seed"], found["steps"]) == ("rlora", 3, 12)
    assert found["tasks"]["colour"]["metric"] == "choice_accuracy"
    assert found["tasks"]["colour"]["n"] == 16
    assert found["tasks"]["copy"]["metric"] == "loss"
    assert found["tasks"]["copy"]["after"] < found["tasks"]["copy"]["before"]
    assert found["mean"] == {side: found["tasks"]["colour"][side] for side in ("before", "after")}
    extra = found["extra"]
    # weights 1 : 2 of 26 draws an epoch, 6.5 batches
    assert extra["realised_shares"]["copy"]["row_share"] == pytest.approx(2 / 3, abs=0.05)
    assert sum(share["tokens"] for share in extra["realised_shares"].values()) == extra["tokens"]
    assert extra["padding_share"] == 0
    assert extra["majority"] == {"colour": 0.5, "copy": None}
    low, high = extra["intervals"]["copy"]["after"]
    assert low <= found["tasks"]["copy"]["after"] <= high


def test_run_folder_is_complete_and_holds_nothing_half_written(finished):
    names = {path.name for path in finished[0].output_dir.iterdir()}
    assert names == {
        "adapter",
        "config.yaml",
        "results.json",
        "history.jsonl",
        "analysis.json",
        "report.html",
        "figures",
        "checkpoint-6",
        "checkpoint-12",
    }
    kinds = {path.suffix for path in finished[0].adapter_dir.iterdir()}
    assert kinds == {".json", ".safetensors", ".md"}
    assert load_config(finished[0].output_dir / "config.yaml").training["max_steps"] == 12


def test_history_has_every_log_and_evaluation(finished):
    lines = History(finished[0].output_dir / "history.jsonl").lines()
    train_lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == [2, 4, 6, 8, 10, 12]
    for line in train_lines:
        assert set(line) == {
            "kind",
            "step",
            "epoch",
            "loss",
            "task_losses",
            "learning_rate",
            "tokens_per_second",
            "grad_norm",
            *METRICS,
            *HEAD_METRICS,
        }
    evals = [line for line in lines if line["kind"] == "eval"]
    assert [(line["step"], line["tasks"]["colour"]["n"]) for line in evals] == [(0, 16), (4, 4), (8, 4), (12, 16)]
    assert evals[-1]["tasks"]["copy"]["value"] == finished[0].results["tasks"]["copy"]["after"]


def test_analysis_names_heads_and_routing(finished):
    analysis = json.loads((finished[0].output_dir / "analysis.json").read_text())
    assert len(analysis["head_similarity"]) == 6
    gates = analysis["routing"]["colour"]["model.layers.1.mlp.down_proj"]
    assert len(gates) == 3
    assert sum(gates) == pytest.approx(1, abs=1e-5)
    whole = analysis["gates"]["model.layers.1.mlp.down_proj"]
    assert sum(whole["load"]) == pytest.approx(1, abs=1e-5)
    assert whole["dead_experts"] == []


def test_plain_lines_tell_the_progress(finished):
    lines = finished[1].splitlines()
    assert "task copy: 10 training rows, 66.7% of draws; 10 test rows" in lines
    assert sum(line.startswith("step 8/12  loss ") for line in lines) == 1
    line = next(line for line in lines if line.startswith("step 12/12"))
    assert "tokens/s" in line
    assert "0:00 left" in line
    assert " colour " in line
    assert " copy " in line


def test_adapter_gives_the_same_logits_in_a_fresh_process(finished, folder, tmp_path):
    ids = torch.arange(40).reshape(2, 20)
    code = (
        "import torch, headwater; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(folder / 'base')!r}, dtype=torch.float32)\n"
        f"model = PeftModel.from_pretrained(base, {str(finished[0].adapter_dir)!r}).eval()\n"
        "with torch.no_grad(): logits = model(input_ids=torch.arange(40).reshape(2, 20)).logits\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    plain = base(input_ids=ids).logits.detach()
    model = PeftModel.from_pretrained(base, finished[0].output_dir / "checkpoint-12").eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    loaded = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(loaded, logits)
    assert not torch.allclose(loaded, plain)


def test_scoring_during_training_does_not_change_it(finished, folder, tmp_path):
    unscored, _ = run(folder, tmp_path, "training.eval_steps=null")
    expected = weights(finished[0].adapter_dir)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(unscored.adapter_dir).items())


def test_ctrl_c_saves_a_checkpoint_and_the_run_goes_on_from_it(finished, folder, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    append = History.append
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(self, entry):
        append(self, entry)
        if entry["kind"] == "train" and entry["step"] == 8:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(History, "append", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is handler
    assert (out / "checkpoint-9").is_dir()
    assert not (out / "adapter").exists()
    with pytest.raises(HeadwaterError, match="holds a run already"):
        run(folder, out)
    with (out / "history.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 10}\n{"kind": "tra')  # written after the checkpoint, and torn
    resumed, _ = run(folder, out, "training.resume_from_checkpoint=true")
    expected = weights(finished[0].adapter_dir)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed.adapter_dir).items())
    assert resumed.results["tasks"] == finished[0].results["tasks"]
    assert resumed.results["extra"]["tokens"] == finished[0].results["extra"]["tokens"]
    steps = [line["step"] for line in History(out / "history.jsonl").lines() if line["kind"] == "train"]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_a_folder_that_another_process_trains_in_is_left_alone(folder, tmp_path):
    (tmp_path / "history.jsonl").write_text("its own\n")
    short = ("training.max_steps=1", "training.eval_steps=null")
    with FileLock(tmp_path / ".lock"), pytest.raises(HeadwaterError, match="output_dir: another process trains in"):
        run(folder, tmp_path, *short)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "history.jsonl"]
    assert (tmp_path / "history.jsonl").read_text() == "its own\n"
    assert run(folder, tmp_path, *short)[0].results["steps"] == 1  # it has ended
    assert not (tmp_path / ".lock").exists()


def test_plain_lora_and_best_model(folder, tmp_path):
    result, _ = run(
        folder,
        tmp_path,
        "method={name: lora, r: 2, target_modules: [q_proj]}",
        "training.load_best_model_at_end=true",
        "training.save_steps=4",
        "training.report_to=tensorboard",
        "training.max_steps=8",
    )
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_metric"] == max(line["eval_mean"] for line in state["log_history"] if "eval_mean" in line)
    best = Path(state["best_model_checkpoint"])
    kept = weights(best)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(result.adapter_dir).items())
    analysis = json.loads((tmp_path / "analysis.json").read_text())
    assert analysis["head_similarity"] == {}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_trained_on(folder, tmp_path, monkeypatch, code):
    def flock(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock's, that it has a way of its own
        with lock_folder(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_a_run_that_ended_while_this_one_loaded_is_left_alone(folder, tmp_path, monkeypatch):
    load = training_run.load_base_model

    def slowly(*args, **options):
        (tmp_path / "results.json").write_text("its own")
        return load(*args, **options)

    monkeypatch.setattr(training_run, "load_base_model", slowly)
    with pytest.raises(HeadwaterError, match="holds a run already"):
        run(folder, tmp_path, "training.max_steps=1", "training.eval_steps=null")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("best", [{}, {"metric_for_best_model": None, "greater_is_better": None}])
def test_the_best_model_is_by_default_that_of_the_highest_mean(folder, tmp_path, best):
    """A key that is there without a value is one that is not there."""
    config = load_config(folder / "run.yaml", [f"output_dir={tmp_path}"])
    given = {**config.training, "load_best_model_at_end": True, "save_steps": 4, **best}
    args = training_run.training_arguments(config.model_copy(update={"training": given}))
    training_run._settle_best(args, given, load_tasks(config.tasks, config.base_dir))
    assert (args.metric_for_best_model, args.greater_is_better) == ("mean", True)


@pytest.mark.parametrize("name", ["colour", "eval_colour"])
def test_the_best_model_by_the_score_of_one_task(folder, name):
    """transformers looks for it under `eval_`, which it adds to names that do not begin so."""
    config = load_config(folder / "run.yaml")
    task = load_tasks(config.tasks, config.base_dir)[0]
    for given in (name, f"eval_{name}"):
        keys = {**config.training, "metric_for_best_model": given}
        args = training_run.training_arguments(config.model_copy(update={"training": keys}))
        training_run._settle_best(args, keys, [dataclasses.replace(task, name=name)])
        metric = args.metric_for_best_model
        assert (metric if metric.startswith("eval_") else f"eval_{metric}") == f"eval_{name}"


@pytest.mark.parametrize("metric", [None, "notes"])
def test_the_best_model_by_a_loss_is_that_of_the_lowest(folder, tmp_path, metric):
    tasks = json.dumps([{"name": "notes", "train": str(folder / "colour.jsonl"), "metric": "loss"}])
    tasks = tasks.replace('"metric"', f'"test": {json.dumps(str(folder / "colour.jsonl"))}, "metric"')
    keys = {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 1, "max_steps": 3, "learning_rate": 0.1}
    chosen = [f"training.metric_for_best_model={metric}"] if metric else []
    run(folder, tmp_path, f"tasks={tasks}", *(f"training.{key}={json.dumps(keys[key])}" for key in keys), *chosen)
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    losses = [line["eval_notes"] for line in state["log_history"] if "eval_notes" in line]
    assert len(set(losses)) == 3
    assert state["best_metric"] == min(losses)


def test_a_local_base_model_is_recorded_by_its_whole_path(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    short = ("training.max_steps=1", "training.eval_steps=null", "model_name_or_path=base")
    result, _ = run(folder, tmp_path, *short)
    for file, key in (("results.json", "base_model"), ("adapter/adapter_config.json", "base_model_name_or_path")):
        assert json.loads((tmp_path / file).read_text())[key] == str(folder / "base")
    assert load_config(tmp_path / "config.yaml").model_name_or_path == str(folder / "base")
    assert result.results["base_model"] == str(folder / "base")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.resume_from_checkpoint=true", "there is no checkpoint"),
        ("training.resume_from_checkpoint=nowhere", "nowhere is no checkpoint folder"),
        ("method.target_modules=[w_proj]", "w_proj"),
        ("method.target_modules=[q_proj, gate, up_prj]", "no layer of the model is called 'gate' or 'up_prj'"),
        ("method.modules_to_save=[lm_haed]", "method.modules_to_save: no layer of the model is called 'lm_haed'"),
        ("method.layers_to_transform=[99]", r"'up_proj'\] among layers \[99\]"),
        ("training={max_steps: 1, fsdp: full_shard, use_cpu: true}", "training: .*only works in distributed training"),
        ("training={max_steps: 1, metric_for_best_model: colours}", "no score is called 'colours'\n    one of: colour"),
        ("method={name: lora, target_modules: [w_proj]}", "w_proj"),
        ("method.r=64", "rank 64 is larger"),
        ("training.optim=adamw_apex_fused", "apex"),
        ("model_name_or_path=nowhere/at/all", "nowhere/at/all"),
    ],
)
def test_bad_input_is_a_headwater_error(folder, tmp_path, override, message):
    with pytest.raises(HeadwaterError, match=message):
        run(folder, tmp_path / "out", override)


@pytest.mark.parametrize("make", [make_tiny_llama, make_tiny_gpt2])
@pytest.mark.parametrize("which", ["train", "test", "validation", "choices", "generated"])
def test_rows_that_the_model_does_not_take_are_refused_before_anything_is_replaced(folder, tmp_path, make, which):
    """One task's rows of one kind have 71 tokens or more, and need a choice's or an answer's room besides."""
    make(max_position_embeddings=64).save_pretrained(tmp_path / "short")
    make_tiny_tokenizer().save_pretrained(tmp_path / "short")
    long = {"prompt": "x" * 70, "completion": " 1", **({"choices": [" 1", " 2"]} if which == "choices" else {})}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "results.json").write_text("an earlier run's")
    short = str(folder / ("colour.jsonl" if which == "choices" else "copy.jsonl"))
    task = {"name": "t", **dict.fromkeys(("train", "test", "validation"), short)}
    task |= {which if which in task else "test": str(tmp_path / "long.jsonl")}
    task |= {"metric": "exact_match"} if which == "generated" else {}
    settings = (f"model_name_or_path={tmp_path / 'short'}", "training.overwrite_output_dir=true", "method.name=lora",
                "method.target_modules=all-linear", "evaluation.max_new_tokens=4")  # fmt: skip
    said = "the row has 73 tokens, more than the model's 64"
    if which in ("choices", "generated"):
        said = "70 tokens of prompt and [24] of answer are more than the model's 64"
    with pytest.raises(HeadwaterError, match=said) as caught:
        run(folder, tmp_path / "out", f"tasks={json.dumps([task])}", *settings)
    assert caught.value.problems[0].where == f"{tmp_path / 'long.jsonl'}:1"
    assert (tmp_path / "out" / "results.json").read_text() == "an earlier run's"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "results.json"]
    if which == "validation":  # without evaluations during training they are not looked at
        run(folder, tmp_path / "out", f"tasks={json.dumps([task])}", *settings, "training.eval_steps=null",
            "training.max_steps=1")  # fmt: skip


def test_a_finished_run_is_only_replaced_when_asked(folder, tmp_path):
    short = ("training.max_steps=2", "training.eval_steps=null", "training.save_steps=1")
    run(folder, tmp_path, *short)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HeadwaterError, match="holds a run already"):
        run(folder, tmp_path, *short)
    overwrite = "training.overwrite_output_dir=true"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(HeadwaterError, match="its attention is 'eager'"):  # a run that cannot be replaces nothing
        run(folder, tmp_path, overwrite, "training.padding_free=true", "model.attn_implementation=eager")
    chain = "method={name: cola, r: 4, num_links: 2, knots: [99], target_modules: [up_proj]}"
    for steps in ("training.max_steps=2", "training.max_steps=-1"):  # 2 steps, and what the epochs have
        with pytest.raises(HeadwaterError, match=r"the last link would begin after step 99, but the run has \d+ steps"):
            run(folder, tmp_path, overwrite, chain, steps, "training.num_train_epochs=2")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    run(folder, tmp_path, overwrite, "training.max_steps=1", "training.save_strategy=no")
    assert not list(tmp_path.glob("checkpoint-*"))
    assert (tmp_path / "notes.txt").read_text() == "mine"

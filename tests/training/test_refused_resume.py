"""A resume that is refused, or fails, says why before anything is written; one that is granted is of the same run."""

import errno
import json
import os
import re
import resource
import shutil
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from full_disk import files_end_after
from rich.console import Console
from safetensors import safe_open
from transformers import TrainerCallback

from headwater.config import load_config
from headwater.errors import HeadwaterError
from headwater.report import write_report
from headwater.training import HeadwaterTrainer, train
from headwater.training import run as training_run
from headwater.training.folder import last_checkpoint
from headwater.training.history import History

THREE = (("colour", "colour"), ("copy", "copy"), ("new", "colour"))
RESUME = "training.resume_from_checkpoint=true"
SHORT = ("training.max_steps=4", "training.save_steps=2", "training.eval_steps=null", "training.logging_steps=1")


def run(folder: Path, out: Path, *overrides: str):
    config = load_config(folder / "run.yaml", [f"output_dir={out}", *SHORT, *overrides])
    return train(config, console=Console(file=StringIO(), width=200))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(folder):
    run(folder, folder / "kept")
    return folder / "kept"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tasks=[{name: x, train: colour.jsonl, test: colour.jsonl}]", "trained with tasks ['colour', 'copy']"),
        ("tasks.0.name=x", "this run has ['x', 'copy']"),
        ("seed=4", "trained with seed 3, this run has 4"),
        ("training.learning_rate=1", "trained with learning_rate 0.02, this run has 1"),
        ("training.lr_scheduler_type=linear", "trained with lr_scheduler_type cosine, this run has linear"),
        ("training.warmup_steps=2", "trained with warmup_steps 0.03, this run has 2"),
        ("training.optim=sgd", "trained with optim adamw_torch"),
        ("mixture.batching=by_length", "trained with batching mixed, this run has by_length"),
        ("align={kind: kl}", "trained with align none, this run has {"),
        ("model.dtype=bfloat16", "trained with dtype torch.float32, this run has torch.bfloat16"),
        ("method.lora_alpha=8", "trained with rlora lora_alpha 4, this run has rlora lora_alpha 8"),
        ("method.r=2", "trained with rlora r 4, this run has rlora r 2"),
        ("method={name: lora, r: 2}", "trained with rlora r 4, this run has lora r 2"),
        ("method.target_modules=[up_proj]", "target_modules"),
    ],
)
def test_other_settings_are_refused_and_nothing_changes(folder, finished, override, said):
    """Every difference is said, not only the first."""
    before = content(finished)
    equal = ["mixture.batching=mixed"] if override.startswith("align") else []  # else it draws balanced batches
    with pytest.raises(HeadwaterError) as caught:
        run(
            folder, finished, RESUME, "training.max_steps=6", "training.per_device_train_batch_size=8", override, *equal
        )
    assert said in str(caught.value)
    assert "batch_size 4, this run has 8" in str(caught.value)
    assert content(finished) == before


def test_a_resume_that_fails_changes_nothing(folder, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "checkpoint-4" / "optimizer.pt").write_bytes(b"torn")
    before = content(out)
    with pytest.raises(Exception, match=r"."):
        run(folder, out, RESUME, "training.max_steps=6")
    assert content(out) == before


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("optimizer.pt", "gone"),
        ("scheduler.pt", "gone"),
        ("rng_state.pth", "gone"),
        ("adapter_model.safetensors", "gone"),
        ("optimizer.pt", "torn"),
        ("rng_state.pth", "torn"),
        ("adapter_config.json", "torn"),
        ("adapter_model.safetensors", "torn"),
        ("optimizer.pt", "flipped"),  # PyTorch would load it
    ],
)
def test_a_checkpoint_without_one_of_its_files_is_refused(folder, finished, tmp_path, name, fault):
    """transformers goes on without an optimizer's state, a schedule or a random state, and says nothing."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    file = out / "checkpoint-4" / name
    data = bytearray(file.read_bytes())
    if fault == "torn":
        file.write_bytes(data[:-200])
    elif fault == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    before = content(out)
    with pytest.raises(HeadwaterError) as caught:
        run(folder, out, RESUME, "training.max_steps=6")
    (problem,) = caught.value.problems
    said = f"the checkpoint {file.parent} has no {name}" if fault == "gone" else f"{file} cannot be read: "
    assert problem.what.startswith(said)
    assert problem.fix == f"delete this checkpoint; left to go on from is {out / 'checkpoint-2'}"
    assert content(out) == before


@pytest.mark.parametrize("state", ["1", "{}", '{"global_step": null}'])
def test_a_checkpoint_of_a_damaged_state_is_refused(folder, finished, tmp_path, state):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    file = out / "checkpoint-4" / "trainer_state.json"
    file.write_text(state)
    before = content(out)
    with pytest.raises(HeadwaterError, match=re.escape(str(file.parent))):
        run(folder, out, f"training.resume_from_checkpoint={file.parent}", "training.max_steps=6")
    assert content(out) == before


def test_a_checkpoint_of_weights_alone_can_only_be_gone_on_from_when_it_has_all_steps(folder, tmp_path):
    sets = ("training.save_only_model=true", RESUME)
    run(folder, tmp_path / "out", sets[0])
    with pytest.raises(HeadwaterError, match=r"has no optimizer\.pt"):
        run(folder, tmp_path / "out", *sets, "training.max_steps=6")
    assert run(folder, tmp_path / "out", *sets).results["steps"] == 4


def test_the_best_model_is_that_of_a_run_which_was_not_stopped_after_its_last_step(folder, tmp_path):
    best = ("training.load_best_model_at_end=true", "training.metric_for_best_model=colour")
    # a loss is lowest at the end; taken for the higher the better, the first is the best
    sets = (*best, "training.greater_is_better=true", "training.eval_steps=2", "tasks.0.metric=loss")
    run(folder, tmp_path / "out", *sets)
    whole = (tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert whole == (tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "out").rename(tmp_path / "moved")
    run(folder, tmp_path / "moved", *sets, RESUME)
    assert (tmp_path / "moved" / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_the_best_model_may_be_in_the_folder_that_the_run_went_on_from(folder, tmp_path):
    first, out = tmp_path / "first", tmp_path / "out"
    sets = ("training.load_best_model_at_end=true", "training.eval_steps=2")
    run(folder, first, *sets)
    file = first / "checkpoint-4" / "trainer_state.json"
    best = {"best_metric": 9.0, "best_global_step": 2, "best_model_checkpoint": str(first / "checkpoint-2")}
    file.write_text(json.dumps({**json.loads(file.read_text()), **best}))
    run(folder, out, *sets, f"training.resume_from_checkpoint={file.parent}", "training.max_steps=6")
    whole = (first / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    run(folder, out, *sets, RESUME, "training.max_steps=6")
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_other_rows_are_refused_though_they_are_as_many_and_as_long(folder, finished, tmp_path):
    rows = (folder / "copy.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "copy.jsonl").write_text("".join([rows[1], rows[0], *rows[2:]]))
    before = content(finished)
    with pytest.raises(HeadwaterError) as caught:
        run(folder, finished, RESUME, "training.max_steps=6", f"tasks.1.train={tmp_path / 'copy.jsonl'}")
    (problem,) = caught.value.problems
    assert problem.what == "the training rows of task copy are not those that the checkpoint was trained on"
    assert content(finished) == before


def test_a_checkpoint_of_other_ranks_is_refused_for_them_and_not_for_its_files(folder, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    checkpoint = out / "checkpoint-4"  # as two ranks leave it
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"]["headwater"]["mixture"]["ranks"] = 2
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    with pytest.raises(HeadwaterError, match="trained with ranks 2, this run has 1"):
        run(folder, out, RESUME, "training.max_steps=6")


def test_a_longer_run_goes_on(folder, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    result = run(folder, out, RESUME, "training.max_steps=6", "training.save_steps=3", "training.logging_steps=2")
    assert result.results["steps"] == 6
    assert load_config(out / "config.yaml").training["max_steps"] == 6
    steps = [line["step"] for line in History(out / "history.jsonl").lines() if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 6]


def test_a_checkpoint_of_another_run_does_not_replace_a_finished_one(folder, finished, tmp_path):
    mine = tmp_path / "mine"
    run(folder, mine, "training.max_steps=2", "seed=5")
    before = content(mine)
    resume = f"training.resume_from_checkpoint={finished / 'checkpoint-2'}"
    with pytest.raises(HeadwaterError, match="checkpoint-2 is no checkpoint of the run that"):
        run(folder, mine, resume)
    assert content(mine) == before


def test_checkpoints_may_be_links_to_another_disk(folder, finished, tmp_path):
    out, disk = tmp_path / "out", tmp_path / "disk"
    shutil.copytree(finished, out)
    disk.mkdir()
    for checkpoint in list(out.glob("checkpoint-*")):
        (out / checkpoint.name).rename(disk / checkpoint.name)
        checkpoint.symlink_to(disk / checkpoint.name)
    assert run(folder, out, RESUME, "training.max_steps=6").results["steps"] == 6
    for link in (out / f"checkpoint-{n}" for n in (2, 4)):
        assert link.is_symlink()
    run(folder, out, "training.overwrite_output_dir=true")
    assert sorted(p.name for p in disk.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_a_batch_size_that_was_found_is_gone_on_with(folder, tmp_path, monkeypatch):
    compute, sizes = HeadwaterTrainer.compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        if len(inputs["completion_lengths"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        sizes.append(len(inputs["completion_lengths"]))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(HeadwaterTrainer, "compute_loss", compute_loss)
    sets = ("training.per_device_train_batch_size=4", "training.auto_find_batch_size=true")
    run(folder, tmp_path / "out", *sets)
    assert run(folder, tmp_path / "out", *sets, RESUME, "training.max_steps=6").results["steps"] == 6
    assert set(sizes) <= {1, 2}


def test_other_data_may_be_taken_where_that_is_asked_for(folder, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    sets = (RESUME, "training.max_steps=6", "seed=4")
    with pytest.raises(HeadwaterError, match="trained with seed"):
        run(folder, out, *sets)
    assert run(folder, out, *sets, "training.ignore_data_skip=true").results["steps"] == 6


def test_a_resumed_run_is_scored_before_training_on_the_test_rows_that_it_has(folder, finished, tmp_path):
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(finished, out)
    data.mkdir()
    few = (folder / "colour.jsonl").read_text().splitlines(keepends=True)[:3]
    (data / "few.jsonl").write_text("".join(few))
    sets = ("training.max_steps=6", f"tasks.0.test={data / 'few.jsonl'}")
    result = run(folder, out, RESUME, *sets)
    fresh = run(folder, tmp_path / "fresh", *sets)
    assert result.results["tasks"]["colour"]["n"] == 3
    assert {k: v["before"] for k, v in result.results["tasks"].items()} == {
        k: v["before"] for k, v in fresh.results["tasks"].items()
    }
    evals = [line for line in History(out / "history.jsonl").lines() if line["kind"] == "eval"]
    assert [line["step"] for line in evals] == [0, 4, 6]
    assert evals[0]["tasks"]["colour"]["n"] == 3


def test_a_task_that_is_new_in_a_resumed_run_is_scored_before_training(folder, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    tasks = "tasks=[" + ", ".join(f"{{name: {n}, train: {f}.jsonl, test: {f}.jsonl}}" for n, f in THREE) + "]"
    result = run(folder, out, RESUME, "training.max_steps=6", "training.ignore_data_skip=true", tasks)
    assert set(result.results["tasks"]) == {"colour", "copy", "new"}
    assert result.results["steps"] == 6


def test_a_checkpoint_goes_on_in_a_folder_of_its_own_without_anothers_history(folder, finished, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    lines = (finished / "history.jsonl").read_text().replace('"value": ', '"value": 9')
    (out / "history.jsonl").write_text(lines)  # of a run that was stopped before its first checkpoint
    result = run(folder, out, f"training.resume_from_checkpoint={finished / 'checkpoint-2'}")
    expected = json.loads((finished / "results.json").read_text())
    assert result.results["tasks"] == expected["tasks"]
    assert [line["step"] for line in History(out / "history.jsonl").lines()] == [0, 3, 4, 4]


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/headwater"])
def test_a_folder_that_cannot_be_made_is_said_before_anything_is_loaded(folder, tmp_path, where, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(training_run, "load_tasks", lambda *_: pytest.fail("the data were read first"))
    with pytest.raises(HeadwaterError, match=r"is a file, not a folder|cannot be made") as caught:
        run(folder, tmp_path / where)
    assert caught.value.problems[0].where == "output_dir"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_refused_run_leaves_no_folder_behind(folder, tmp_path):
    with pytest.raises(HeadwaterError):
        run(folder, tmp_path / "a" / "b", "method.r=64")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("room", [200, 3000, None])
def test_a_full_disk_is_said_and_the_last_checkpoint_is_good(folder, tmp_path, monkeypatch, room):
    """From step 3 on, files end after `room` bytes; with None in the optimiser's, which torch writes.

    The limit is one on the size of a file: writers meet it as they meet a full disk.
    """
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                adapter = (out / "checkpoint-2" / "adapter_model.safetensors").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (room or adapter + 1000, limits[1]))

    monkeypatch.setattr(training_run, "NotTwiceAtTheEnd", Full)
    if room is None:  # torch does not tell why it cannot write
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    try:
        with pytest.raises(HeadwaterError) as caught:
            run(folder, out, "training.logging_steps=100")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    text = str(caught.value)
    assert f"the run folder {out} cannot be written: " in text
    reasons = {200: "File too large", 3000: "File too large", None: "No space left on device"}
    assert reasons[room] in text
    assert f"the last whole checkpoint is {out / 'checkpoint-2'}" in text
    assert not (out / "checkpoint-4").exists()
    assert last_checkpoint(out) == out / "checkpoint-2"
    assert run(folder, out, RESUME).results["steps"] == 4


def test_an_adapter_that_does_not_fit_leaves_no_half_of_it(folder, tmp_path, monkeypatch):
    save = training_run.HeadwaterTrainer.save_model

    def full(trainer, output_dir=None, **options):
        if not str(output_dir).endswith(".adapter"):
            return save(trainer, output_dir, **options)
        Path(output_dir).mkdir()
        (Path(output_dir) / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(training_run.HeadwaterTrainer, "save_model", full)
    with pytest.raises(HeadwaterError, match="cannot be written: No space left"):
        run(folder, tmp_path / "out")
    assert last_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-4"
    assert not [path.name for path in (tmp_path / "out").iterdir() if "adapter" in path.name]


@pytest.mark.parametrize("saved", ["no", "steps"])
def test_a_report_that_does_not_fit_leaves_a_whole_run(folder, tmp_path, monkeypatch, saved):
    out = tmp_path / "out"

    def full(output):
        with files_end_after(100):
            return write_report(output)

    monkeypatch.setattr("headwater.report.write_report", full)
    with pytest.raises(HeadwaterError) as caught:
        run(folder, out, f"training.save_strategy={saved}")
    (problem,) = caught.value.problems
    assert problem.what == f"the run in {out} is whole but for its report, which cannot be written: File too large"
    assert problem.fix == f"put that right, then write it: headwater report {out}"
    assert json.loads((out / "results.json").read_text())["steps"] == 4
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert write_report(out).is_file()


def test_a_checkpoint_written_anew_and_not_to_its_end_is_not_gone_on_from(folder, finished, tmp_path, monkeypatch):
    """The state of the old checkpoint must not vouch for the half of the new one."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)

    def killed(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run.HeadwaterTrainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, f"training.resume_from_checkpoint={out / 'checkpoint-2'}")
    monkeypatch.undo()
    assert last_checkpoint(out) == out / "checkpoint-2"
    with safe_open(out / "checkpoint-2" / "adapter_model.safetensors", "pt") as file:
        assert list(file.keys())

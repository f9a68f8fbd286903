"""What cannot be trained or scored is refused at once and by its own name, in a new run and in a resumed one."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from headwater.config import load_config
from headwater.errors import HeadwaterError
from headwater.evaluation.scoring import sample
from headwater.training import HeadwaterArguments, train
from headwater.training import trainer as trainer_module

SHORT = ("training.max_steps=2", "training.save_steps=1", "training.eval_steps=null")
SIZE = "training.per_device_train_batch_size=64"


def run(folder: Path, out: Path, *overrides: str):
    config = load_config(folder / "run.yaml", [f"output_dir={out}", *SHORT, *overrides])
    return train(config, console=Console(file=StringIO(), width=200))


@pytest.fixture(scope="module")
def stopped(folder):
    """A run with a checkpoint to go on from."""
    run(folder, folder / "stopped")
    return folder / "stopped"


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("mixture.batching=homogeneous", "1 draws cannot hold all of 2 tasks"),
        ("training.dataloader_drop_last=true", "26 training rows do not fill one batch of 64"),
    ],
)
def test_a_batch_that_is_too_large_is_no_fault_of_the_schedule_or_the_checkpoint(
    folder, stopped, tmp_path, resumed, override, said
):
    out = stopped if resumed else tmp_path / "out"
    resume = ["training.resume_from_checkpoint=true"] if resumed else []
    with pytest.raises(HeadwaterError) as caught:
        run(folder, out, SIZE, override, "training.max_steps=4", *resume)
    (problem,) = caught.value.problems
    assert (problem.where, problem.what) == ("training.per_device_train_batch_size", said)
    assert "use a smaller batch size" in problem.fix
    assert (stopped / "checkpoint-2").is_dir()
    assert not list(tmp_path.glob("out/*"))


def test_the_few_rows_that_are_scored_during_training_are_looked_at_by_themselves(folder, tmp_path):
    """Two of ten are scored then, and just these are too long; all ten are scored before and after."""
    rows = [{"prompt": f"say {i}:", "completion": f" {i}"} for i in range(10)]
    for row in sample(rows, 2):
        row["prompt"] = "x" * 50
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [f"tasks=[{{name: t, train: copy.jsonl, test: {tmp_path / 'few.jsonl'}}}]", "data.on_too_long=drop",
            "data.max_length=20", "evaluation.max_rows_during_training=2"]  # fmt: skip
    with pytest.raises(HeadwaterError, match="no row has a token to score: 2 of 2 are too long"):
        run(folder, tmp_path / "out", *sets, "training.eval_steps=1")
    assert not (tmp_path / "out").exists()
    assert run(folder, tmp_path / "out", *sets).results["tasks"]["t"]["n"] == 8


@pytest.mark.parametrize("resumed", [False, True])
def test_what_the_loader_itself_refuses_is_said_of_the_settings(folder, stopped, tmp_path, monkeypatch, resumed):
    def loader(*args, **options):
        raise ValueError("not such a loader")

    monkeypatch.setattr(trainer_module, "DataLoader", loader)
    out = stopped if resumed else tmp_path / "out"
    with pytest.raises(HeadwaterError) as caught:
        run(folder, out, *(["training.resume_from_checkpoint=true"] if resumed else []))
    (problem,) = caught.value.problems
    assert (problem.where, problem.what, problem.fix) == ("training", "not such a loader", "")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"dataloader_persistent_workers": True}, "training.dataloader_persistent_workers: there are no workers"),
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0}, "dataloader_prefetch_factor is at least 1"),
    ],
)
def test_workers_that_torch_would_refuse_are_refused_with_the_arguments(tmp_path, keys, said):
    with pytest.raises(HeadwaterError, match=said):
        HeadwaterArguments(output_dir=str(tmp_path), use_cpu=True, **keys)
    kept = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
    HeadwaterArguments(output_dir=str(tmp_path), use_cpu=True, **kept)

"""What is scored and saved where an epoch ends, or training ends within one."""

import os
import signal
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from headwater.config import load_config
from headwater.training import HeadwaterTrainer, train
from headwater.training.history import History
from headwater.training.interrupt import SaveOnInterrupt

EPOCHS = ("training.eval_steps=null", "training.eval_strategy=epoch", "training.save_strategy=epoch")
"""Of 26 rows in batches of 4: 7 steps each."""


def run(folder: Path, out: Path, *overrides: str):
    config = load_config(folder / "run.yaml", [f"output_dir={out}", *overrides])
    return train(config, console=Console(file=StringIO(), width=200))


def scored(out: Path) -> list[tuple[int, int]]:
    """Steps of the evaluations, and on how many rows the first task was scored."""
    lines = History(out / "history.jsonl").lines()
    return [(line["step"], line["tasks"]["colour"]["n"]) for line in lines if line["kind"] == "eval"]


@pytest.fixture
def saved(monkeypatch):
    """The steps at which a checkpoint is written."""
    steps, save = [], HeadwaterTrainer._save_checkpoint

    def note(self, *args):
        steps.append(self.state.global_step)
        save(self, *args)

    monkeypatch.setattr(HeadwaterTrainer, "_save_checkpoint", note)
    return steps


@pytest.mark.parametrize("length", [("num_train_epochs=2", "max_steps=-1"), ("max_steps=10",)])
def test_the_last_epoch_is_scored_once(folder, tmp_path, saved, length):
    result = run(folder, tmp_path / "out", *EPOCHS, *(f"training.{key}" for key in length))
    last = result.results["steps"]
    assert scored(tmp_path / "out") == [(0, 16), (7, 4), (last, 16)]
    assert saved == [7, last]


def test_the_choice_of_the_best_model_needs_the_last_one_too(folder, tmp_path):
    best = ("training.load_best_model_at_end=true", "training.max_steps=10")
    run(folder, tmp_path / "out", *EPOCHS, *best)
    assert scored(tmp_path / "out") == [(0, 16), (7, 4), (10, 4), (10, 16)]


@pytest.mark.parametrize(
    ("kind", "step", "settings", "then"),
    [
        ("train", 8, EPOCHS, ([(0, 16), (7, 4)], [7, 9])),  # within an epoch: no evaluation, and saved once
        ("eval", 7, ("training.eval_steps=7", "training.save_strategy=no"), ([(0, 16), (7, 4)], [7])),  # at its end
    ],
)
def test_ctrl_c_scores_nothing_and_saves_once(folder, tmp_path, monkeypatch, saved, kind, step, settings, then):
    """Where it comes during the evaluation after an epoch's last step, no further step is taken."""
    append = History.append

    def interrupt(self, entry):
        append(self, entry)
        if (entry["kind"], entry["step"]) == (kind, step):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(History, "append", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", *settings)
    assert (scored(tmp_path / "out"), saved) == then


def test_what_an_epoch_asks_for_is_saved_unless_its_step_is_saved_already():
    callback, state = SaveOnInterrupt(), SimpleNamespace(global_step=7)

    def at_the_end(**asked):
        control = SimpleNamespace(
            **{"should_save": False, "should_evaluate": True, "should_training_stop": False} | asked
        )
        callback.on_epoch_end(None, state, control)
        return control.should_save, control.should_evaluate, control.should_training_stop

    assert at_the_end(should_save=True) == (True, True, False)  # nobody pressed Ctrl-C
    callback._ask(signal.SIGINT, None)
    assert at_the_end(should_save=True) == at_the_end() == (True, False, True)
    callback.on_save(None, state, None)
    assert at_the_end(should_save=True) == (False, False, True)

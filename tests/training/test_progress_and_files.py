"""What a run shows and writes while it goes."""

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from headwater.errors import HeadwaterError
from headwater.evaluation.scores import TaskScore
from headwater.training import HeadwaterArguments
from headwater.training.history import History
from headwater.training.progress import ProgressDisplay, duration
from headwater.training.table import show_scores

LOG = {"loss": 1.5, "tokens_per_second": 1234.0, "task_loss/a": 1.0, "task_loss/b": 2.0}


def show(*, terminal: bool, quiet_bars: bool = False) -> str:
    text = StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, color_system=None)
    display = ProgressDisplay(console)
    args = SimpleNamespace(disable_tqdm=quiet_bars)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=40, global_step=0)
    display.scoring("a", 5, 10)
    display.scored({"a": TaskScore("a", "exact_match", 0.25, 10, None, [])}, 0)
    display.on_train_begin(args, state, None)
    state.global_step = 20
    display.on_step_end(args, state, None)
    display.on_log(args, state, None, LOG)
    display.on_log(args, state, None, {"eval_mean": 0.5})
    display.on_train_end(args, state, None)
    display.close()
    return text.getvalue()


def test_plain_lines_without_a_terminal():
    lines = show(terminal=False).splitlines()
    assert lines[0] == "step 0  scores  a 0.250"
    assert lines[1].startswith("step 20/40  loss 1.5000  1,234 tokens/s  0:0")
    assert lines[1].endswith("left  a 1.0000  b 2.0000")
    assert len(lines) == 2


def test_live_display_on_a_terminal():
    text = show(terminal=True)
    last = text[text.rindex("task") :]
    for part in ("20/40", "loss 1.5000", "1,234 tokens/s", "a     1.0000  0.250", "b     2.0000"):
        assert part in last
    assert "step 20/40" not in text


def test_disable_tqdm_means_plain_lines():
    assert "step 20/40  loss" in show(terminal=True, quiet_bars=True)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3661.2, "1:01:01")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_history_survives_a_torn_line_and_non_finite_numbers(tmp_path):
    history = History(tmp_path / "history.jsonl")
    history.start()
    history.append({"kind": "train", "step": 1, "loss": float("nan")})
    history.append({"kind": "train", "step": 2, "loss": 1.0})
    with history.path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert history.lines() == [
        {"kind": "train", "step": 1, "loss": None},
        {"kind": "train", "step": 2, "loss": 1.0},
    ]
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    history.start(checkpoint)
    history.append({"kind": "eval", "step": 2, "tasks": {}})
    assert [line["step"] for line in history.lines()] == [1, 2]


def test_scores_come_back_from_the_history(tmp_path):
    history = History(tmp_path / "history.jsonl")
    score = TaskScore("a", "exact_match", 0.25, 4, 0.5, [0.0, 1.0, 0.0, 0.0], {"interval": [0.1, 0.6], "more": 1})
    history.append_scores(0, {"a": score}, {"a": "some rows"})
    known = {"a": TaskScore("a", "exact_match", 0.25, 4, 0.5, [], {"interval": [0.1, 0.6]})}
    assert history.scores(0, {"a": "some rows"}) == known
    assert history.scores(3, {"a": "some rows"}) == {}
    assert history.scores(0, {"a": "others"}) == {}
    assert history.scores(0, {"a": "some rows", "b": "more"}) == {}
    assert history.scores(0, {"b": "more"}) == {}
    history.append_scores(0, {"a": score}, {})  # of a part of the rows
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    history.start(checkpoint, {"b": "more"})
    assert [line["tasks"]["a"]["rows"] for line in history.lines()] == [None]


def test_the_table_says_what_is_measured_and_a_sinking_loss_is_a_gain():
    results = {
        "steps": 10,
        "train_seconds": 61.2,
        "tasks": {
            "a": {"metric": "choice_accuracy", "n": 200, "before": 0.5, "after": 0.875},
            "b": {"metric": "loss", "n": 220, "before": 2.5, "after": 1.0},
        },
        "mean": {"before": 0.5, "after": 0.875},
        "extra": {"majority": {"a": 0.5, "b": None}},
    }
    console = Console(file=StringIO(), width=160, record=True)
    show_scores(results, console)
    lines = console.export_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines if "│" in line]
    assert ["a", "choice_accuracy", "200", "0.500", "0.500", "0.875", "+0.375"] in cells
    assert ["b", "loss", "220", "", "2.500", "1.000", "+1.500"] in cells
    assert ["mean", "", "", "", "0.500", "0.875", "+0.375"] in cells
    assert "10 steps in 61 s of training" in lines[-1]


def test_a_run_without_test_rows_says_so():
    console = Console(file=StringIO(), width=160, record=True)
    ProgressDisplay(console).scored({}, 0)
    show_scores({"steps": 3, "train_seconds": 0.4, "tasks": {}, "mean": {"after": None}, "extra": {}}, console)
    said = "no task has test rows, so nothing was scored\n3 steps in 0 s of training\n"
    assert console.export_text() == said


def test_argument_defaults(tmp_path):
    args = HeadwaterArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.lr_scheduler_type, args.loss_normalization) == (2e-4, "cosine", "example")
    assert args.get_warmup_steps(1000) == 30
    assert args.remove_unused_columns is False
    assert args.eval_strategy == "no"
    assert HeadwaterArguments(output_dir=str(tmp_path), use_cpu=True, eval_steps=5).eval_strategy == "steps"
    with pytest.raises(HeadwaterError, match="example, token, not 'row'"):
        HeadwaterArguments(output_dir=str(tmp_path), use_cpu=True, loss_normalization="row")

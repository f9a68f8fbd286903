"""Ctrl-C: what is printed goes on exactly where the run stopped."""

import functools
import shlex
import signal
import sys

import pytest
from cli_support import run_main, write_run
from safetensors.torch import load_file

from headwater.cli.console import show_error
from headwater.cli.train import RESUME
from headwater.errors import HeadwaterError, Problem
from headwater.training.progress import ProgressDisplay


@pytest.fixture
def headwater(capsys):
    return functools.partial(run_main, capsys)


def ctrl_c_at(monkeypatch, step):
    original = ProgressDisplay.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ProgressDisplay, "on_step_end", on_step_end)


def test_the_printed_command_finishes_the_run_as_if_never_stopped(headwater, tmp_path, monkeypatch):
    path = write_run(tmp_path)
    with monkeypatch.context() as patch:
        ctrl_c_at(patch, step=3)
        stopped = headwater("train", path, "--set", "method={name: rlora, r: 2}", "--set", "seed=5")
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    command = shlex.split(stopped.err.strip().splitlines()[-1].removeprefix("stopped; resume with: "))
    assert command[:3] == ["headwater", "train", str(path)]
    assert headwater(*command[1:]).code == 0
    whole = headwater("train", path, *command[3:7], "--set", f"output_dir={tmp_path / 'whole'}")
    assert whole.code == 0
    resumed, straight = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("run", "whole"))
    assert resumed.keys() == straight.keys()
    assert all(resumed[name].equal(straight[name]) for name in straight)


def test_before_the_first_checkpoint_there_is_nothing_to_resume(headwater, tmp_path, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("headwater.training.train", interrupted)
    done = headwater("train", write_run(tmp_path))
    assert done.code == 130
    assert done.err.strip() == "stopped; no checkpoint had been saved yet"


def test_the_demo_passes_its_arguments_on_and_says_how_to_resume(headwater, tmp_path, monkeypatch):
    asked = []

    def run_demo(output_dir, overrides, *, console):
        asked.append((output_dir, list(overrides)))
        (tmp_path / "out" / "checkpoint-3").mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("headwater.demo.run_demo", run_demo)
    done = headwater("demo", "--output-dir", tmp_path / "out", "--set", "training.max_steps=9")
    assert asked == [(str(tmp_path / "out"), ["training.max_steps=9"])]
    command = f"headwater demo --output-dir {tmp_path / 'out'} --set training.max_steps=9 --set {RESUME}"
    assert (done.code, done.err.strip()) == (130, f"stopped; resume with: {command}")
    again = headwater("demo", "--output-dir", tmp_path / "out", "--set", RESUME)
    assert again.err.count(RESUME) == 1


def test_a_terminal_gets_a_panel_with_nothing_lost(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    show_error(HeadwaterError(Problem("[bold] is text", "run.yaml:3: a[0].b", "write it out")))
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("1 problem", "run.yaml:3: a[0].b", "[bold] is text", "write it out", "╭"))


@pytest.mark.parametrize("terminal", [True, False])
def test_every_problem_is_shown(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    show_error(HeadwaterError(*(f"problem {i}" for i in range(60))))
    shown = capsys.readouterr().err
    assert all(f"problem {i}" in shown for i in range(60))

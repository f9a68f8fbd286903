"""Commands that write, where there is no room: an error that names the file, and nothing half written."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import run_main, write_run
from compose.pool_support import MLP, make_pool
from full_disk import files_end_after


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pool of two adapters with its tasks, and a trained run."""
    folder = tmp_path_factory.mktemp("made")
    make_pool(folder, {name: {"r": 4, "lora_alpha": 8, "target_modules": MLP} for name in ("a", "b")})
    rows = [{"prompt": f"a{i}", "completion": " b", "choices": [" a", " b"]} for i in range(4)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.yaml").write_text("tasks: [{name: a, train: a.jsonl, test: a.jsonl}]")
    (folder / "trained").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_run(folder / "trained")
        from headwater.cli import main

        with pytest.raises(SystemExit) as caught:
            main(["train", str(folder / "trained" / "run.yaml"), "--set", "training.max_steps=1"])
        assert not caught.value.code
    return folder


def files_below(folder):
    """All files but locks, with what they hold."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("pool create new --model base", "new/base.json"),
        ("pool add pool a --name c", "pool/adapters/c"),
        ("pool remove pool a", "pool/pool.json"),
        ("pool merge pool --adapter a=1 -o out", "out"),
        ("pool flow pool --tasks tasks.yaml --epochs 1 -o out", "out"),
        ("pool hub pool --tasks tasks.yaml --budget 2 -o out", "out"),
        ("pool arrow pool --tasks tasks.yaml -o out", "out"),
        ("pool evaluate pool --tasks tasks.yaml --way base --scores scores.json", "scores.json"),
        ("evaluate trained/run --output scores.json", "scores.json"),
        ("export trained/run --per-task -o out", "out"),
        ("conflict trained/run", "trained/run/conflict.json"),
        ("report trained/run", "trained/run/figures/"),
    ],
)
def test_no_room(made, tmp_path, capsys, monkeypatch, command, named):
    here = tmp_path / "here"
    shutil.copytree(made, here)
    before, folders = files_below(here), {path for path in here.rglob("*") if path.is_dir()}
    monkeypatch.chdir(here)
    arguments = command.split()
    if arguments[:2] == ["pool", "add"]:
        arguments[3] = str(here / "a")
    with files_end_after(100):
        done = run_main(capsys, *arguments)
    assert done.code == 2, done.err
    assert "this cannot be written: " in done.err
    assert "File too large" in done.err
    assert f"error: {named}" in done.err.replace(f"{here}/", "")
    assert files_below(here) == before
    assert {path for path in here.rglob("*") if path.is_dir()} - folders <= {here / "new"}


@pytest.mark.parametrize("unbuffered", [True, False])
def test_no_room_for_what_is_printed(unbuffered):
    """Python says on its own, and with another exit code, what it could not write as it ended."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    command = [sys.executable, *(["-u"] if unbuffered else []), "-m", "headwater", "methods", "--json"]
    with full.open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "error: standard output or a temporary file: this cannot be written: No space left on device",
        "    make room",
    ]


def test_no_room_and_no_output(monkeypatch, capsys):
    """With standard output closed, as by `>&-`, Python has none."""

    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/file")

    module = importlib.import_module("headwater.cli.entry")
    monkeypatch.setattr(module, "app", full)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as caught:
        module.main([])
    assert caught.value.code == 2
    assert "/full/file: this cannot be written: No space left on device" in capsys.readouterr().err

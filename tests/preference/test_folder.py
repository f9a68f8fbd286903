"""Folders of `headwater prefer` that hold another command's run, or one that another process has made meanwhile."""

import contextlib

import pytest

from headwater.errors import HeadwaterError
from headwater.preference import run as prefer

from .test_prefer import invoke, write_run

HELD = [
    "adapter/adapter_config.json",
    "results.json",
    "comparison.json",
    "generator/generator.json",
    "collect/animals/collected.json",
    "checkpoint-2/trainer_state.json",
]


@pytest.fixture
def run_file(tmp_path):
    return write_run(tmp_path)


def held_by(folder, name):
    """The folder with one file of another run and one of the user's."""
    for path in (folder / name, folder / "notes.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return {folder / name, folder / "notes.txt"}


def files_of(folder):
    return {path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_of_another_command_is_not_written_over(run_file, monkeypatch, capsys, held, resumed):
    monkeypatch.setattr(prefer, "load_to_run", lambda *_, **__: pytest.fail("this comes too late"))
    out = run_file.parent / "out"
    before = held_by(out, held)
    asked = ["--set", "training.resume_from_checkpoint=true"] if resumed else []
    code, _, err = invoke(capsys, run_file, *asked)
    name = held.rpartition("/")[0] if held.startswith("collect") else held.split("/")[0]
    said = f"{run_file}:17: output_dir: {out} holds a run of another command ({name})"
    assert (code, said in " ".join(err.split())) == (2, True), err
    assert "or replace it (training.overwrite_output_dir: true)" in " ".join(err.split())
    assert "go on with it" not in err
    assert files_of(out) == before


@pytest.mark.parametrize("held", HELD)
def test_it_is_replaced_when_asked(run_file, monkeypatch, capsys, held):
    def far_enough(*_):
        raise HeadwaterError("far enough")

    monkeypatch.setattr(prefer, "_base_scores", far_enough)
    out = run_file.parent / "out"
    held_by(out, held)
    _, _, err = invoke(capsys, run_file, "--set", "training.overwrite_output_dir=true")
    assert "far enough" in err
    assert files_of(out) == {out / "notes.txt", out / "prefer.yaml", out / "config.yaml"}


def test_the_file_that_is_kept_names_the_models_of_sources_for_good(run_file, monkeypatch, tmp_path, capsys):
    def far_enough(*_):
        raise HeadwaterError("far enough")

    monkeypatch.setattr(prefer, "_base_scores", far_enough)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    source = "    - {name: m, kind: log_likelihood, model: model}\n"
    run_file.write_text(run_file.read_text().replace("  strategies:", f"{source}  strategies:"))
    assert "far enough" in invoke(capsys, run_file)[2]
    kept = (run_file.parent / "out" / "prefer.yaml").read_text()
    assert f"    model: {run_file.parent / 'model'}\n" in kept


def test_a_run_that_another_process_has_made_meanwhile_is_left_alone(run_file, monkeypatch, capsys):
    out, lock = run_file.parent / "out", prefer.lock_folder

    @contextlib.contextmanager
    def later(folder):
        with lock(folder):
            (out / "results.json").write_text("{}")
            yield

    monkeypatch.setattr(prefer, "lock_folder", later)
    code, _, err = invoke(capsys, run_file)
    assert (code, f"{out} holds a run of another command (results.json)" in " ".join(err.split())) == (2, True), err
    assert files_of(out) == {out / "results.json"}

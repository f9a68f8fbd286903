"""The folder of `headwater meta`: which run is gone on with in it, and which is refused or replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from headwater.cli import main
from headwater.generate import study


def meta(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["meta", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_generator_trained_on_other_task_vectors_is_refused_and_the_run_stays_as_it_was(
    finished, meta_folder, tmp_path, capsys
):
    output = shutil.copytree(finished, tmp_path / "run")
    before = contents(output)
    asked = ["train", meta_folder / "meta.yaml", "--set", f"output_dir={output}"]
    code, _, err = meta(capsys, *asked, "--set", "meta.task_vector.layer=1")
    assert code == 2
    assert f"{output / 'state' / 'generator'}: holds the state of another training" in err
    assert "task_vector differ" in err
    assert contents(output) == before
    whole = json.loads((output / "results.json").read_text())
    shutil.rmtree(output / "state")  # as the error says
    assert meta(capsys, *asked, "--set", "meta.task_vector.layer=1")[0] == 0
    other = json.loads((output / "results.json").read_text())
    assert other["extra"]["distance"] != whole["extra"]["distance"]
    saved = json.loads((output / "generator" / "generator.json").read_text())
    assert saved["vector"]["layer"] == 1


def test_without_leave_one_out_the_states_of_generators_left_out_do_not_matter(finished, meta_folder, tmp_path, capsys):
    output = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(output / "state" / "generator")
    asked = ["train", meta_folder / "meta.yaml", "--set", f"output_dir={output}", "--set", "meta.beta=0.5"]
    code, _, err = meta(capsys, *asked, "--set", "meta.leave_one_out=true")
    assert (code, "generator-without-animals: holds the state of another training" in err) == (2, True), err
    assert not (output / "state" / "generator").exists()
    code, _, err = meta(capsys, *asked)
    assert code == 0, err


@pytest.mark.parametrize("command", ["collect", "train"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_tasks_that_are_not_trained_or_not_scored_are_refused_before_anything_is_collected(
    meta_folder, tmp_path, capsys, command, split
):
    sets = ["--set", f"tasks.1.{split}=null", "--set", f"output_dir={tmp_path / 'run'}"]
    code, _, err = meta(capsys, command, meta_folder / "meta.yaml", *sets)
    said = " ".join(err.split())
    assert (code, f"meta.yaml:3: tasks: colours has no `{split}` rows" in said) == (2, True), err
    assert f"give the task a `{split}`" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["collect", "train"])
@pytest.mark.parametrize(
    "held",
    [
        "adapter/adapter_config.json",
        "results.json",
        "comparison.json",
        "prefer.yaml",
        "checkpoint-2/trainer_state.json",
    ],
)
def test_a_run_of_another_command_is_not_written_over(meta_folder, tmp_path, capsys, monkeypatch, command, held):
    monkeypatch.setattr(study, "load_base_model", lambda *_, **__: pytest.fail("this comes too late"))
    output = tmp_path / "run"
    (output / held).parent.mkdir(parents=True)
    (output / held).write_text("its own")
    code, _, err = meta(capsys, command, meta_folder / "meta.yaml", "--set", f"output_dir={output}")
    said = " ".join(err.split())
    assert (code, f"output_dir: {output} holds a run of another command ({held.split('/')[0]})" in said) == (2, True), (
        err
    )
    assert contents(output) == {output / held: b"its own"}


def test_a_finished_run_of_this_command_is_gone_on_with(finished, meta_folder, capsys):
    before = (finished / "results.json").read_bytes()
    code, out, err = meta(capsys, "train", meta_folder / "meta.yaml", "--set", "meta.leave_one_out=true")
    assert code == 0, err
    assert out.count("collected already") == 2
    assert (finished / "results.json").read_bytes() == before


def test_headwater_train_replaces_it_only_when_asked_and_its_report_is_then_the_new_run_s(
    finished, meta_folder, tmp_path, capsys
):
    output = shutil.copytree(finished, tmp_path / "run")
    config = (finished / "config.yaml").read_text()
    (tmp_path / "run.yaml").write_text(config.partition("\nmeta:")[0])
    (output / "adapters" / "mine").mkdir()
    sets = [part for value in (f"output_dir={output}", "training.max_steps=1") for part in ("--set", value)]
    train = ["train", str(tmp_path / "run.yaml"), *sets]
    before = contents(output)
    with pytest.raises(SystemExit) as caught:
        main(train)
    assert caught.value.code == 2
    held = "results.json, generator, collect/animals, collect/colours"
    assert f"{output} holds a run already ({held})" in " ".join(capsys.readouterr().err.split())
    assert contents(output) == before
    for command in ([*train, "--set", "training.overwrite_output_dir=true"], ["report", str(output)]):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert not caught.value.code
        assert "headwater run report" in (output / "report.html").read_text()
    left = {path.name for path in output.iterdir()}
    assert not left & {"generator", "collect", "state", "task_vectors.safetensors"}
    assert (output / "adapters" / "mine").is_dir()

"""What is written is there whole or not at all, readable as other files are, and an error names it."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from full_disk import files_end_after
from safetensors.torch import save_file

from headwater.errors import HeadwaterError
from headwater.files import (
    NotWritten,
    check_file,
    replace_folder,
    whole_folder,
    why_not_written,
    write_json,
    write_text,
)
from headwater.methods.files import write_tensors
from headwater.training.write_errors import whole_or_gone

TENSORS = {"a": torch.zeros(1000)}


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": (1.0, float("inf"))})
    assert json.loads(path.read_text()) == {"a": [1.0, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    write_text(tmp_path / "y", "text")
    for name, text in (("old", "1"), ("new", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "x.json", "y"]
    assert json.loads(path.read_text()) == {"a": [1.0, None]}


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_what_it_points_to_is_written(tmp_path, there):
    file, folder = tmp_path / "elsewhere" / "real.json", tmp_path / "elsewhere" / "real"
    file.parent.mkdir()
    if there:
        file.write_text("old")
        folder.mkdir()
    (tmp_path / "x.json").symlink_to("elsewhere/real.json")
    (tmp_path / "made").symlink_to("elsewhere/real", target_is_directory=True)
    write_json(tmp_path / "x.json", {"a": 1})
    in_a_whole_folder(tmp_path / "made")
    for name in ("x.json", "made"):
        assert (tmp_path / name).is_symlink()
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]
    assert sorted(path.name for path in file.parent.iterdir()) == ["real", "real.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "made", "x.json"]


def test_a_pipe_is_written_into_and_stays_one(tmp_path):
    """As `/dev/stdout` and other devices, which nothing may take the place of."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        try:
            write_text(tmp_path / name, "text")
            assert os.read(reader, 100) == b"text"
        finally:
            os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_tensors_are_as_readable_as_other_files(tmp_path, umask):
    """safetensors makes files for their owner alone, and Python temporary folders."""
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_text("x")
        (tmp_path / "folder").mkdir()
        write_tensors(TENSORS, tmp_path / "single.safetensors", {})
        with whole_folder(tmp_path / "whole") as work:
            (work / "below").mkdir()
            save_file(TENSORS, work / "below" / "a.safetensors")
        checkpoint = tmp_path / "checkpoint-1"
        with whole_or_gone(checkpoint):
            checkpoint.mkdir()
            save_file(TENSORS, checkpoint / "a.safetensors")
            (checkpoint / "trainer_state.json").write_text("{}")
    finally:
        os.umask(before)
    written = (tmp_path / "single.safetensors", tmp_path / "whole/below/a.safetensors", checkpoint / "a.safetensors")
    assert {mode(path) for path in written} == {mode(tmp_path / "plain")}
    assert mode(tmp_path / "whole") == mode(tmp_path / "folder")


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    replace = Path.replace

    def fails(self, target):
        if self == new:
            raise OSError(errno.EIO, "broken disk")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        with pytest.raises(OSError, match="broken disk"):
            replace_folder(new, old)
    assert (old / "name").read_text() == "old"
    replace_folder(new, old)
    assert (old / "name").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_file_to_be_written_is_looked_for_where_its_link_leads(tmp_path):
    lost, found = tmp_path / "lost.json", tmp_path / "found.json"
    lost.symlink_to(tmp_path / "gone" / "x.json")
    found.symlink_to(tmp_path / "x.json")
    with pytest.raises(HeadwaterError, match=r"--output .*lost\.json: the folder of this file does not exist"):
        check_file(str(lost), "--output")
    check_file(str(found), "--output")
    with open(tmp_path / "open.json", "w") as file:
        check_file(f"/dev/fd/{file.fileno()}", "--output")
    check_file("/dev/null", "--output")


def in_a_whole_folder(path):
    with whole_folder(path) as work:
        save_file(TENSORS, work / "a.safetensors")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 1000),
        lambda path: write_json(path, {"a": "x" * 1000}),
        lambda path: write_tensors(TENSORS, path, {}),
        in_a_whole_folder,
    ],
)
def test_what_does_not_fit_is_named_and_leaves_what_was_there(tmp_path, write):
    path = tmp_path / "it"
    if write is in_a_whole_folder:
        path.mkdir()
        (path / "old").write_text("old")
    else:
        path.write_text("old")
    with files_end_after(100), pytest.raises(NotWritten, match="File too large") as caught:
        write(path)
    assert caught.value.problems[0].where == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["it"]
    assert (path / "old" if path.is_dir() else path).read_text() == "old"


def test_a_file_that_cannot_be_made_in_a_whole_folder_is_named_by_the_folders_name(tmp_path):
    with pytest.raises(NotWritten, match="No such file") as caught, whole_folder(tmp_path / "it") as work:
        (work / "nowhere" / "file").write_text("x")
    assert caught.value.problems[0].where == str(tmp_path / "it")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_meanwhile_is_not_said_to_be_unwritable(tmp_path):
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "it"):
        (tmp_path / "nowhere").read_text()
    with pytest.raises(OSError, match="Input/output") as caught, whole_folder(tmp_path / "it"):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/a/broken/disk")
    assert not isinstance(caught.value, HeadwaterError)
    with pytest.raises(HeadwaterError, match="another reason"), whole_folder(tmp_path / "it"):
        raise HeadwaterError("another reason")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", ["__cause__", "__context__"])
def test_a_full_disk_behind_another_error_is_found(tmp_path, kept):
    """Libraries raise their own on top."""
    error = RuntimeError("could not save")
    setattr(error, kept, OSError(errno.ENOSPC, "No space left on device"))
    assert why_not_written(error, tmp_path) == "No space left on device"
    assert why_not_written(RuntimeError("could not save"), tmp_path) is None

"""Packages come through the real pip, from a folder in place of an index, and only with the pinned hash."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile

import pytest

from headwater.demo import packages
from headwater.demo.packages import Package, fetch, verify
from headwater.errors import HeadwaterError

BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    pathlib.Path({marker!r}).write_text("ran")
    folder = pathlib.Path(directory, "textpack-2.0.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: textpack\\nVersion: 2.0\\n")
    return folder.name
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def make_wheel(folder, name, version, contents):
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, data in contents.items():
            wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def pinned(path, name, version):
    return Package(name, version, path.name, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A wheel and a source archive in a folder that pip takes for the only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    wheel = make_wheel(folder, "modelpack", "1.0", {"modelpack/weights.bin": b"w" * 1000})
    source = folder / "textpack-2.0.tar.gz"
    files = {"pyproject.toml": PYPROJECT, "backend.py": BACKEND.format(marker=str(tmp_path / "marker"))}
    files["PKG-INFO"] = "Metadata-Version: 2.1\nName: textpack\nVersion: 2.0\n"
    with tarfile.open(source, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"textpack-2.0/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return pinned(wheel, "modelpack", "1.0"), pinned(source, "textpack", "2.0")


def test_wheels_and_source_archives_are_fetched_once(index, tmp_path, monkeypatch):
    said = []
    paths = fetch(index, tmp_path / "kept", progress=said.append)
    assert [hashlib.sha256(paths[p].read_bytes()).hexdigest() for p in index] == [p.sha256 for p in index]
    assert said == ["fetching modelpack 1.0", "fetching textpack 2.0"]
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == sorted(p.filename for p in index)

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched a second time"))
    assert fetch(index, tmp_path / "kept", progress=said.append) == paths


def test_a_wrong_file_from_the_index_is_refused_before_its_code_runs(index, tmp_path):
    wrong = [Package(p.name, p.version, p.filename, "0" * 64) for p in index]
    with pytest.raises(HeadwaterError) as caught:
        fetch(wrong, tmp_path / "kept", progress=lambda _: None)
    assert len(caught.value.problems) == 2
    for package, problem in zip(index, caught.value.problems, strict=True):
        assert package.filename in problem.what
        assert f"expected {'0' * 64}, got {package.sha256}" in problem.what
    assert list((tmp_path / "kept").iterdir()) == []
    assert not (tmp_path / "marker").exists()


def test_a_kept_file_that_changed_is_refused(index, tmp_path):
    wheel = index[0]
    path = fetch([wheel], tmp_path / "kept", progress=lambda _: None)[wheel]
    path.write_bytes(path.read_bytes() + b"x")
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(HeadwaterError) as caught:
        fetch([wheel], tmp_path / "kept", progress=lambda _: None)
    (problem,) = caught.value.problems
    assert problem.where == str(path)
    assert f"expected {wheel.sha256}, got {got}" in problem.what


def test_a_kept_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(HeadwaterError, match="this file cannot be read: Is a directory"):
        verify(tmp_path, "0" * 64)


def test_every_package_that_is_gone_is_named_with_the_way_without_it(index, tmp_path):
    gone = [Package(f"gone{i}", "1.0", f"gone{i}-1.0-py3-none-any.whl", "0" * 64) for i in (1, 2)]
    with pytest.raises(HeadwaterError) as caught:
        fetch([gone[0], index[0], gone[1]], tmp_path / "kept", progress=lambda _: None)
    assert [problem.where for problem in caught.value.problems] == ["gone1 1.0", "gone2 1.0"]
    for problem in caught.value.problems:
        assert "No matching distribution" in problem.what
        assert "--set model_name_or_path=" in problem.fix
        assert "http" not in str(problem)


def test_python_without_pip(index, tmp_path, monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "python: No module named pip")
    )
    with pytest.raises(HeadwaterError, match="pip is missing"):
        fetch(index, tmp_path / "kept", progress=lambda _: None)


def test_the_pins_are_whole():
    pins = [value for value in vars(packages).values() if isinstance(value, Package)]
    assert len(pins) == 5
    for pin in pins:
        assert len(bytes.fromhex(pin.sha256)) == 32
        assert pin.version in pin.filename

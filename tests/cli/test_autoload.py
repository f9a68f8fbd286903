"""The hook that makes other programs' PEFT know headwater's methods, tried in real, bare Python processes."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from headwater.cli import autoload
from headwater.errors import HeadwaterError


def python(site: Path, code: str, **environment: str) -> str:
    """The output of `code` in a new Python that treats `site` as one of its site-packages."""
    program = f"import site; site.addsitedir({str(site)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "", **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def packages(folder: Path, *, base: str | None) -> Path:
    """Stand-ins for PEFT and headwater: what matters is when the one loads the other, not what they hold.

    `base` is the code of `headwater.methods.base`, which is where the real one imports PEFT; None leaves headwater out.
    """
    files = {"peft/__init__.py": "print('peft'); ready = True", "peft/sub.py": "print('peft.sub')"}
    if base is not None:
        files |= {
            "headwater/__init__.py": "from . import methods, tuner",
            "headwater/methods/__init__.py": "from .base import known",
            "headwater/methods/base.py": f"{base}\nknown = 1",
            "headwater/tuner/__init__.py": "from ..methods.base import known; print('registered')",
        }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


IMPORTS_PEFT = "import peft; assert peft.ready"


def first(folder: Path) -> str:
    """Code that puts `folder` before everything else, also before an editable install's finder."""
    return f"import sys; sys.path.insert(0, {str(folder)!r})\n"


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site").mkdir()
    autoload.add(tmp_path / "site")
    return tmp_path / "site"


@pytest.mark.parametrize("code", ["import peft", "import peft.sub", "from peft import ready"])
def test_headwater_comes_right_after_peft(site, tmp_path, code):
    found = python(site, first(packages(tmp_path / "p", base=IMPORTS_PEFT)) + code).split()
    assert found[:2] == ["peft", "registered"]
    assert len(found) == (3 if "sub" in code else 2)


def test_looking_for_peft_loads_nothing(site, tmp_path):
    code = (
        "import importlib.util as u\n"
        "assert u.find_spec('peft').name == 'peft' and u.find_spec('peft').origin.endswith('__init__.py')\n"
        "print(sorted({'peft', 'headwater'} & set(sys.modules)))\n"
        "import peft\nprint(type(peft.__spec__.loader).__name__, 'exec_module' in vars(peft.__spec__.loader))\n"
        "print([type(f).__name__ for f in sys.meta_path].count('AfterPeft'))"
    )
    found = python(site, first(packages(tmp_path / "p", base=IMPORTS_PEFT)) + code).splitlines()
    assert found == ["[]", "peft", "registered", "SourceFileLoader False", "0"]


def test_a_start_without_peft_costs_no_import(site):
    code = "import sys; print(sorted({'torch', 'peft', 'headwater', 'transformers'} & set(sys.modules)))"
    assert python(site, code).strip() == "[]"


@pytest.mark.parametrize("code", ["import headwater", "import headwater.tuner", "from headwater.methods import base"])
def test_importing_headwater_first_is_fine(site, tmp_path, code):
    found = python(site, first(packages(tmp_path / "p", base=IMPORTS_PEFT)) + code)
    assert found.split() == ["peft", "registered"]


def test_a_broken_headwater_does_not_break_peft(site, tmp_path):
    found = python(site, first(packages(tmp_path / "p", base="1 / 0")) + "import peft; print(peft.ready)")
    assert found.startswith("peft\nTrue")
    assert "headwater's methods are not available: ZeroDivisionError" in found


def test_without_headwater_or_without_the_hook_python_starts_silently(site, tmp_path):
    bare = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    bare += "sys.path = [p for p in sys.path if 'src' not in p]\n"
    folder = packages(tmp_path / "p", base=None)
    assert python(site, bare + first(folder) + "import peft").splitlines() == ["peft"]
    (site / "_headwater_peft_hook.py").unlink()
    assert python(site, "print('started')") == "started\n"


def test_the_command_writes_and_removes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("site.ENABLE_USER_SITE", False)
    autoload.run(disable=False)
    assert {p.name for p in tmp_path.iterdir()} == {"_headwater_peft_hook.py", "headwater-autoload.pth"}
    assert str(tmp_path / "headwater-autoload.pth") in capsys.readouterr().out
    autoload.run(disable=True)
    assert not list(tmp_path.iterdir())
    autoload.run(disable=True)
    assert "was not enabled" in capsys.readouterr().out


def test_nowhere_to_write(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("site.ENABLE_USER_SITE", False)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(HeadwaterError, match="virtual environment"):
        autoload.run(disable=False)


def test_the_real_thing_knows_r_lora(site):
    """PEFT's own mapping, in a process that never says headwater."""
    code = "from peft import PEFT_TYPE_TO_CONFIG_MAPPING as m; print(m['RLORA'].__name__)"
    assert "RLoraConfig" in python(site, code)

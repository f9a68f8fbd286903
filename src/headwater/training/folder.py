"""The run folder: which checkpoint to go on from, and what may be replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..errors import HeadwaterError, Problem
from .arguments import HeadwaterArguments

STATE = "trainer_state.json"
WORTH_KEEPING = ("adapter", "results.json", "comparison.json")
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
    if not (path / STATE).is_file():
        found = [str(p.parent) for p in sorted(Path(args.output_dir).glob(f"checkpoint-*/{STATE}"))]
        raise HeadwaterError(
            Problem(
                f"{path} is no checkpoint folder: it has no {STATE}",
                where,
                f"there are {', '.join(found)}" if found else "set it to true for the run's last checkpoint",
            )
        )
    return path


def last_checkpoint(output: Path) -> Path | None:
    """The latest checkpoint of a run that is whole: its state, which is written last, can be read."""
    found = {int(n): p for p in output.glob(f"checkpoint-*/{STATE}") if (n := p.parent.name[11:]).isdecimal()}
    return next((found[n].parent for n in sorted(found, reverse=True) if _is_json(found[n])), None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # another process may be taking it away
        return False
    return True


def check_folder(output: Path, *, resume: Path | None, overwrite: bool) -> None:
    """Refuses to write over a run that holds an adapter, results or checkpoints.

    Raises:
        HeadwaterError: if `output` holds one that is neither resumed nor to be overwritten.
    """
    if resume is None and not overwrite and (held := _held(output)):
        raise HeadwaterError(
            Problem(
                f"{output} holds a run already ({', '.join(p.name for p in held[:4])})",
                "output_dir",
                "choose another folder, go on with it (training.resume_from_checkpoint: true), or replace it "
                "(training.overwrite_output_dir: true)",
            )
        )


def clear_folder(output: Path, *, resume: Path | None, overwrite: bool) -> None:
    """Makes the folder; takes an earlier run's files out of it, unless that run is resumed. Other files stay."""
    output.mkdir(parents=True, exist_ok=True)
    if resume is not None:
        return
    for path in [*(output / name for name in REPLACED), *(_held(output) if overwrite else [])]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _held(output: Path) -> list[Path]:
    return [
        *(output / name for name in WORTH_KEEPING if (output / name).exists()),
        *sorted(p.parent for p in output.glob(f"checkpoint-*/{STATE}")),
    ]

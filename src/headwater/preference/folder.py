"""What a folder of `headwater prefer` holds, and whether a run may go on with it or take its place."""

from __future__ import annotations

import shutil
from pathlib import Path

from headwater.config import dump_config
from headwater.errors import HeadwaterError, Problem
from headwater.marked_yaml import parse_document
from headwater.preference.spec import PreferConfig

FILE = "prefer.yaml"
COMPARED = (
    "model_name_or_path",
    "model",
    "method",
    "tasks",
    "data",
    "mixture",
    "evaluation",
    "preference",
    "seed",
    "training",
)
"""The sections that a run which is gone on with keeps."""
FREE = ("resume_from_checkpoint", "overwrite_output_dir", "batch_size")
"""What of them may change: it changes no result."""


def clear_folder(output: Path) -> None:
    """Removes what a run left. The file that tells of it goes last: without it, results that are left would seem to be
    the new run's."""
    names = ("results.json", "report.html", "figures", "adapter", "base.json", "config.yaml", FILE)
    for path in [*output.glob("*/seed-*"), *(output / name for name in names)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_folder(config: PreferConfig, output: Path) -> bool:
    """Whether the folder's run is gone on with.

    Raises:
        HeadwaterError: the folder holds one that is neither resumed nor to be replaced, or that was told other things.
    """
    asked = config.training.get("resume_from_checkpoint")
    if asked and str(asked).lower() != "true":
        what = "a run of several strategies is resumed as a whole"
        raise HeadwaterError(Problem(what, "training.resume_from_checkpoint", "set it to true"))
    held = (output / FILE).is_file()
    if held and asked:
        before = parse_document((output / FILE).read_text(encoding="utf-8"), str(output / FILE)).data
        now = parse_document(dump_config(config), FILE).data
        for key in COMPARED:
            old, new = (
                {k: v for k, v in d[key].items() if k not in FREE} if isinstance(d.get(key), dict) else d.get(key)
                for d in (before, now)
            )
            if old != new:
                what = f"`{key}` is not what it was in the run that is to be resumed"
                raise HeadwaterError(Problem(what, key, f"{output / FILE} says what it was"))
    elif held and not config.training.get("overwrite_output_dir"):
        fix = (
            "choose another folder, go on with it (training.resume_from_checkpoint: true), or replace it "
            "(training.overwrite_output_dir: true)"
        )
        raise HeadwaterError(Problem(f"{output} holds a run already", "output_dir", fix))
    return bool(held and asked)

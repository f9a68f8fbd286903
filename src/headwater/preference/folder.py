"""What a folder of `headwater prefer` holds, and whether a run may go on with it or take its place."""

from __future__ import annotations

from pathlib import Path

from headwater.config import dump_config
from headwater.errors import HeadwaterError, Problem
from headwater.marked_yaml import parse_document
from headwater.preference.spec import PreferConfig
from headwater.training.folder import PREFER as FILE
from headwater.training.folder import check_writable, held_in, named

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


def check_folder(config: PreferConfig, output: Path) -> bool:
    """Whether the folder's run is gone on with.

    Raises:
        HeadwaterError: the folder holds one, of whichever command, that is neither resumed nor to be replaced, or that
            was told other things; or it cannot be written to.
    """
    check_writable(output)
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
    elif not config.training.get("overwrite_output_dir") and (found := held_in(output)):
        whose = "already" if held else f"of another command ({named(found, output)})"
        go_on = " go on with it (training.resume_from_checkpoint: true)," if held else ""
        fix = f"choose another folder,{go_on} or replace it (training.overwrite_output_dir: true)"
        raise HeadwaterError(Problem(f"{output} holds a run {whose}", "output_dir", fix))
    return bool(held and asked)

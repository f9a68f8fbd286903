"""Whether a checkpoint is one of this run: what it was trained with, compared with what this run has."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch.serialization import get_crc32_options

from ..data.tasks import SPLITS, Task
from ..errors import HeadwaterError, Problem
from .folder import STATE

if TYPE_CHECKING:
    from transformers import Trainer

    from ..data.rows import Row
    from .trainer import HeadwaterTrainer

SAVED = "headwater"
"""Under this name a checkpoint's state holds what headwater knows of it."""
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "loss_normalization",
    "neftune_noise_alpha",
    "average_tokens_across_devices",
    "dataloader_drop_last",
    "bf16",
    "fp16",
)
"""The keys of `training:` that weights depend on, and that stay as they were. How long a run is, how often it is saved,
scored and logged, and on what device it runs may change."""
MANY = 6
NOT_COMPARED = {"peft_type", "peft_version", "auto_mapping", "inference_mode", "base_model_name_or_path", "revision"}


def digest(rows: Iterable[Row]) -> str:
    """Tells rows from others of the same number and lengths. Of their texts: a chat template may write the date into
    their tokens, which are then others the next day."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr((row.prompt, row.completion, row.choices, row.messages)).encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:16]


def digests(tasks: Iterable[Task]) -> dict[str, dict[str, str]]:
    """Task -> split -> `digest` of its rows, of those splits that have some."""
    return {task.name: {split: digest(rows) for split in SPLITS if (rows := getattr(task, split))} for task in tasks}


def describe(trainer: HeadwaterTrainer) -> dict[str, dict[str, Any]]:
    """What a checkpoint records of how its weights came about: the mixture, and settings by the key that they have in a
    run's file. As JSON holds them."""
    args = trainer.args
    mixture = {
        "rows": dict(zip(trainer.task_names, map(len, trainer.lengths), strict=True)),
        "tokens": dict(zip(trainer.task_names, map(sum, trainer.lengths), strict=True)),
        "content": trainer.digests,
        "shares": [round(share, 9) for share in trainer.shares],
        "batching": trainer.mixture.batching,
        "batch_size": trainer._train_batch_size,
        "ranks": trainer.accelerator.num_processes,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "seed": args.seed if args.data_seed is None else args.data_seed,
    }
    align = getattr(trainer._context and trainer._context.align, "spec", None)
    settings = {
        **{f"training.{key}": getattr(args, key) for key in SETTINGS},
        "seed": args.seed,
        "tasks": trainer.task_names,
        "align": align and align.model_dump(),
        "model.dtype": str(getattr(trainer.model, "dtype", None)),
    }
    return json.loads(json.dumps({"mixture": mixture, "settings": settings}, default=str))


def check_state(trainer: HeadwaterTrainer, saved: dict[str, Any]) -> None:
    """Checks what the state of a checkpoint records.

    Raises:
        HeadwaterError: if it was trained with other settings or, unless `ignore_data_skip` is on, on another mixture.
    """
    _refuse(_differences(trainer, saved))


def check_checkpoint(trainer: HeadwaterTrainer, checkpoint: Path) -> None:
    """Checks all that a checkpoint holds. Nothing is loaded or written.

    Raises:
        HeadwaterError: as `check_state`; or if its adapter is of another method, or on another base model; or if it
            lacks a file without which the run would go on as another one, or has one that cannot be read.
    """
    steps = trainer.total_steps()  # out here, as settings that make no batches are no fault of the checkpoint's
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        complete = state["global_step"] >= steps
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unreadable(checkpoint, f"{checkpoint / STATE} cannot be read: {error}") from error
    saved = state.get("stateful_callbacks", {}).get(SAVED, {})
    check_files(trainer, checkpoint, complete=complete, ranks=saved.get("mixture", {}).get("ranks"))
    if trainer.args.auto_find_batch_size and "mixture" in saved:  # the size that was found is not restored yet
        saved = {**saved, "mixture": {k: v for k, v in saved["mixture"].items() if k != "batch_size"}}
    _refuse([*_method(trainer, checkpoint), *_differences(trainer, saved)])


def check_files(
    trainer: Trainer, checkpoint: Path, *, complete: bool, also: Sequence[str] = (), ranks: int | None = None
) -> None:
    """Checks that a checkpoint's files are there and can be read: where one is missing, transformers goes on without,
    as another run. Sharded training has files of its own, which are not checked.

    Args:
        complete: it has all steps, so that only its weights are needed.
        also: further files that it needs.
        ranks: how many wrote it. Where they are others now, that is what is wrong, not that one has no random state.

    Raises:
        HeadwaterError: if one is missing or cannot be read.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    args, needed = trainer.args, [*also]
    if not complete:
        rank = f"_{args.process_index}" if args.world_size > 1 else ""
        # other data make another run anyway, which may have other ranks
        others = args.ignore_data_skip or ranks not in (None, args.world_size)
        random_state = [] if others else [f"rng_state{rank}.pth"]
        needed += ["optimizer.pt", "scheduler.pt", *random_state]
    if isinstance(trainer.model, PeftModel) and "default" in trainer.model.peft_config:
        needed += ["adapter_config.json", "adapter_model.safetensors"]
    problems = [reason for name in needed if (reason := _why_not_read(checkpoint / name))]
    if problems:
        raise _unreadable(checkpoint, *problems)


def _unreadable(checkpoint: Path, *problems: str) -> HeadwaterError:
    others = [p.parent for p in checkpoint.parent.glob(f"checkpoint-*/{STATE}") if p.parent != checkpoint]
    there = ", ".join(map(str, sorted(others)))
    fix = f"delete this checkpoint; left to go on from is {there}" if there else "start a new run in another output_dir"
    where = "training.resume_from_checkpoint"
    return HeadwaterError(*(Problem(what, where) for what in problems[:-1]), Problem(problems[-1], where, fix))


def _why_not_read(path: Path) -> str | None:
    """Why a file cannot be read, as far as can be told without unpickling it; None if it can."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            with zipfile.ZipFile(path) as archive:  # which is what torch writes; it does not look at the sums itself
                if get_crc32_options() and (part := archive.testzip()):
                    return f"{path} cannot be read: {part} in it is damaged"
    except FileNotFoundError:
        return f"the checkpoint {path.parent} has no {path.name}"
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return f"{path} cannot be read: {error}"
    return None


def _refuse(problems: list[Problem]) -> None:
    """Raises:
    HeadwaterError: with the problems, if there are any; what to do is said once.
    """
    different = list({problem.what: problem for problem in reversed(problems)}.values())[::-1]
    if different:
        *others, last = different
        fix = "resume with the data and settings that the run began with, or start a new run in another output_dir"
        raise HeadwaterError(*others, Problem(last.what, last.where, fix))


def _differences(trainer: HeadwaterTrainer, saved: dict[str, Any]) -> list[Problem]:
    now = describe(trainer)
    settings, mixture = saved["settings"], saved["mixture"]
    if trainer.args.ignore_data_skip:
        mixture, settings = {}, {k: v for k, v in settings.items() if k not in ("tasks", "seed")}
    return [
        *(
            _problem(f"{key.rpartition('.')[2]} {_text(settings[key])}", _text(value), key)
            for key, value in now["settings"].items()
            if key in settings and settings[key] != value
        ),
        *(
            _problem(f"{key} {mixture[key]}", value, "training.resume_from_checkpoint")
            for key, value in now["mixture"].items()
            if key != "content" and key in mixture and mixture[key] != value
        ),
        *(
            Problem(f"the training rows of task {name} are not those that the checkpoint was trained on", "tasks")
            for name, value in now["mixture"]["content"].items()
            if mixture.get("content", {}).get(name, value) != value
        ),
    ]


def _problem(then: str, now: Any, where: str) -> Problem:
    return Problem(f"the checkpoint was trained with {then}, this run has {now}", where)


def _text(value: Any) -> Any:
    return "none" if value is None else value


def _method(trainer: HeadwaterTrainer, checkpoint: Path) -> list[Problem]:
    """What differs between the checkpoint's adapter and this run's, by their configs."""
    path = checkpoint / "adapter_config.json"
    config = next(iter((getattr(trainer.model, "peft_config", None) or {}).values()), None)
    if config is None or not path.is_file():
        return []
    then = _plain(json.loads(path.read_text(encoding="utf-8")))
    now = _plain(
        json.loads(json.dumps(config.to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v)))
    )
    problems = []
    if then.get("peft_type") != now["peft_type"]:
        problems.append(_problem(_named(then, ["r"]), _named(now, ["r"]), "method"))
    else:
        # Files are read when an adapter is made, and may have moved since.
        kept = [key for key in then if key in now and key not in {*NOT_COMPARED, *getattr(config, "files", ())}]
        if other := [key for key in kept if then[key] != now[key]]:
            where = f"method.{other[0]}" if len(other) == 1 else "method"
            problems.append(_problem(_named(then, other), _named(now, other), where))
    bases = [Path(str(found.get("base_model_name_or_path") or "")).name for found in (then, now)]
    if all(bases) and bases[0] != bases[1]:  # a folder may have moved; its name says which model it is
        problems.append(_problem(f"base model {bases[0]}", bases[1], "model_name_or_path"))
    return problems


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config with its lists of names in one order: PEFT keeps some of them as sets."""
    return {
        key: sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
        for key, value in config.items()
    }


def _named(config: dict[str, Any], fields: list[str]) -> str:
    """A method and some of its fields; of long lists, as those of target modules are, how long they are."""
    parts = []
    for key in fields:
        value = config.get(key)
        many = isinstance(value, list) and len(value) > MANY
        parts.append(f"{len(value or ())} {key}" if many else f"{key} {_text(value)}")
    return f"{config.get('peft_type', 'no method')} ".lower() + ", ".join(parts)

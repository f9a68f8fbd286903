"""Find an adapter, on its own or in a run folder, and load it on its base model."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from headwater.cli.console import quiet_libraries
from headwater.errors import HeadwaterError, Problem

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from headwater.config import RunConfig

ADAPTER_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_MATCH = "the adapter has to match its config and its base model"


@dataclass(frozen=True)
class Source:
    """An adapter folder and, where it lies in a run folder, that run's config and the file it came from.

    Args:
        other_base: a base model that is meant instead of the run's or the one that the adapter names.
    """

    adapter: Path
    run_file: Path | None
    config: RunConfig | None
    other_base: str | None = None

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that the adapter is from, resolved; None where it lies on its own."""
        return self.run_file.resolve().parent if self.run_file is not None else None

    @property
    def base_model(self) -> str:
        """The base model: the one that was asked for, else the run's, else the one that the adapter names."""
        if self.other_base:
            return self.other_base
        if self.config is not None:
            return self.config.model_name_or_path
        return adapter_fields(self.adapter).get("base_model_name_or_path") or ""

    def task_index(self, name: str) -> int:
        """The task id that `name` had in training.

        Raises:
            HeadwaterError: the run has no such task, or it is not known which tasks there were.
        """
        if self.config is None:
            fix = "give the run folder, whose config.yaml lists the tasks"
            raise HeadwaterError(
                Problem(f"the adapter alone does not say which task is `{name}`", str(self.adapter), fix)
            )
        names = [task.name for task in self.config.tasks]
        if name not in names:
            raise HeadwaterError(Problem(f"unknown task `{name}`", f"--task {name}", f"the run's: {', '.join(names)}"))
        return names.index(name)


def locate(path: str) -> Source:
    """The adapter in `path`, which is an adapter folder, a checkpoint or a run folder.

    Raises:
        HeadwaterError: there is no adapter.
    """
    from headwater.config import load_config
    from headwater.training.origin import run_file

    quiet_libraries()
    folder = Path(path)
    if not folder.is_dir():
        raise HeadwaterError(Problem("there is no such folder", path, "give a run folder or an adapter folder"))
    inside = (folder / ADAPTER_FILE).is_file()
    adapter, run = (folder, folder.resolve().parent) if inside else (folder / "adapter", folder)
    if not (adapter / ADAPTER_FILE).is_file():
        checkpoints = sorted(p.parent.name for p in folder.glob(f"checkpoint-*/{ADAPTER_FILE}"))
        fix = "a run folder holds adapter/, an adapter folder adapter_config.json"
        if checkpoints:
            fix = f"the run did not finish; give one of its checkpoints: {', '.join(checkpoints)}"
        raise HeadwaterError(Problem("there is no adapter in this folder", path, fix))
    file = run_file(run)
    return Source(adapter, None, None) if file is None else Source(adapter, file, load_config(file))


def adapter_fields(adapter: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Raises:
        HeadwaterError: it is not JSON.
    """
    from headwater.compose.adapter import read_config  # with torch, which a mistyped command need not wait for

    return read_config(adapter)


def load(
    source: Source, config: RunConfig | None = None, *, on_cpu: bool = False
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model with the adapter on it, in eval mode, and the tokenizer.

    Args:
        config: how the base model is loaded, and where it runs; the run's own by default.
        on_cpu: leave it on the CPU, unless the config has a `device_map`.

    Raises:
        HeadwaterError: the base model or the adapter cannot be loaded.
    """
    from headwater.base_model import load_to_run, own_device

    config = config or source.config
    device = own_device(use_cpu=on_cpu) if on_cpu or config is None else config.device
    options = config.model.model_dump() if config else {}
    base, tokenizer = load_to_run(_named_base(source), device, **options)
    return attach(base, source.adapter), tokenizer


def _named_base(source: Source) -> str:
    if not source.base_model:
        fix = "give the run folder, or write base_model_name_or_path into adapter_config.json"
        raise HeadwaterError(Problem("the adapter does not name its base model", str(source.adapter), fix))
    return source.base_model


def attach(base: Any, adapter: Path, **options: Any) -> PeftModel:
    """`PeftModel.from_pretrained`, never from a pickle, with its failures explained."""
    from peft import PeftModel

    import headwater.tuner  # noqa: F401  (registers the methods)

    if not (adapter / WEIGHTS_FILE).is_file():
        raise HeadwaterError(Problem(f"there is no {WEIGHTS_FILE} in this folder", str(adapter)))
    try:
        with warnings.catch_warnings():
            # PEFT loads what there is and leaves the rest as it is drawn; an adapter that fits has all of it.
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = cast(PeftModel, PeftModel.from_pretrained(base, str(adapter), **options).eval())
    except HeadwaterError as error:  # of a setting in its config, say
        raise HeadwaterError(*(dataclasses.replace(p, where=_in(adapter, p.where)) for p in error.problems)) from error
    except KeyError as error:
        known = "headwater methods lists the known ones"
        raise HeadwaterError(Problem(f"unknown adapter type {error}", str(adapter / ADAPTER_FILE), known)) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise HeadwaterError(Problem(f"the adapter cannot be loaded: {reason}", str(adapter), _MATCH)) from error
    _refuse_layers_elsewhere(model, adapter)
    return model


def _refuse_layers_elsewhere(model: PeftModel, adapter: Path) -> None:
    """What a file holds for layers that have no adapter here would be left out without a word. Of headwater's methods
    only: PEFT renames tensors of its own as it loads them."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    with safe_open(adapter / WEIGHTS_FILE, "pt") as file:
        extra = [name for name in file.keys() if "_branch." in name and name not in held]  # noqa: SIM118
    if extra:
        what = f"{len(extra)} of its tensors have no place in the model, such as {extra[0]}"
        raise HeadwaterError(Problem(f"the adapter cannot be loaded: {what}", str(adapter), _MATCH))


def _in(adapter: Path, where: str) -> str:
    return where if where.startswith(str(adapter)) else f"{adapter}: {where}" if where else str(adapter)


def attach_to_shape(source: Source) -> PeftModel:
    """The adapter on a base model of the right shape but without weights, to look at without reading the base's.

    Raises:
        HeadwaterError: the base model's config or the adapter cannot be loaded.
    """
    from safetensors.torch import load_file

    from headwater.base_model import shape_of

    remote = bool(source.config and source.config.model.trust_remote_code)
    base = shape_of(_named_base(source), trust_remote_code=remote)
    model = attach(base, source.adapter, low_cpu_mem_usage=True, is_trainable=True)
    # PEFT moves what it loads to the base's device, and there is nothing left of it on the meta device.
    tensors = load_file(source.adapter / WEIGHTS_FILE)
    named = {f"{head}.default.{last}": t for name, t in tensors.items() for head, _, last in [name.rpartition(".")]}
    model.load_state_dict(named, strict=False, assign=True)
    return model

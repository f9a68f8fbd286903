"""The adapter that a `method:` section describes, put on a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import get_peft_model
from peft.utils import CONFIG_NAME
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import HeadwaterError, Problem
from ..methods import make_config


def load_default(model: nn.Module, checkpoint: Path) -> None:
    """Loads the adapter `default` of a checkpoint where there are others beside it: transformers before 5.23 reads the
    others' subfolders alone then, and leaves it as it is without a word."""
    others = len(getattr(model, "peft_config", ())) > 1
    if others and "default" in model.peft_config and (checkpoint / CONFIG_NAME).is_file():  # type: ignore[operator]
        model.load_adapter(str(checkpoint), "default", is_trainable=True)  # type: ignore[operator]


def add_adapter(model: nn.Module, method: dict[str, Any], **options: Any) -> nn.Module:
    """Wraps a base model with the adapter that the `method:` section describes.

    Args:
        options: further arguments of `peft.get_peft_model`.

    Raises:
        HeadwaterError: if the method does not fit the model, or one of `target_modules` or `modules_to_save` is the
            name of no layer.
    """
    fields = {"task_type": "CAUSAL_LM", **method}
    config = make_config(fields.pop("name"), **fields)
    targets = getattr(config, "target_modules", None)
    layers = [name for name, _ in model.named_modules()]
    # PEFT is content with one that is found, so that a mistyped one beside it would be lost without a word.
    for field in ("target_modules", "modules_to_save"):
        names = getattr(config, field, None) or ()
        names = () if isinstance(names, str) else names
        lost = [name for name in names if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
        if lost:
            raise _no_layer(f"is called {' or '.join(map(repr, sorted(lost)))}", model, field)
    try:
        return get_peft_model(model, config, **options)
    except HeadwaterError:
        raise
    except ValueError as error:
        if str(error).startswith(("Target modules", "No modules were targeted")):
            shown = targets if isinstance(targets, str | None) else sorted(targets)
            chosen = getattr(config, "layers_to_transform", None)
            among = "" if chosen is None else f" among layers {chosen}"
            raise _no_layer(f"matches {shown!r}{among}", model, "target_modules") from error
        raise HeadwaterError(Problem(str(error), "method")) from error


def _no_layer(what: str, model: Any, field: str) -> HeadwaterError:
    output = model.get_output_embeddings()
    names = dict.fromkeys(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    )
    fix = f"its linear layers are: {', '.join(names)}" + ("; or give all-linear" if field == "target_modules" else "")
    return HeadwaterError(Problem(f"no layer of the model {what}", f"method.{field}", fix))
